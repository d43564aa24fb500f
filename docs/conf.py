"""Settings of the documentation: `python -m sphinx --fail-on-warning --nitpicky docs docs/_build/html`."""

from importlib.metadata import version as version_of

project = "pyro_avi"
author = "the pyro_avi authors"
version = release = version_of("pyro-avi")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]

html_theme = "furo"
html_show_copyright = False
html_title = f"pyro_avi {version}"

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

# Every block of code on these pages runs when they are built, and an error there fails the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
# Where tqdm says that it would like ipywidgets.
nb_output_stderr = "remove"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
# A list of attributes is text: those that are properties have entries of their own.
napoleon_use_ivar = True
# References to other projects' objects cannot be looked up without a network; ours must all resolve.
nitpick_ignore_regex = [("py:.*", r"(?!pyro_avi\.).*")]


def setup(app):
    """Connect what Sphinx has no setting for."""
    # Before napoleon, which runs at 500.
    app.connect("autodoc-process-docstring", _escape_stars, priority=400)


def _escape_stars(app, what, name, obj, options, lines):
    # Napoleon escapes the stars of one name at a time, and here one description serves both.
    lines[:] = [line.replace("*args, **kwargs:", r"\*args, \*\*kwargs:") for line in lines]
