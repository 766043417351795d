"""The committed pages against the committed CSV files."""

import re
from pathlib import Path

import pytest

import figures
import runs
import tables

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "experiments/results/README.md")
TABLE = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end -->", re.DOTALL)


@pytest.fixture(scope="module")
def made():
    return figures.make(runs.RESULTS)


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_csv_files(page, made):
    text = (ROOT / page).read_text()
    assert TABLE.search(text)
    assert tables.fill_tables(text, made[0]) == text, "run make figures"


@pytest.mark.parametrize("page", PAGES)
def test_accuracies_in_the_text_stand_in_the_tables(page, made):
    """Every percentage and number with a decimal in the sentences about the experiments is one of a table's cells."""
    text = (ROOT / page).read_text()
    section = text if page.startswith("experiments") else text.split("## Results\n")[1].split("\n## ")[0]
    cells = set(re.findall(r"[\d.]+(?:e[+-]\d+)?", "\n".join(made[0].values())))
    sentences = TABLE.sub("", section)
    quoted = re.findall(r"(?<![\w./-])\d+\.\d+(?:e[+-]\d+)?(?![\w/-]|\.\d)", sentences)
    assert [number for number in quoted if number not in cells] == []


def test_every_figure_is_there_and_shown(made):
    text = (runs.RESULTS / "README.md").read_text()
    for name in made[1]:
        assert (runs.RESULTS / f"{name}.png").is_file()
        assert f"({name}.png)" in text
