"""Displacements fade and stay within their limit; of adapters it is the product that counts."""

from __future__ import annotations

import pytest
import torch
from helpers.models import layer_of, make_vit
from helpers.rows import Data
from helpers.training import make_trainer
from peft import LoraConfig
from torch import nn

from unsc_hf.nullspace.moments import SecondMoment
from unsc_hf.nullspace.projection import MOST_CHANGE, NullSpaceProjection
from unsc_hf.nullspace.rules import build_subspace


def _projection(identity: bool = False) -> tuple[nn.Linear, torch.Tensor, NullSpaceProjection]:
    rows, module = torch.randn(40, 3) @ torch.randn(3, 12), nn.Linear(12, 7)
    moment = SecondMoment.zeros(1, 12).update(rows[None])
    space = build_subspace({"0": {"layer": moment}}, {"layer": "layer"}, energy=1.0)
    return module, rows, NullSpaceProjection([layer_of(module)], space, identity)


@pytest.mark.parametrize("identity", [False, True])
def test_a_displacement_fades_by_the_stated_share(identity: bool) -> None:
    module, rows, projection = _projection(identity)
    start = module.weight.detach().clone()
    with torch.no_grad():
        module.weight += 0.01 * torch.randn(7, 12)
    projection.project_displacements()
    before = module.weight.detach() - start
    projection.project_displacements(decay=0.25)
    torch.testing.assert_close(module.weight.detach() - start, 0.75 * before, rtol=1e-3, atol=1e-6)
    moved = (rows @ (module.weight.detach() - start).T).norm() / (rows @ start.T).norm()
    assert (moved <= 1e-6) is not identity


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_no_displacement_is_longer_than_its_limit(decay: float) -> None:
    module, rows, projection = _projection()
    start, outputs = module.weight.detach().clone(), module(rows).detach()
    for size in (10.0, 1e4):
        with torch.no_grad():
            module.weight += size * torch.randn(7, 12)
        projection.project_displacements(decay=decay)
        length = float((module.weight.detach() - start).norm() / start.norm())
        assert length == pytest.approx(MOST_CHANGE, rel=1e-3)
        torch.testing.assert_close(module(rows).detach(), outputs, rtol=1e-4, atol=1e-4)
    within = module.weight.detach().clone()
    projection.project_displacements()
    torch.testing.assert_close(module.weight.detach(), within)


def test_weights_that_begin_at_zero_have_no_limit() -> None:
    module = nn.Linear(12, 7)
    nn.init.zeros_(module.weight)
    moment = SecondMoment.zeros(1, 12).update(torch.randn(1, 40, 3) @ torch.randn(3, 12))
    space = build_subspace({"0": {"layer": moment}}, {"layer": "layer"}, energy=1.0)
    projection = NullSpaceProjection([layer_of(module)], space)
    projection.project_displacements()
    assert not module.weight.any()
    with torch.no_grad():
        module.weight += torch.randn(7, 12)
    projection.project_displacements()
    assert bool(module.weight.any())
    assert bool(module.weight.isfinite().all())


def test_of_adapters_the_product_fades_and_is_limited(low_rank_data: Data, tmp_path: object) -> None:
    trainer = make_trainer(make_vit(), low_rank_data, tmp_path, peft_config=LoraConfig(r=4))  # type: ignore[arg-type]
    projection = trainer.prepare_unlearning().projection
    for weight in projection.free_weights().values():  # type: ignore[attr-defined]
        nn.init.normal_(weight, std=1e-4)
    projection.project_displacements()
    before = {layer.name: projection.change(layer).clone() for layer in projection.layers}
    projection.project_displacements(decay=0.5)
    for layer in projection.layers:
        torch.testing.assert_close(projection.change(layer), 0.5 * before[layer.name], rtol=1e-3, atol=1e-7)
    for weight in projection.free_weights().values():  # type: ignore[attr-defined]
        nn.init.normal_(weight, std=100.0)
    projection.project_displacements()
    for layer in projection.layers:
        share = float(projection.change(layer).norm() / projection.original(layer).norm())
        assert share == pytest.approx(MOST_CHANGE, rel=1e-3)
