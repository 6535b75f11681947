"""Audits: what a model still knows of forgotten classes, and what forgetting them cost; a few in each file.

Every module in this folder is imported, and registers itself with `@audit`.
"""

from __future__ import annotations

from ...utils.modules import import_modules
from .registry import AUDITS, Audit, Examination, Reading, audit, calibrate

import_modules(__name__, __path__)
for _name in sorted(AUDITS):  # tables list them in this order
    AUDITS[_name] = AUDITS.pop(_name)

__all__ = ["AUDITS", "Audit", "Examination", "Reading", "audit", "calibrate"]
