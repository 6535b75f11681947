"""Objectives under published names have the losses that open-unlearning's functions gave on the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unsc_hf.models.outputs import read_answers
from unsc_hf.objectives import OBJECTIVES, Terms

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))


def golden_terms(labels: str) -> Terms:
    """The stored logits as a batch of forget rows beside one of retained rows."""
    true = torch.tensor(GOLDEN[labels])
    now, before = (read_answers(torch.tensor(GOLDEN[name]), true) for name in ("logits", "reference"))
    kept = read_answers(torch.tensor(GOLDEN["retain"]), torch.tensor(GOLDEN["retain_labels"]))
    original = Terms(before.logits, before.labels, before.labels, before.need_samples(), torch.zeros(len(true)))
    return Terms(
        now.logits, now.labels, now.labels, now.need_samples(), original.log_likelihood(),
        retain_loss=torch.nn.functional.cross_entropy(kept.logits, kept.labels), retain_logits=kept.logits,
        teacher=before.logits,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "labels", "options"),
    [
        ("npo", "ragged", {}),
        ("simnpo", "ragged", {"delta": 0.25}),
        ("gradient_difference", "ragged", {}),
        ("undial", "labels", {"retain_weight": 0.5}),  # every position is labelled: there is nothing to leave out
    ],
)
def test_losses_are_open_unlearnings(name: str, labels: str, options: dict[str, float]) -> None:
    objective = OBJECTIVES[name]
    loss = objective.loss(golden_terms(labels), objective.options(options))
    assert float(loss) == pytest.approx(GOLDEN["losses"][name], abs=1e-5)


def test_forget_terms_alone_have_names_of_their_own() -> None:
    terms = golden_terms("ragged")
    for name, options in (("npo", {"beta": 0.1}), ("simnpo", {"beta": 4.5, "forget_weight": 1.0})):
        whole = OBJECTIVES[name].loss(terms, OBJECTIVES[name].options({**options, "retain_weight": 0.0}))
        bare = OBJECTIVES[f"{name}_forget"]
        assert float(whole) == pytest.approx(float(bare.loss(terms, bare.options({"beta": options["beta"]}))))
