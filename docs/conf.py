"""How Sphinx builds the site: `make docs`."""

import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import rst
import rule_pages

import mmfast

project = "mmfast"
author = "mmfast developers"
copyright = author
release = version = mmfast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["**/__pycache__"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
highlight_language = "none"  # of indented blocks: shell lines, Python and formulas stand in them

autodoc_typehints = "none"  # docstrings say what each argument is
autodoc_default_options = {"exclude-members": "extra_repr"}
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_use_ivar = True
add_module_names = False

html_theme = "furo"
html_title = f"mmfast {release}"
html_show_sphinx = False
html_copy_source = False
html_domain_indices = False


def setup(app) -> None:
    warnings.filterwarnings("ignore", "mmfast runs in plain torch")  # without a compiler the pages come out alike, later
    app.connect("builder-inited", lambda app: rule_pages.write())
    app.connect("autodoc-process-docstring", rst.from_plain, priority=400)  # before napoleon
