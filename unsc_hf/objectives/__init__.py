"""What is minimised on the forget rows: one small file for each objective, chosen by name.

Every module in this folder is imported, and an objective registers itself with `@objective`. It runs under the same
projection whatever it is, so retained rows keep their outputs with each of them.
"""

from __future__ import annotations

from ..utils.modules import import_modules
from .registry import OBJECTIVES, Objective, objective
from .terms import Terms

import_modules(__name__, __path__)

__all__ = ["OBJECTIVES", "Objective", "Terms", "objective"]
