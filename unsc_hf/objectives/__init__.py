"""What is minimised on the forget rows: one small file for each objective, chosen by name.

Every module in this folder is imported, and an objective registers itself with `@objective`. It runs under the same
projection whatever it is, so retained rows keep their outputs with each of them.
"""

from __future__ import annotations

import importlib
import pkgutil

from .registry import OBJECTIVES, Objective, objective
from .terms import Terms

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")

__all__ = ["OBJECTIVES", "Objective", "Terms", "objective"]
