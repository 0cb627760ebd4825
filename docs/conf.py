"""Sphinx configuration: MyST pages, Furo, and the docstrings of the public names."""

import os
from itertools import groupby

from lightning_dp.version import __version__

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the tutorials' kernels: their networks are too small for two threads

project = "lightning_dp"
author = "the lightning_dp authors"
copyright = "2026, the lightning_dp authors"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",  # formulas without a network: MathJax lies beside the pages
    "sphinx_copybutton",
    "sphinx_design",
]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_execution_in_temp = True
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wrap.css"]
html_title = f"lightning_dp {release}"


def show_tables_as_written(app, what, name, obj, options, lines):
    """Tables of edge cases in docstrings use bars, which reStructuredText would read as something else."""
    shown = []
    for is_table, block in groupby(lines, key=lambda line: line.startswith("|")):
        block = list(block)
        shown += ["::", "", *(f"   {line}" for line in block), ""] if is_table else block
    lines[:] = shown


def setup(app):
    app.connect("autodoc-process-docstring", show_tables_as_written)
