"""sphinx-build -W docs build/docs"""

import os
import re

import fmn_ref

os.environ["COLUMNS"] = "79"  # of argparse's usage lines

project = "fmn_ref"
release = fmn_ref.__version__
html_title = f"fmn_ref {release}"
html_theme = "furo"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinxcontrib.autoprogram",
]
exclude_patterns = ["examples"]
autodoc_typehints = "none"  # the docstrings give shapes and dtypes
napoleon_google_docstring = False
napoleon_use_ivar = True
myst_heading_anchors = 3
myst_enable_extensions = ["deflist", "dollarmath"]
autodoc_mock_imports = ["keras", "lightning", "torchmetrics", "transformers", "accelerate", "safetensors"]
nb_execution_mode = "off"  # the tests run the notebook
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository


def link_to_files(app, docname, source):
    """Make links to Markdown files outside docs/ downloads: MyST would look for a page of the site."""
    source[0] = re.sub(r"\]\(((?:\.\./)+(?:benchmarks|csrc)/[^)]*\.md)\)", r"](path:\1)", source[0])


def setup(app):
    app.connect("source-read", link_to_files)
