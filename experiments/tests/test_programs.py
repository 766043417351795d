"""Every program starts, from any folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = [path for path in Path(__file__).parent.parent.glob("*.py") if "__main__" in path.read_text()]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_help(program, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(program), "--help"]
    printed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)  # noqa: S603
    assert printed.stdout.startswith(f"usage: {program.name}")


def test_there_are_programs():
    assert {path.stem for path in PROGRAMS} >= {"digits", "figures", "paper", "report", "steps", "train"}
