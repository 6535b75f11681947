"""Named studies of unlearning by null-space calibration: one file each, run by `recipes/ablate.py`."""

from __future__ import annotations

from ..plugins import import_modules, put_first
from .study import STUDIES, Lab, Panel, Point, Points, Study, study

import_modules(__name__, __path__)
put_first(
    STUDIES,
    ("null-space", "pseudo-labels", "rank", "calibration", "first-order", "many-classes", "requests", "poison"),
)  # fmt: skip

__all__ = ["STUDIES", "Lab", "Panel", "Point", "Points", "Study", "study"]
