"""Methods of unlearning on the same workbench: same data, same weights trained, same stopping rule.

Each is one small file. Every module in this folder is imported and registers itself with `@method`; a file of your own
does the same (see docs/architecture.md). The order is that of tables and of work: quick methods come last.
"""

from __future__ import annotations

from ...utils.modules import import_modules
from ..workbench import Workbench
from .registry import LEARNING_RATES, METHODS, Method, method

import_modules(__name__, __path__, ("unsc", "masked", "baselines", "salun", "boundary"))

__all__ = ["LEARNING_RATES", "METHODS", "Method", "Workbench", "method"]
