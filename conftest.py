"""Runs the code of the documentation as tests, and adds the options of the tests."""

import importlib.metadata
import os
import shutil
import tempfile

import hypothesis
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=["*.md"]).pytest()

# The tests' many small programs take longer to compile than to run, so JAX keeps them. It writes them in place, where
# another process may read half of one: every worker has its own folder, for as long as it lives.
COMPILED = tempfile.mkdtemp(prefix="bnp_optax-compiled-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# For the same reason XLA is to optimize little. Without optimizations its older emitters make the faster programs;
# later releases do not have them, and abort on a flag that they do not know.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"

hypothesis.settings.register_profile("bnp", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("bnp")


def pytest_addoption(parser):
    """Lets `--fuzz-cases` run more random networks than CI does."""
    parser.addoption("--fuzz-cases", type=int, default=50, help="how many random networks tests/test_fuzz.py tries")


def pytest_unconfigure():
    """Removes the compiled programs."""
    shutil.rmtree(COMPILED, ignore_errors=True)
