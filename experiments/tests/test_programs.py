"""Every program starts, from any folder, and says in a line what its user has to mend."""

import dataclasses
import errno
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.table import Table

import programs
import runs
import sweeps
from programs import UserError

PROGRAMS = [path for path in Path(__file__).parent.parent.glob("*.py") if "__main__" in path.read_text()]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_help(program, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(program), "--help"]
    printed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)  # noqa: S603
    assert printed.stdout.startswith(f"usage: {program.name}")


def test_there_are_programs():
    assert {path.stem for path in PROGRAMS} >= {"digits", "figures", "paper", "report", "steps", "train"}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_ends_in_the_common_way(program):
    assert 'if __name__ == "__main__":' in program.read_text()
    assert program.read_text().endswith("    programs.start(main)\n")


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("what to do"), "what to do"),
        (FileNotFoundError("data is missing"), "data is missing"),
        (PermissionError(errno.EACCES, "Permission denied", "x.csv"), "x.csv: Permission denied"),
    ],
)
def test_what_a_user_caused_is_said_in_a_line(error, line):
    with pytest.raises(SystemExit) as ended:
        programs.start(raising(error))
    assert ended.value.code == line


@pytest.mark.parametrize("error", [ValueError("of the program"), TypeError("of the program")])
def test_errors_of_a_program_keep_their_traceback(error):
    with pytest.raises(type(error), match="of the program"):
        programs.start(raising(error))


def test_an_interrupt_says_how_to_go_on(capsys):
    with pytest.raises(SystemExit) as ended:
        programs.start(raising(KeyboardInterrupt("e1: 2 of 5 trainings are done and saved.")))
    assert ended.value.code == 130
    first, second = capsys.readouterr().err.splitlines()
    assert first == "Interrupted. e1: 2 of 5 trainings are done and saved."
    assert second.startswith("The same command goes on: ")
    assert sys.orig_argv[-1] in second
    with pytest.raises(SystemExit):
        programs.start(raising(KeyboardInterrupt()))
    assert capsys.readouterr().err.splitlines() == ["Interrupted. "]


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (programs.count, {"1": 1, "20": 20}, ["0", "-1", "1.5", "x", ""]),
        (programs.at_least(0), {"0": 0}, ["-1"]),
        (programs.positive, {"0.1": 0.1, "1e-9": 1e-9}, ["0", "-1", "nan", "inf", "x"]),
        (programs.between(0, 1), {"0": 0.0, "0.99": 0.99}, ["1", "-0.1", "nan"]),
    ],
)
def test_numbers(kind, good, bad, capsys):
    parser = programs.Parser(prog="program")
    parser.add_argument("--number", type=kind)
    assert {text: parser.parse_args(["--number", text]).number for text in good} == good
    for text in bad:
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(["--number", text])
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("program: argument --number: must be a ")
        assert f"not {text!r}" in line


def test_where_results_go(tmp_path, capsys):
    (tmp_path / "file").touch()
    parser = programs.Parser()
    parser.add_argument("--folder", type=programs.folder)
    parser.add_argument("--file", type=programs.file)
    new, page = tmp_path / "new" / "results", tmp_path / "new" / "x.csv"
    args = parser.parse_args(["--folder", str(new), "--file", str(page)])
    assert (args.folder, args.file) == (new, page)
    assert not new.parent.exists()
    for arguments, message in (
        (["--folder", str(tmp_path / "file")], "file is a file; expected a folder"),
        (["--folder", str(tmp_path / "file" / "results")], "file is a file; expected a folder"),
        (["--file", str(tmp_path)], "is a folder; expected a file"),
        (["--file", str(tmp_path / "file" / "x.csv")], "file is a file; expected a folder"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(arguments)
        assert message in capsys.readouterr().err


def test_the_nearest_name_is_told():
    names = ["batch_renorm", "bjorck"]
    assert programs.unknown("experiment", "batch-renorm", names) == (
        "no experiment 'batch-renorm' (did you mean 'batch_renorm'?); there are batch_renorm, bjorck"
    )
    assert programs.unknown("experiment", "e9", names) == "no experiment 'e9'; there are batch_renorm, bjorck"


def test_no_table_is_cut_where_there_is_no_terminal(capsys):
    table = Table(*(f"column {number}" for number in range(20)), caption="short")
    table.add_row(*(f"a cell that is number {number}" for number in range(20)))
    programs.show(table)
    text = capsys.readouterr().out
    assert all(f"a cell that is number {number}" in text for number in range(20))
    assert "…" not in text
    assert max(map(len, text.splitlines())) < 600  # as wide as the table, not as the line could be


def test_progress_has_a_rate_and_a_time_to_go():
    clock = iter(range(0, 10_000, 10))
    progress = programs.progress()
    progress.get_time = lambda: next(clock)
    task = progress.add_task("trainings", total=100, unit="steps")
    progress.advance(task, 20)  # was done before
    progress.advance(task, 5)
    (shown,) = progress.tasks
    text = programs.Pace().render(shown).plain
    assert "0.50 steps/s" in text  # 5 in 10 s
    assert "0:02:30 to go" in text  # 75 are left


@dataclasses.dataclass(frozen=True)
class Row:
    number: int


def interrupt_or_wait(row, path):
    """Does two, unless Ctrl-C would reach a worker; then there is one, while what is under way would take an hour."""
    if row.number < 2:
        return row if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else Row(-1)
    if row.number == 2:
        while not (path.exists() and path.read_text().count("\n") == 3):  # header and two rows
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(3600)
    return row


@pytest.fixture
def interrupts():
    """What Ctrl-C does outside of tests."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def test_an_interrupted_sweep_of_processes_goes_on(tmp_path, capfd, interrupts):
    path, todo = tmp_path / "rows.csv", [Row(number) for number in range(5)]

    def sweep(work, workers):
        done = {row: row for row in runs.read_rows(path, Row)}
        save = lambda row: runs.append_rows(path, [row])  # noqa: E731
        return sweeps.sweep(todo, work, done, save, title="rows", workers=workers)

    with pytest.raises(KeyboardInterrupt, match=r"rows: 2 of 5 trainings are done and saved\."):
        sweep(functools.partial(interrupt_or_wait, path=path), workers=2)
    assert "Traceback" not in capfd.readouterr().err
    assert not multiprocessing.active_children()
    assert set(runs.read_rows(path, Row)) == set(todo[:2])
    assert sweep(lambda row, advance: row, workers=1) == todo
    assert sorted(row.number for row in runs.read_rows(path, Row)) == [0, 1, 2, 3, 4]


def kill_self(row):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_was_killed_is_told():
    with pytest.raises(UserError, match="fewer --workers"):
        sweeps.sweep([Row(0)], kill_self, {}, print, title="rows", workers=2)
