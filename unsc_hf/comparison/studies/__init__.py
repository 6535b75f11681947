"""Named studies of unlearning by null-space calibration: one file each, run by `recipes/ablate.py`."""

from __future__ import annotations

import importlib
import pkgutil

from .lab import Lab
from .registry import STUDIES, Study, register

for _module in sorted(found.name for found in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")

_ORDER = (
    "null-space",
    "pseudo-labels",
    "rank",
    "calibration",
    "first-order",
    "many-classes",
    "requests",
    "poison",
    "features",
)
for _name in [*(name for name in _ORDER if name in STUDIES), *(name for name in STUDIES if name not in _ORDER)]:
    STUDIES[_name] = STUDIES.pop(_name)

__all__ = ["STUDIES", "Lab", "Study", "register"]
