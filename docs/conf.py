"""sphinx-build -W docs build/docs"""

import inspect
import os
import re

from sphinx.util.inspect import stringify_signature

import fmn_ref

os.environ["COLUMNS"] = "79"  # of argparse's usage lines

project = "fmn_ref"
release = fmn_ref.__version__
html_title = f"fmn_ref {release}"
html_theme = "furo"
html_show_copyright = False
highlight_language = "none"  # commands and output; Python is named
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
autodoc_mock_imports = [
    "accelerate",
    "h5py",
    "keras",
    "lightning",
    "peft",
    "safetensors",
    "torchmetrics",
    "transformers",
]
napoleon_google_docstring = False
napoleon_use_ivar = True
myst_enable_extensions = ["alert", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests run the notebook


def link_to_files(app, docname, source):
    """Turn links to Markdown files outside docs/ into downloads: MyST would look for a page of the site."""
    source[0] = re.sub(r"\]\(((?:\.\./)+(?:benchmarks|csrc)/[^)]*\.md)\)", r"](path:\1)", source[0])


def signature_of_init(app, what, name, obj, options, signature, return_annotation):
    """Show the arguments of a class whose base class is mocked: the mock hides them."""
    if what == "class" and signature == "(*args, **kwargs)":
        own = inspect.signature(obj.__init__)
        own = own.replace(parameters=list(own.parameters.values())[1:])
        return stringify_signature(own, show_annotation=False, show_return_annotation=False), None
    return None


def setup(app):
    app.connect("source-read", link_to_files)
    app.connect("autodoc-process-signature", signature_of_init)
