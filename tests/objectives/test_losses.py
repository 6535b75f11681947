"""Objectives under published names have the losses that open-unlearning's functions gave on the same logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unsc_hf.models.outputs import read_answers
from unsc_hf.objectives import OBJECTIVES, Terms
from unsc_hf.objectives.rmu import distance
from unsc_hf.objectives.terms import HiddenStates

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))


def refusals() -> dict[str, torch.Tensor]:
    """Log-likelihoods of the stored refusals."""
    given, sums = GOLDEN["refusals"], {}
    for name, logits in (("refusal", given["logits"]), ("refusal_reference", given["reference"])):
        flat = read_answers(torch.tensor(logits), torch.tensor(given["labels"]))
        bare = Terms(flat.logits, flat.labels, flat.labels, flat.need_samples(), torch.zeros(len(logits)))
        sums[name] = bare.log_likelihood()
    return sums


def golden_terms(labels: str) -> Terms:
    """The stored logits as a batch of forget rows beside one of retained rows."""
    true = torch.tensor(GOLDEN[labels])
    now, before = (read_answers(torch.tensor(GOLDEN[name]), true) for name in ("logits", "reference"))
    kept = read_answers(torch.tensor(GOLDEN["retain"]), torch.tensor(GOLDEN["retain_labels"]))
    original = Terms(before.logits, before.labels, before.labels, before.need_samples(), torch.zeros(len(true)))
    return Terms(
        now.logits, now.labels, now.labels, now.need_samples(), original.log_likelihood(),
        retain_loss=torch.nn.functional.cross_entropy(kept.logits, kept.labels), retain_logits=kept.logits,
        teacher=before.logits, **refusals(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "labels", "options"),
    [
        ("npo", "ragged", {}),
        ("simnpo", "ragged", {"delta": 0.25}),
        ("gradient_difference", "ragged", {}),
        ("idk_dpo", "ragged", {}),
        ("undial", "labels", {"retain_weight": 0.5}),  # every position is labelled: there is nothing to leave out
    ],
)
def test_losses_are_open_unlearnings(name: str, labels: str, options: dict[str, float]) -> None:
    objective = OBJECTIVES[name]
    loss = objective.loss(golden_terms(labels), objective.options(options))
    assert float(loss) == pytest.approx(GOLDEN["losses"][name], abs=1e-5)


def test_rmu_has_open_unlearnings_loss() -> None:
    given = GOLDEN["rmu"]
    states = [torch.tensor(given[name]) for name in ("forget", "retain", "original_retain")]
    masks = [torch.tensor(given[name]) for name in ("forget_mask", "retain_mask")]
    samples = [torch.arange(len(mask))[:, None].expand_as(mask)[mask] for mask in masks]
    hidden = HiddenStates(states[0][masks[0]], samples[0], states[1][masks[1]], samples[1], states[2][masks[1]])
    goal = torch.tensor(given["direction"])
    assert float(distance(hidden.forget, goal, samples[0])) == pytest.approx(given["forget_loss"], abs=1e-5)
    kept = float(distance(hidden.retain, hidden.original_retain, samples[1]))
    assert kept == pytest.approx(given["retain_loss"], abs=1e-5)
    terms = replace(golden_terms("ragged"), hidden=hidden)
    only_retain = OBJECTIVES["rmu"].loss(terms, OBJECTIVES["rmu"].options({"forget_weight": 0.0, "retain_weight": 2.0}))
    assert float(only_retain) == pytest.approx(2 * kept)
    with pytest.raises(TypeError, match="register it with 'hidden' in needs"):
        OBJECTIVES["rmu"].loss(golden_terms("ragged"))


def test_forget_terms_alone_have_names_of_their_own() -> None:
    terms = golden_terms("ragged")
    for name, options in (("npo", {"beta": 0.1}), ("simnpo", {"beta": 4.5, "forget_weight": 1.0})):
        whole = OBJECTIVES[name].loss(terms, OBJECTIVES[name].options({**options, "retain_weight": 0.0}))
        bare = OBJECTIVES[f"{name}_forget"]
        assert float(whole) == pytest.approx(float(bare.loss(terms, bare.options({"beta": options["beta"]}))))
