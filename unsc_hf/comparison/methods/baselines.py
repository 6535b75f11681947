"""Baselines that are one objective of the trainer, without projection."""

from __future__ import annotations

from .registry import trainer_method

# Minimise the loss on retained rows for 100 steps, or until the forget rows are no longer recognised
# (Warnecke et al., arXiv 2108.11577; "FT" in Golatkar et al., arXiv 1911.04933).
trainer_method(
    "fine_tune", "fine-tune on retained", [{"learning_rate": rate} for rate in (1e-4, 3e-4, 1e-3)],
    null_space="none", objective="fine_tune", lr_doubling_steps=None, max_steps=100,
)  # fmt: skip

# Minimise the loss of random other labels on the forget rows
# (Graves et al., "Amnesiac Machine Learning", arXiv 2010.10981, section 4.1; Golatkar et al., 1911.04933).
trainer_method("random_label", "random label", null_space="none", pseudo_labels="random")

# Maximise the loss of the true labels on the forget rows
# (Thudi et al., "Unrolling SGD", arXiv 2109.13398; Graves et al., arXiv 2010.10981).
trainer_method("gradient_ascent", "gradient ascent", null_space="none", objective="gradient_ascent")

# Minimise the loss on retained rows minus the loss on forget rows (Kurmanji et al., arXiv 2302.09880, section 5).
trainer_method("neggrad_plus", "NegGrad+", null_space="none", objective="gradient_difference")

# Stay near the original's outputs on retained rows and far from them on forget rows; see `objectives.scrub`
# (Kurmanji et al., "Towards Unbounded Machine Unlearning", arXiv 2302.09880, equation 3).
trainer_method("scrub", "SCRUB", null_space="none", objective="scrub")
