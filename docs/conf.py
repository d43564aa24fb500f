"""Settings of the documentation: `python -m sphinx --fail-on-warning --nitpicky docs docs/_build/html`."""

from importlib.metadata import version as version_of

project = "pyro_avi"
author = "the pyro_avi authors"
version = release = version_of("pyro-avi")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
# The results are committed when a sweep has been run; without any there is nothing to list.
suppress_warnings = ["toc.empty_glob"]

html_theme = "furo"
html_title = f"pyro_avi {version}"

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

# Every block of code on these pages runs when they are built, and an error there fails the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"
# References to other projects' objects cannot be looked up without a network; ours must all resolve.
nitpick_ignore_regex = [("py:.*", r"(?!pyro_avi\.).*")]
