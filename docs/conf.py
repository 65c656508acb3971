"""Settings of the documentation: Sphinx, MyST, Furo.  A warning fails the build."""

from pygments.lexers.special import OutputLexer
from sphinx.highlighting import lexers

from aiouffd import __version__

project = "aiouffd"
author = "the aiouffd authors"
project_copyright = author
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
# Several classes have an attribute named ``bytes``, and some modules a Place: where a type of that
# name stands in a signature Sphinx does not know which is meant, and asks.
suppress_warnings = ["ref.python"]

lexers["sample"] = OutputLexer()  # what a run has printed, of which only the words are checked

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# Importing aiouffd needs no Linux and no rights, so neither do these pages.
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True
add_module_names = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"aiouffd {release}"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
