"""What is fixed before the first step of unlearning."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..models.layers import LayerSelection
from ..nullspace.moments import SecondMoment
from ..nullspace.projection import NullSpaceProjection
from ..nullspace.subspace import Subspace
from ..tasks.base import Measure


@dataclass
class UnlearningPlan:
    """Everything that is fixed before the first step, computed from the original model.

    Attributes:
        selection: the layers that are trained, and why every other parameter is frozen.
        subspace: retained subspace and null space of each layer input.
        projection: projectors and starting weights.
        held_out: second moments of held-out retained rows, for the leak; in `train` the large ones are in files in
            `output_dir`.
        forgotten_classes: class ids that occur among the forget rows but not among the retained ones.
        remaining_classes: class ids that occur among the retained rows.
        pseudo_labels: new label (or distribution) of each forget row that is trained on; None for language models, where
            each answer token has its own.
        original_weights: hash of the original model's weights.
        held_out_logits: the original model's logits on the held-out retained rows.
        target: unlearning stops when the forget rows are known no better than this: a share of them that is recognised, or of
            single rows of a classifier their exposure (see `evaluation.membership.exposure`), and their accuracy no higher than unseen rows'.
        unseen: the unseen rows under the original model, losses sorted, where exposure is the target; with rehearsal checks read
            them anew.
        seconds: time spent on "statistics", "decomposition" and "pseudo_labels".
    """

    selection: LayerSelection
    subspace: Subspace
    projection: NullSpaceProjection
    held_out: dict[str, SecondMoment]
    forgotten_classes: list[int]
    remaining_classes: list[int]
    pseudo_labels: Tensor | None
    original_weights: str
    held_out_logits: Tensor
    target: float
    unseen: Measure | None
    seconds: dict[str, float]
