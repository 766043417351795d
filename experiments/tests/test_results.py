"""The committed pages against the committed CSV files."""

import re
from pathlib import Path

import pytest

import deep
import figures
import methods_report
import optimizers_report
import report
import runs
import tables

ROOT = Path(__file__).parents[2]
RESULTS, METHODS, OPTIMIZERS = (f"experiments/results/{name}.md" for name in ("README", "methods", "optimizers"))
PAGES = {
    "README.md": optimizers_report.make,
    "docs/contrib/README.md": methods_report.make,
    "docs/contrib/centred_kernels.md": optimizers_report.make,
    "docs/migration.md": optimizers_report.make,
    "docs/reinforcement_learning.md": optimizers_report.make,
    RESULTS: figures.make,
    METHODS: methods_report.make,
    OPTIMIZERS: optimizers_report.make,
}
TABLE = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end -->", re.DOTALL)
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def made():
    return {make: make(runs.RESULTS) for make in set(PAGES.values())}


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_csv_files(page, made):
    text = (ROOT / page).read_text()
    assert TABLE.search(text)
    assert tables.fill_tables(text, made[PAGES[page]][0]) == text, "run make figures"


@pytest.mark.parametrize("page", PAGES)
def test_accuracies_in_the_text_stand_in_the_tables(page, made):
    """Every percentage and number with a decimal in the sentences about the experiments is one of a table's cells."""
    text = (ROOT / page).read_text()
    section = text.split("## Results\n")[1].split("\n## ")[0] if page == "README.md" else text
    cells = set(re.findall(r"[\d.]+(?:e[+-]\d+)?", "\n".join(made[PAGES[page]][0].values())))
    sentences = CODE.sub("", TABLE.sub("", section))
    quoted = re.findall(r"(?<![\w./-])\d+\.\d+(?:e[+-]\d+)?(?![\w/-]|\.\d)", sentences)
    assert [number for number in quoted if number not in cells] == []


@pytest.mark.parametrize("page", [RESULTS, METHODS, OPTIMIZERS])
def test_every_figure_is_there_and_shown(page, made):
    text = (ROOT / page).read_text()
    for name in made[PAGES[page]][1]:
        assert (runs.RESULTS / f"{name}.png").is_file()
        assert f"({name}.png)" in text


@pytest.mark.parametrize("make", [figures.make, methods_report.make, optimizers_report.make, report.make])
def test_what_an_interrupted_program_has_left_can_be_reported(make, tmp_path):
    for path in runs.RESULTS.glob("*.csv"):
        if path.name != deep.DIAGNOSTICS:  # these come when all trainings are done
            (tmp_path / path.name).write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert make(tmp_path)[0]
