"""UNSC: re-labelled forget rows under the null-space projection (arXiv 2404.13588, algorithm 1).

Beside it the same with one part replaced: no null space, a random one of equal rank, or other labels.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..workbench import Workbench
from .registry import method

SETTINGS: tuple[dict[str, Any], ...] = ({}, {"objective": "unsc_retain"}, {"learning_rate": 3e-4})


@method("UNSC", SETTINGS)
def unsc(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """Descend towards pseudo-labels inside the null space; `objective="unsc_retain"` also rehearses retained rows."""
    return bench.unlearn(**settings)


@method("UNSC, features erased", SETTINGS)
def unsc_erased(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """UNSC, then what a linear probe reads of the features is erased in closed form, at the default strength.

    The construction is LEACE's (Belrose et al., arXiv 2306.03819), in every layer that writes the features.
    """
    return bench.unlearn(feature_erasure="layers", **settings)


@method("UNSC, no projection", SETTINGS)
def no_null_space(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """The same pseudo-labels, and no projection."""
    return bench.unlearn(null_space="none", **settings)


@method("UNSC, random subspace", SETTINGS)
def random_projector(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """The same pseudo-labels under a random subspace of the same rank in every layer."""
    return bench.unlearn(null_space="random", **settings)


@method("UNSC, random labels", SETTINGS)
def random_pseudo_labels(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """The projection, with labels drawn at random from the remaining classes."""
    return bench.unlearn(pseudo_labels="random", **settings)


@method(
    "UNSC, true-label ascent",
    (
        {"objective": "gradient_ascent"},
        {"objective": "gradient_difference"},
        {"objective": "gradient_ascent", "learning_rate": 3e-5},
    ),
)
def true_label_ascent(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """The projection, with ascent on the true labels instead of pseudo-labels."""
    return bench.unlearn(**settings)
