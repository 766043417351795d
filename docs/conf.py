"""How Sphinx builds the documentation, whose pages lie in docs/ and, for the results, beside their CSV files."""

import importlib.metadata

project = "bnp_optax"
author = "The bnp_optax authors"
project_copyright = "2026, the bnp_optax authors"
version = release = importlib.metadata.version(project)

root_doc = "docs/index"
include_patterns = ["docs/**", "experiments/results/*.md", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = ["docs/_build"]
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4  # as GitHub makes them, so that links between pages are right in both places
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds a cell
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has them
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar, napoleon_use_rtype = True, False

html_theme = "furo"
html_title = "bnp_optax"
