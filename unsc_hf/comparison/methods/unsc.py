"""UNSC: re-labelled forget rows under the null-space projection (arXiv 2404.13588, algorithm 1).

Beside it the same with one part replaced: no null space, a random one of equal rank, or other labels.
"""

from __future__ import annotations

from .registry import trainer_method

# "unsc_retain" also rehearses retained rows.
SETTINGS: tuple[dict[str, object], ...] = ({}, {"objective": "unsc_retain"}, {"learning_rate": 3e-4})

trainer_method("unsc", "UNSC", SETTINGS)

trainer_method("no_null_space", "UNSC, no projection", SETTINGS, null_space="none")

# A random subspace of the same rank in every layer.
trainer_method("random_projector", "UNSC, random subspace", SETTINGS, null_space="random")

# The projection, with labels drawn at random from the remaining classes.
trainer_method("random_pseudo_labels", "UNSC, random labels", SETTINGS, pseudo_labels="random")

# The projection, with ascent on the true labels instead of pseudo-labels.
ascents = ({"objective": "gradient_ascent"}, {"objective": "gradient_difference"})
trainer_method("true_label_ascent", "UNSC, true-label ascent", (*ascents, {**ascents[0], "learning_rate": 3e-5}))
