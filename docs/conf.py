"""sphinx-build -W docs build/docs"""

import fmn_ref

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
]
exclude_patterns = ["examples"]
autodoc_typehints = "none"  # the docstrings give shapes and dtypes
autodoc_mock_imports = [
    "accelerate",
    "keras",
    "lightning",
    "safetensors",
    "torchmetrics",
    "transformers",
]
napoleon_google_docstring = False
napoleon_use_ivar = True
myst_enable_extensions = ["alert", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests run the notebook
