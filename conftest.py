"""Runs the code of the documentation as tests, and adds the options of the tests."""

import hypothesis
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=["*.md"]).pytest()

hypothesis.settings.register_profile("bnp", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("bnp")


def pytest_addoption(parser):
    """Lets `--fuzz-cases` run more random networks than CI does."""
    parser.addoption("--fuzz-cases", type=int, default=200, help="how many random networks tests/test_fuzz.py tries")
