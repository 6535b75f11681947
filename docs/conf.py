"""The site: pages and docstrings, warnings are errors (`make docs`)."""

import sys
from pathlib import Path

from unsc_hf import __version__

sys.path.insert(0, str(Path(__file__).parent / "_tools"))

project = "unsc_hf"
author = "The unsc_hf authors"
project_copyright = "the unsc_hf authors, Apache-2.0"
release = __version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_design",
    "options",
]
exclude_patterns = ["_build", "_tools"]
default_role = "code"  # single backticks in docstrings
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "unsc_hf"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"sidebar_hide_name": False, "navigation_with_keys": True}
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_default_options = {"exclude-members": "__init__"}
python_use_unqualified_type_names = True
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [
    (f"Parameters that {what}", "params_style")
    for what in (
        "control the subspace",
        "control the statistics",
        "control forgetting",
        "describe the data",
    )
]

# Attributes of several classes share a name (`flips`, `model`); a link between them would guess.
suppress_warnings = ["ref.python"]
