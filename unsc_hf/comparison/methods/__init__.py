"""Methods of unlearning, one small file each, on the same workbench: same data, same weights trained, same stopping rule.

Every module in this folder is imported, and registers itself with `@method`; a file of your own does the same (see
docs/compare.md). The order here is that of tables, and of work: descents, then what is quick, which fills the gaps at the end.
"""

from __future__ import annotations

import importlib
import pkgutil

from ..workbench import Workbench
from .registry import LEARNING_RATES, METHODS, Method, method

for _module in sorted(found.name for found in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")

_FIRST = ("unsc", "unsc_erased", "no_null_space", "true_label_ascent", "random_pseudo_labels", "random_projector", "masked", "fine_tune",
          "random_label", "gradient_ascent", "neggrad_plus", "salun", "scrub", "boundary_shrink", "boundary_expand", "fisher",
          "ssd")  # fmt: skip
_order = [*(name for name in _FIRST if name in METHODS), *(name for name in METHODS if name not in _FIRST)]
for _name in _order:
    METHODS[_name] = METHODS.pop(_name)

__all__ = ["LEARNING_RATES", "METHODS", "Method", "Workbench", "method"]
