"""Objectives that read features: unbiased, blind to what the classes vary by, and exact for retained rows as any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.models import make_vit
from helpers.training import logits, make_trainer

from unsc_hf import ActivationStatistics, UNSCError
from unsc_hf.erasure.class_statistics import ClassStatistics, feature_targets
from unsc_hf.models.outputs import Outputs
from unsc_hf.objectives import OBJECTIVES, Terms
from unsc_hf.objectives.adversarial_probe import adversarial_probe
from unsc_hf.objectives.unsc import unsc
from unsc_hf.objectives.whitened import mean_distance, variance_distance, whitened_covariances, whitened_means

Data = tuple[Dataset, Dataset]


FEATURES = [name for name, objective in OBJECTIVES.items() if objective.features]


def _terms(features: torch.Tensor, targets: torch.Tensor, width: int = 6) -> Terms:
    """Terms of rows beside three classes at 3 e_k, with large and small variances."""
    scales = torch.logspace(-0.3, 0.3, width)
    labels = torch.arange(3000) % 3
    kept = 3 * torch.eye(3, width)[labels] + torch.randn(3000, width) * scales
    found = feature_targets(ClassStatistics.of([Outputs(kept, kept, labels)]))
    none = torch.zeros(len(features), dtype=torch.long)
    return Terms(
        torch.zeros(len(features), 4), none + 3, targets, none, none.float(), features=features, feature_targets=found
    )


def _like(labels: torch.Tensor, shift: float = 0.0, width: int = 6) -> torch.Tensor:
    """Rows that are distributed as the classes are, but for a shift in the direction of least variance."""
    rows = 3 * torch.eye(3, width)[labels] + torch.randn(len(labels), width) * torch.logspace(-0.3, 0.3, width)
    rows[:, 0] += shift
    return rows


def test_mean_distance_is_unbiased_and_sees_small_directions() -> None:
    labels = torch.arange(64) % 2
    same = torch.stack([mean_distance(_terms(_like(labels), labels)) for _ in range(30)])
    assert abs(float(same.mean())) < 4 * float(same.std()) / 30**0.5 + 0.02
    assert (
        float(mean_distance(_terms(_like(labels, 1.5), labels))) > 4
    )  # three of that direction's standard deviations, squared


def test_variance_distance() -> None:
    labels = torch.arange(2000) % 2
    assert float(variance_distance(_terms(_like(labels), labels))) < 0.05
    assert float(variance_distance(_terms(0.1 * _like(labels), labels))) > 0.5
    terms = _terms(_like(labels), labels)
    assert torch.allclose(
        whitened_covariances(terms) - whitened_means(terms), terms.feature_weight * variance_distance(terms), atol=1e-5
    )


def test_the_probe_asks_more_of_rows_that_can_be_told_apart() -> None:
    labels = (torch.arange(200) // 2) % 2
    alike, apart = (
        adversarial_probe(terms) - unsc(terms) for terms in (_terms(_like(labels, s), labels) for s in (0.0, 1.5))
    )
    assert float(apart) > 1.5 * float(alike)
    features = _like(labels, 1.5).requires_grad_()
    (gradient,) = torch.autograd.grad(adversarial_probe(_terms(features, labels)), features)
    assert float(gradient[:, 0].mean()) > 0  # a descent takes the shift away


def test_soft_targets_and_one_group() -> None:
    labels = torch.arange(64) % 2
    soft = 0.6 * torch.eye(4)[labels] + 0.1
    features = _like(labels)
    terms = _terms(features, soft)
    assert torch.equal(mean_distance(terms), mean_distance(replace(terms, targets=labels)))
    with pytest.raises(TypeError, match="features=True"):
        mean_distance(Terms(torch.zeros(2, 3), labels[:2], labels[:2], labels[:2], torch.zeros(2)))


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("adapters", [False, True])
def test_retained_outputs_do_not_move(name: str, adapters: bool, exact_data: Data, tmp_path: Path) -> None:
    from peft import LoraConfig

    forget, retain = exact_data
    model = make_vit(labels=10)
    before, before_forget = logits(model, retain), logits(model, forget)
    more: dict[str, Any] = {"trainer_kwargs": {"peft_config": LoraConfig(r=4)}} if adapters else {}
    trainer = make_trainer(model, exact_data, tmp_path, check_steps=100, objective=name, learning_rate=2e-4, **more)
    trainer.train()
    network = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    assert float((logits(network, retain) - before).norm() / before.norm()) <= 1e-6
    assert float((logits(network, forget) - before_forget).norm() / before_forget.norm()) > 0.001


def test_class_statistics_lie_beside_the_second_moments(exact_data: Data, tmp_path: Path) -> None:
    _, retain = exact_data
    model = make_vit(labels=10)
    folder = tmp_path / "statistics"
    ActivationStatistics.collect(model, retain, progress=False).save_pretrained(folder)
    for _ in range(2):  # written, then read
        trainer = make_trainer(
            model, exact_data, tmp_path / "out", objective="whitened_means",
            statistics=str(folder),
        )  # fmt: skip
        plan = trainer.prepare_unlearning()
        found = ClassStatistics.from_pretrained(folder)
        assert set(found.classes) == {0, 1}
        assert found.fingerprint.weights == plan.original_weights
    other = make_vit(labels=10)
    ActivationStatistics.collect(other, retain, progress=False).save_pretrained(folder)
    trainer = make_trainer(other, exact_data, tmp_path / "out", objective="whitened_means", statistics=str(folder))
    with pytest.raises(UNSCError, match="class_statistics: collected from weights"):
        trainer.prepare_unlearning()


def test_a_single_retained_class(tmp_path: Path) -> None:
    from helpers.rows import tensor_dataset

    forget = tensor_dataset(torch.randn(40, 3, 8, 8), [2] * 40)
    retain = tensor_dataset(torch.randn(40, 3, 8, 8), [0] * 40).cast(forget.features)
    trainer = make_trainer(make_vit(), (forget, retain), tmp_path, objective="whitened_means", energy=0.9)
    with pytest.raises(UNSCError, match="retain_dataset: holds a single class"):
        trainer.train()
