"""Audits: what a model still knows of forgotten classes, and what forgetting them cost; a few in each file.

Every module in this folder is imported, and registers itself with `@audit`.
"""

from __future__ import annotations

import importlib
import pkgutil

from .registry import AUDITS, Audit, Examination, Reading, audit, calibrate

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")
for _name in sorted(AUDITS):  # tables list them in this order
    AUDITS[_name] = AUDITS.pop(_name)

__all__ = ["AUDITS", "Audit", "Examination", "Reading", "audit", "calibrate"]
