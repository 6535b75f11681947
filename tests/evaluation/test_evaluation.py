"""Attacks find what is planted, and nothing where nothing is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from unsc_hf import UNSCError
from unsc_hf.evaluation.accuracy import macro_accuracy, per_class_accuracy
from unsc_hf.evaluation.certificate import logit_drift
from unsc_hf.evaluation.membership import (
    accuracy_gap,
    attack_features,
    exposure,
    membership_inference,
    tolerated_exposure,
)
from unsc_hf.evaluation.probes import linear_probe, prototype_attack
from unsc_hf.models.outputs import Outputs, RowOutputs
from unsc_hf.trainer.checks import Check


def test_accuracies_are_per_class_and_macro() -> None:
    predictions, labels = [0, 0, 1, 2, 2], [0, 1, 1, 2, 2]
    assert per_class_accuracy(predictions, labels) == {0: 1.0, 1: 0.5, 2: 1.0}
    assert macro_accuracy(predictions, labels) == pytest.approx(5 / 6)
    assert macro_accuracy(np.eye(3)[predictions], labels, [1, 2]) == pytest.approx(0.75)
    assert macro_accuracy(predictions, labels, [7]) is None


def _logits(rows: int, confidence: float) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(4, (rows,))
    return torch.randn(rows, 4) + confidence * torch.eye(4)[labels], labels


def test_membership_attack_finds_members_and_is_blind_without_a_trace() -> None:
    leaky = membership_inference(_logits(800, 6.0), _logits(800, 1.0), _logits(800, 6.0), _logits(800, 1.0))
    assert leaky["auc"] > 0.9
    assert leaky["tpr_at_1pct_fpr"] > 0.1
    blind = membership_inference(_logits(800, 6.0), _logits(800, 1.0), _logits(2000, 1.0), _logits(2000, 1.0))
    assert blind["auc"] == pytest.approx(0.5, abs=0.06)
    assert blind["tpr_at_1pct_fpr"] < 0.05
    with pytest.raises(UNSCError, match="forget_test"):
        membership_inference(_logits(9, 1.0), _logits(9, 1.0), _logits(9, 1.0), _logits(0, 1.0))


def test_attack_features_by_hand_and_with_masked_logits() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])
    features = attack_features(logits, torch.tensor([0, 1]))
    np.testing.assert_allclose(features[0], [np.log(2), 0.5, np.log(2)], rtol=1e-6)
    assert np.isfinite(features).all()
    assert features[1, 0] > 40


def test_probe_and_prototypes_see_what_features_hold() -> None:
    centres = 4 * torch.randn(3, 10)
    labels = torch.arange(3).repeat(200)
    told = centres[labels] + torch.randn(600, 10)
    merged = centres[torch.where(labels == 2, 1, labels)] + torch.randn(600, 10)
    weight = centres.clone()
    weight[2] = -centres.sum(0)  # the head denies class 2
    for features, low, high in ((told, 0.9, 1.0), (merged, 0.2, 0.8)):
        probe = linear_probe(features[:300], labels[:300], features[300:], labels[300:], [2])
        assert low <= probe <= high
    forget, test = told[:300][labels[:300] == 2], told[300:][labels[300:] == 2]
    two = torch.full((100,), 2)
    seen, asked = (Outputs(torch.zeros(100, 4), part, two) for part in (forget, test))
    assert prototype_attack(RowOutputs(seen, seen, asked), (weight, None), [2], shots=10) > 0.7
    with pytest.raises(UNSCError, match="single class"):
        linear_probe(told[:2], two[:2], test, two, [2])


def test_logit_drift_by_hand() -> None:
    before = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    after = torch.tensor([[3.0, 2.0], [1.0, 0.0]])
    measured = logit_drift(before, after)
    assert measured.relative == pytest.approx(2 / 26**0.5)
    assert measured.largest == 2
    assert measured.agreement == 0.5
    with pytest.raises(UNSCError, match="same rows"):
        logit_drift(before, after[:1])


def test_exposure_is_the_auc_of_the_losses() -> None:
    seen, unseen = torch.rand(40).double(), torch.rand(70).double().sort().values
    labels = np.repeat([1, 0], [40, 70])
    auc = roc_auc_score(labels, -np.concatenate([seen.numpy(), unseen.numpy()]))
    assert exposure(seen, unseen) == pytest.approx(auc, abs=1e-12)
    assert exposure(torch.zeros(3).double(), torch.zeros(5).double()) == 0.5
    assert exposure(unseen[0] - torch.ones(2), unseen) == 1.0


def test_tolerated_exposure_is_a_standard_deviation_of_chance() -> None:
    unseen = torch.rand(2000).double().sort().values
    drawn = [exposure(torch.rand(12).double(), unseen) for _ in range(4000)]
    assert np.std(drawn) == pytest.approx(tolerated_exposure(12) - 0.5, rel=0.1)
    assert tolerated_exposure(10**6) == 0.51


def test_accuracy_gap_is_that_to_unseen_rows_and_asks_for_no_part_of_a_row() -> None:
    assert accuracy_gap(0.9, 0.8, 40) == pytest.approx(0.1)
    assert accuracy_gap(0.7, 0.8, 40) == pytest.approx(-0.1)
    assert accuracy_gap(1.0, 0.98, 2) == 0  # none of two has to be got wrong
    assert accuracy_gap(1.0, 0.98, 100) == 0.02
    assert accuracy_gap(0.5, 0.3, 2) == 0


@pytest.mark.parametrize(
    ("exposed", "gap", "reached"),
    [
        (0.53, -0.1, False),  # losses give them away
        (0.5, 0.01, False),  # known too often
        (0.5, 0.0, True),
        (0.47, 0.05, True),  # known worse than unseen ones already
        (None, None, False),  # by accuracy
    ],
)
def test_single_rows_are_forgotten_where_neither_losses_nor_accuracy_tell(
    exposed: float | None, gap: float | None, reached: bool
) -> None:
    assert Check(0.9, 0.1, 1.0, 0.0, exposed, gap).reached(0.52) is reached
