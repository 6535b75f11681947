"""Compiled models, half-precision autocast and activation checkpointing: each beside the plain run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import copied, make_vit
from helpers.rows import Data
from helpers.training import COMPILED, network_of, unlearned
from peft import LoraConfig
from torch import Tensor


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


def weights(model: Any, data: Data, folder: Path, adapters: bool = False, **options: Any) -> dict[str, Tensor]:
    options |= {"peft_config": LoraConfig(r=4)} if adapters else {}
    trainer = unlearned(copy.deepcopy(model), data, folder, energy=0.9, optim="sgd", check_steps=3, **options)
    return copied(network_of(trainer).named_parameters())


@pytest.mark.parametrize("adapters", [False, True], ids=["full weights", "adapters"])
@pytest.mark.parametrize(
    "options", [COMPILED, {"activation_checkpointing": True}], ids=["compiled", "activation checkpointing"]
)
def test_weights_of_the_plain_run(options: dict[str, Any], adapters: bool, low_rank_data: Data, tmp_path: Path) -> None:
    model = make_vit()
    plain = weights(model, low_rank_data, tmp_path / "plain", adapters)
    other = weights(model, low_rank_data, tmp_path / "other", adapters, **options)
    pairs = zip(plain.values(), model.parameters(), strict=False)
    assert any(not torch.equal(weight, start) for weight, start in pairs)
    for name, weight in plain.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-6)


def test_half_precision_goes_the_same_way(low_rank_data: Data, tmp_path: Path) -> None:
    """bfloat16 keeps eight bits of a gradient, so weights agree to a few percent of how far they moved."""
    model = make_vit()
    plain = weights(model, low_rank_data, tmp_path / "plain")
    half = weights(model, low_rank_data, tmp_path / "half", bf16=True)
    start = dict(model.named_parameters())
    moved = sum(float((plain[name] - start[name]).square().sum()) for name in plain) ** 0.5
    apart = sum(float((plain[name] - half[name]).square().sum()) for name in plain) ** 0.5
    assert 0 < apart <= 0.1 * moved


def test_statistics_after_another_model_of_the_class_was_compiled(low_rank_data: Data, tmp_path: Path) -> None:
    """Dynamo does not look at hooks again, not even on another instance: what is measured must not run compiled."""
    first = torch.compile(make_vit(), backend="aot_eager")
    first(pixel_values=torch.randn(2, 3, 8, 8))
    trainer = unlearned(make_vit(), low_rank_data, tmp_path, **COMPILED)
    assert all(float(moment.matrix.diagonal(dim1=-2, dim2=-1).sum()) > 0 for moment in trainer.plan.held_out.values())
