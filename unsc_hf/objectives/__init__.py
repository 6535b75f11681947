"""What is minimised on the forget rows: one small file per method, chosen by name.

An objective is a function of `Terms`. It runs under the same projection whatever it is, so retained rows keep their
outputs with each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .fine_tune import fine_tune
from .gradient_ascent import gradient_ascent
from .gradient_difference import gradient_difference
from .npo import npo
from .scrub import scrub
from .simnpo import simnpo
from .terms import Terms
from .unsc import unsc
from .unsc_distill import unsc_distill
from .unsc_retain import unsc_retain


@dataclass(frozen=True)
class Objective:
    """A method by its loss.

    Attributes:
        loss: scalar from the terms of a batch.
        retain: whether it reads retained rows in training too; UNSC does not.
        teacher: whether it compares with the original model's logits on forget rows; costs a second forward pass.
        retain_teacher: likewise on retained rows.
        mixed: whether its retained rows can be mixed with each other: it reads no label of theirs.
    """

    loss: Callable[[Terms], Tensor]
    retain: bool = False
    teacher: bool = False
    retain_teacher: bool = False
    mixed: bool = False

    @property
    def keeps_original(self) -> bool:
        """Whether a second, whole model stays in memory."""
        return self.teacher or self.retain_teacher


OBJECTIVES = {
    "unsc": Objective(unsc),
    "unsc_retain": Objective(unsc_retain, retain=True),
    "unsc_distill": Objective(unsc_distill, retain=True, retain_teacher=True, mixed=True),
    "gradient_ascent": Objective(gradient_ascent),
    "gradient_difference": Objective(gradient_difference, retain=True),
    "npo": Objective(npo),
    "simnpo": Objective(simnpo),
    "fine_tune": Objective(fine_tune, retain=True),
    "scrub": Objective(scrub, retain=True, teacher=True, retain_teacher=True),
}

__all__ = ["OBJECTIVES", "Objective", "Terms"]
