"""Runs as rows of CSV files, and what is chosen by them."""

import dataclasses
import math
import subprocess

import pytest
from rows import make_result

import runs
from programs import UserError


def test_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "runs.csv"
    written = [
        make_result(0.1, 90.0, prior_examples=None),
        make_result(0.3, 10.0, loss=math.inf, augment=True, reads_test=True),
    ]
    for row in written:
        runs.append(path, row)
    first, second = runs.read(path)
    assert second == written[1]
    assert math.isnan(first.test_accuracy)
    assert dataclasses.replace(first, test_loss=0.0, test_accuracy=0.0) == dataclasses.replace(
        written[0], test_loss=0.0, test_accuracy=0.0
    )


def test_half_a_row_is_cut_off(tmp_path):
    path = tmp_path / "runs.csv"
    runs.append(path, make_result(0.1, 90.0, reads_test=True))
    whole = path.read_text()
    runs.append(path, make_result(0.3, 80.0, reads_test=True))
    path.write_text(path.read_text()[:-20])
    assert [row.run.rate for row in runs.read(path)] == [0.1]
    assert path.read_text() == whole


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "runs.csv"
    for content, message in (
        (b"name,value\n", "no CSV file of this program and version: it has no column 'data'"),
        (b"a page, and its last line without an end", "it has no column 'data'"),
        (f"{','.join(runs.HEADER[:-1])}\n".encode(), "it has no column 'test_accuracy'"),
        (f"{','.join(runs.HEADER)},more\n".encode(), "its columns are data,.*, more"),
        (b"\x89PNG\r\n", "no CSV file: 'utf-8' codec"),
        (f"{','.join(runs.HEADER)}\n1,2\n".encode(), r"line 2: 2 cells; expected 30\. Remove the line"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            runs.read(path)
        assert path.read_bytes() == content  # whatever it is, it is somebody's
    path.unlink()
    runs.append(path, make_result(0.1, 90.0))
    path.write_text(path.read_text().replace(",0.1,", ",a tenth,", 1))
    with pytest.raises(UserError, match=r"line 2: 'a tenth' is no rate\. Remove the line"):
        runs.read(path)


@pytest.mark.parametrize("left", ["", "data,mod", ",".join(runs.HEADER)])
def test_a_file_without_rows_is_begun_anew(tmp_path, left):
    path, row = tmp_path / "runs.csv", make_result(0.1, 90.0, reads_test=True)
    path.write_text(left)
    assert runs.read(path) == []
    runs.append(path, row)
    assert runs.read(path) == [row]


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    value: float


def test_plain_rows_are_read_alike(tmp_path):
    path = tmp_path / "rows.csv"
    assert runs.read_rows(path, Row) == []
    path.write_text("name,value\na,1.5\nb,2")
    assert runs.read_rows(path, Row) == [Row("a", 1.5)]
    assert path.read_text() == "name,value\na,1.5\n"
    path.write_text("name,number\na,1.5\n")
    with pytest.raises(UserError, match="it has no column 'value'"):
        runs.read_rows(path, Row)
    for line, message in (("a", "1 cells; expected 2"), ("a,1,2", "3 cells; expected 2"), ("a,b", "'b' is no value")):
        path.write_text(f"name,value\nb,1\n{line}\n")
        with pytest.raises(UserError, match=f"line 3: {message}"):
            runs.read_rows(path, Row)


@pytest.mark.parametrize(
    ("accuracies", "best", "window"),
    [
        ([80, 90, 89.5, 70], 0.1, (0.1, 0.3)),
        ([90, 90, 88, 89.9], 0.03, (0.03, 0.1)),  # the last one is not a neighbour
        ([10, 20, 30, 40], 1.0, (1.0, 1.0)),
        ([50, 50, 50, 50], 0.03, (0.03, 1.0)),
    ],
)
def test_best_rate_and_window(accuracies, best, window):
    tuning = [make_result(rate, accuracy) for rate, accuracy in zip((0.03, 0.1, 0.3, 1.0), accuracies, strict=True)]
    assert runs.best_rate(tuning[::-1]) == best
    assert runs.window(tuning[::-1]) == window


def test_a_run_that_diverged_is_never_the_best():
    assert runs.best_rate([make_result(0.1, 20.0), make_result(0.3, 95.0, loss=math.nan)]) == 0.1


def test_the_commit_of_a_row(tmp_path, monkeypatch):
    """Of the programs and the library: what a program writes to its results is no change of the code."""
    programs, library = tmp_path / "experiments", tmp_path / "bnp_optax"
    for path in (programs / "runs.py", programs / "results" / "e1.csv", library / "bnp.py"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def git(*arguments):
        author = ["-c", "user.name=Anyone", "-c", "user.email=any@one", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *author, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603

    monkeypatch.setattr(runs, "__file__", str(programs / "runs.py"))
    git("init")
    git("add", ".")
    git("commit", "-m", "All of it")
    code = git("log", "-1", "--format=%h")
    assert runs.commit() == code
    (programs / "results" / "e1.csv").write_text("more\n")
    assert runs.commit() == code
    git("commit", "-a", "-m", "More results")
    assert runs.commit() == code
    for path in (library / "bnp.py", programs / "runs.py"):
        path.write_text("changed\n")
        assert runs.commit() == f"{code}+"
        git("checkout", str(path))
    monkeypatch.setattr(runs, "__file__", str(tmp_path.parent / "nowhere" / "runs.py"))
    assert runs.commit() == "unknown"
