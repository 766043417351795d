"""Runs the code of the documentation, as pytest runs the tests."""

import hypothesis
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=["*.md"]).pytest()

hypothesis.settings.register_profile("bnp", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("bnp")
