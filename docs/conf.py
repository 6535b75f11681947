"""The site: pages and docstrings, warnings are errors (`make docs`)."""

from unsc_hf import __version__

project = "unsc_hf"
author = "The unsc_hf authors"
project_copyright = "the unsc_hf authors, Apache-2.0"
release = __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
myst_heading_anchors = 3
default_role = "code"  # single backticks in docstrings
html_theme = "furo"
html_title = "unsc_hf"
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature says the types, the docstring what they mean
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_use_rtype = False
autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": "__init__"}
napoleon_use_ivar = True
napoleon_custom_sections = [
    (f"Parameters that {what}", "params_style")
    for what in (
        "control the subspace",
        "control the statistics",
        "control forgetting",
        "control forgetting in the features",
        "describe the data",
    )
]

# Attributes of several classes share a name (`flips`, `model`); a link between them would guess.
suppress_warnings = ["ref.python"]
