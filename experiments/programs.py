"""What all programs have in common: how they take arguments, show tables and progress, and end."""

import argparse
import datetime
import difflib
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.text import Text

WIDEST = 1000  # characters of a line that goes to no terminal


class UserError(ValueError):
    """What the user of a program has caused, and can mend; its message says how."""


def start(main: Callable[[], object]) -> None:
    """Runs a program, which says in a line what its user has caused; its own errors keep their tracebacks.

    Raises:
      SystemExit: with the status 1 where a user's files or arguments do not serve, with 130 after Ctrl-C.
    """
    try:
        main()
    except KeyboardInterrupt as interrupt:
        print(f"Interrupted. {interrupt}", file=sys.stderr)
        if interrupt.args:
            print(f"The same command goes on: {shlex.join(sys.orig_argv)}", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        raise SystemExit(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from None


class Parser(argparse.ArgumentParser):
    """A parser of arguments that says in one line what is wrong with them."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with the status 2."""
        self.exit(2, f"{self.prog}: {message} (--help explains the options)\n")


def at_least(lowest: int) -> Callable[[str], int]:
    """Returns the type of an argument that is a whole number."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {lowest}, not {text!r}")
        return value

    return number


count = at_least(1)


def between(lowest: float, below: float, *, open_below: bool = False) -> Callable[[str], float]:
    """Returns the type of an argument that is a number from ``lowest``, or beyond it, to below ``below``."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not lowest <= value < below or (open_below and value == lowest):
            start = f"greater than {lowest:g}" if open_below else f"of at least {lowest:g}"
            end = f" and less than {below:g}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"must be a number {start}{end}, not {text!r}")
        return value

    return number


positive = between(0, math.inf, open_below=True)


def folder(text: str) -> Path:
    """Returns an argument that is a folder to write to, whether it exists yet or not."""
    path = Path(text)
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise argparse.ArgumentTypeError(f"{existing} is a file; expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"no permission to write to {existing}")
    return path


def file(text: str) -> Path:
    """Returns an argument that is a file to write, whether it exists yet or not."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; expected a file")
    folder(str(path.parent))
    return path


def unknown(what: str, name: str, names: Sequence[str]) -> str:
    """Returns a sentence about a name that there is not, with the nearest one that there is."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"no {what} {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}; there are {', '.join(names)}"


def show(table: RenderableType) -> None:
    """Prints a table; where the output is no terminal, in lines as long as it takes, so that nothing is cut."""
    Console(width=None if sys.stdout.isatty() else WIDEST).print(table)


class Pace(ProgressColumn):
    """How long it has taken, how long it will, and how fast it goes."""

    def render(self, task: Task) -> Text:
        """Returns the text of the column."""
        taken, left, speed = task.finished_time or task.elapsed, task.time_remaining, task.finished_speed or task.speed
        parts = [str(datetime.timedelta(seconds=int(taken or 0)))]
        if speed:
            parts += [f"{speed:.{0 if speed >= 10 else 2}f} {task.fields['unit']}/s"]
        if not task.finished:
            parts += [f"{datetime.timedelta(seconds=left)} to go" if left else "-:--:-- to go"]
        return Text(", ".join(parts))


def progress() -> Progress:
    """Returns a bar, on the standard error so that a table can be piped; each of its tasks has a ``unit``.

    What one task is made of may take an hour, so its speed is that of the last ten hours.
    """
    columns = (TextColumn("{task.description}"), BarColumn(20), TaskProgressColumn(), Pace())
    return Progress(*columns, console=Console(stderr=True), speed_estimate_period=36_000)
