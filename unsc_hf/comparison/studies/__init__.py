"""Named studies of unlearning by null-space calibration: one file each, run by `recipes/ablate.py`."""

from __future__ import annotations

from ...utils.modules import import_modules
from .study import STUDIES, Lab, Panel, Point, Points, Study, study

import_modules(__name__, __path__, ("null_space", "pseudo_labels", "rank", "calibration", "first_order"))

__all__ = ["STUDIES", "Lab", "Panel", "Point", "Points", "Study", "study"]
