"""The experiments, from no file at all to figures and tables."""

import re
from pathlib import Path

import numpy as np
import pytest
from rows import make_result

import beyond
import conditioning
import figures
import paper
import runs
import tables
from programs import UserError


def test_the_protocol():
    for experiment, cells, methods in (("e1", 2 * 3 * 3, 3), ("e2", 4 * 5, 5), ("refresh", 2 * (2 * 3 + 4), 2)):
        grid = paper.grid(experiment, quick=False)
        assert len(grid) == len(set(grid)) == cells
        tuning = paper.with_rates(grid, paper.RATES[experiment], 100)
        assert not any(run.reads_test for run in tuning)
        # every method at every batch size gets the same rates, seeds and examples
        settings = {(r.data, r.model, r.batch_size, r.rate, r.seed, r.examples) for r in tuning}
        assert len(settings) * methods == len(tuning)
        rates = paper.RATES[experiment]
        assert len(rates) >= 4
        ratios = np.divide(rates[1:], rates[:-1])
        assert ((ratios > 2.9) & (ratios < 3.4)).all()
    assert len(paper.SEEDS) >= 3
    assert paper.TUNING_SEED not in paper.SEEDS


def test_the_test_images_are_read_at_the_best_rate_alone():
    tuning = [
        make_result(rate, accuracy, method=m)
        for m, best in (("sgd", 0.1), ("bnp", 0.3))
        for rate, accuracy in ((0.1, 90 if best == 0.1 else 80), (0.3, 85))
    ]
    final = paper.with_best_rate(tuning, [1, 2])
    assert [(run.method, run.rate, run.seed) for run in final] == [
        ("sgd", 0.1, 1), ("sgd", 0.1, 2), ("bnp", 0.3, 1), ("bnp", 0.3, 2)
    ]  # fmt: skip
    assert all(run.reads_test for run in final)


def test_the_experiments_in_a_short_form(tmp_path, capsys):
    """From no file at all to the figures and a page's tables."""
    folder = str(tmp_path / "results")
    options = ["--quick", "--results", folder, "--examples", "512", "--rates", "0.1", "0.3", "--workers", "1"]
    paper.main(["e1", *options])
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: e1 -->\nold\n<!-- end -->\nafter <!-- table: summary -->\n<!-- end -->\n")
    figures.main(["--results", folder, "--pages", str(page)])
    text = page.read_text()
    assert text.startswith("before\n")
    assert "old" not in text
    for batch_size in (60, 6, 1):
        assert re.search(rf"\| digits \| {batch_size} \| BNP \| \d+\.\d \| ", text)
    assert {path.stem for path in Path(folder).glob("*.png")} == {"batch_size", "e1_rates", "e1_curves"}
    figures.main(["--results", folder, "--pages", str(page)])
    assert page.read_text() == text
    capsys.readouterr()


@pytest.mark.parametrize("experiment", beyond.EXPERIMENTS)
def test_the_experiments_beyond_the_paper_in_a_short_form(experiment, tmp_path, capsys):
    beyond.main([experiment, "--quick", "--results", str(tmp_path), "--workers", "1"])
    results = runs.read(tmp_path / f"{experiment}.csv")
    assert len({result.run for result in results}) == len(results) >= 4
    assert not any(result.diverged for result in results)
    table = figures.make(tmp_path)[0][experiment]
    for result in results:
        assert f"{result.validation_accuracy[-1]:.1f}" in table
    capsys.readouterr()


def test_condition_numbers_in_a_short_form(tmp_path):
    output = tmp_path / "e4.csv"
    rows = conditioning.measure_all(output, [0], [0, 2])
    assert conditioning.read(output) == rows == conditioning.measure_all(output, [0], [0, 2])
    assert {(row.method, row.matrix) for row in rows} == {("sgd", "H"), ("bn", "H"), ("bnp", "H"), ("bnp", "P'HP")}
    assert {row.size for row in rows} == {64 * 20 + 20, 20 * 20 + 20, 20 * 10 + 10}
    start = {(row.method, row.matrix, row.layer): row for row in rows if row.step == 0}
    # at the start of BNP, P is one up to the damping: 1 + 0.01 + 0.0001
    h, php = start["bnp", "H", "Dense_1"], start["bnp", "P'HP", "Dense_1"]
    assert 1 < h.largest / php.largest <= 1.0101 * (1 + 1e-9)
    assert "e4" in figures.make(tmp_path)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["e9"], "no experiment 'e9'; there are e1, e2"),
        (["e1", "--seeds", "x"], "must be a whole number of at least 1, not 'x'"),
        (["--workers", "0"], "at least 1"),
        (["--examples", "511"], "at least 512"),
    ],
)
def test_bad_experiments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        paper.main(arguments)
    assert message in capsys.readouterr().err


def test_figures_need_results(tmp_path):
    with pytest.raises(UserError, match="holds no finished CSV file"):
        figures.make(tmp_path)
    with pytest.raises(UserError, match="runs of different lengths"):
        tables.cells([make_result(0.1, 90.0), make_result(0.1, 90.0, examples=640)])
    assert tables.cells([make_result(0.1, 90.0)]) == []  # its runs at the best rate are still to come


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- table: e1 -->\n<!-- end -->", "no table 'e1'; there are e4, e4_gains"),
        ("data,model\nmnist,mlp\n", "no line <!-- table: NAME -->"),
        ("<!-- table: e4 -->\n<!-- table: e4_gains -->\n<!-- end -->", ".* has no line <!-- end --> before the next"),
        (b"\x89PNG\r\n", "no page in Markdown"),
    ],
)
def test_pages_that_cannot_be_filled_stay_as_they_are(page, message, tmp_path):
    paths = [tmp_path / "good.md", tmp_path / "bad.md"]
    contents = [b"<!-- table: e4 -->\n<!-- end -->", page if isinstance(page, bytes) else page.encode()]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    made = {"e4": "one", "e4_gains": "two"}, {}
    with pytest.raises(UserError, match=f"bad.md: {message}"):
        figures.publish("", lambda results: made, ["--results", str(tmp_path), "--pages", *map(str, paths)])
    assert [path.read_bytes() for path in paths] == contents
