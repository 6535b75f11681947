"""Methods of unlearning on the same workbench: same data, same weights trained, same stopping rule.

Each is one small file. Every module in this folder is imported and registers itself with `@method`; a file of your own
does the same (see docs/compare.md). The order is that of tables and of work: quick methods come last.
"""

from __future__ import annotations

from ..plugins import import_modules, put_first
from ..workbench import Workbench
from .registry import LEARNING_RATES, METHODS, Method, method

import_modules(__name__, __path__)
put_first(
    METHODS,
    ("unsc", "unsc_erased", "no_null_space", "true_label_ascent", "random_pseudo_labels", "random_projector", "masked",
     "fine_tune", "random_label", "gradient_ascent", "neggrad_plus", "salun", "scrub", "boundary_shrink",
     "boundary_expand", "fisher", "ssd"),
)  # fmt: skip

__all__ = ["LEARNING_RATES", "METHODS", "Method", "Workbench", "method"]
