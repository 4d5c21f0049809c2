"""The site, built by Sphinx from the pages of this folder, the notebooks, and docstrings."""

from pathlib import Path

from sphinx.application import Sphinx

import lit_compress

HERE = Path(__file__).parent

project = "lit-compress"
author = "the lit-compress authors"
release = version = lit_compress.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
templates_path = ["_templates"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "lit-compress"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]

myst_heading_anchors = 4  # links go to headings, as on GitHub
nb_execution_mode = "off"  # notebooks show the outputs that they hold; tests/test_notebooks.py runs them

autosummary_generate = True
autosummary_ignore_module_all = False  # the public names of a room are its `__all__`
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False  # hooks of Lightning are documented there
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape"]


def copy_notebooks(app: Sphinx) -> None:
    """Sphinx reads below this folder alone; notebooks stand beside it, and their links to pages are changed accordingly."""
    folder = HERE / "notebooks"
    folder.mkdir(exist_ok=True)
    for notebook in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
        text = notebook.read_text(encoding="utf-8").replace("](../docs/", "](../")
        (folder / notebook.name).write_text(text, encoding="utf-8")


def link_to_copies(app: Sphinx, name: str, source: list[str]) -> None:
    """Links of pages to notebooks, as the repository needs them, lead to the copies."""
    source[0] = source[0].replace("](../notebooks/", "](notebooks/")


def setup(app: Sphinx) -> None:
    """What Sphinx calls first."""
    app.connect("builder-inited", copy_notebooks, priority=100)  # before autosummary looks for pages
    app.connect("source-read", link_to_copies)
