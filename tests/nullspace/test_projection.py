"""Projectors equal the dense matrix they stand for; the leak equals what is measured on rows."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from helpers.models import layer_of
from torch import nn
from transformers.pytorch_utils import Conv1D

import unsc_hf
from unsc_hf.nullspace.moments import SecondMoment
from unsc_hf.nullspace.projection import NullSpaceProjection, Projector
from unsc_hf.nullspace.rules import build_subspace
from unsc_hf.nullspace.subspace import Subspace


def _space(rows: torch.Tensor, **options: object) -> Subspace:
    """Subspace of rows (groups, n, width)."""
    moment = SecondMoment.zeros(rows.shape[0], rows.shape[2]).update(rows)
    return build_subspace({"0": {"layer": moment}}, {"layer": "layer"}, energy=1.0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rank", "complement"), [(3, True), (9, False), (0, True)])
def test_thin_factor_is_the_smaller_one_and_equals_the_dense_projector(rank: int, complement: bool) -> None:
    rows = (torch.randn(1, 50, rank) @ torch.randn(1, rank, 12)) if rank else torch.zeros(1, 50, 12)
    layer = _space(rows)["layer"]
    projector = Projector.from_subspace(layer)
    assert projector.complement is complement
    assert projector.factor.shape[-1] == min(rank, 12 - rank)
    kept = layer.basis[0, :, :rank]
    dense = torch.eye(12, dtype=torch.float64) - kept @ kept.mT
    matrix = torch.randn(1, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(projector(matrix), matrix @ dense)
    torch.testing.assert_close(projector(projector(matrix)), projector(matrix))


def test_groups_of_different_rank() -> None:
    rows = torch.zeros(3, 40, 8)
    for g, rank in enumerate((1, 4, 8)):
        rows[g] = torch.randn(40, rank) @ torch.randn(rank, 8)
    layer = _space(rows)["layer"]
    assert layer.ranks == (1, 4, 8)
    projector = Projector.from_subspace(layer).to(torch.float32, torch.device("cpu"))
    moved = projector(torch.randn(3, 5, 8))
    assert (moved @ rows.mT).abs().max() < 1e-4
    assert moved[2].abs().max() < 1e-5


@pytest.mark.parametrize(
    "module", [nn.Linear(6, 5), Conv1D(5, 6), nn.Conv2d(4, 6, 3, padding=1, groups=2)], ids=lambda m: type(m).__name__
)
def test_outputs_on_retained_rows_stay_while_weights_move(module: nn.Module) -> None:
    layer = layer_of(module)
    x = torch.randn(30, 3) @ torch.randn(3, 6)
    if layer.geometry.kind == "conv2d":  # one pattern repeated everywhere: few distinct patches
        x = torch.randn(1, 4, 1, 1).expand(2, 4, 5, 5).contiguous()
    before = module(x).detach()
    projection = NullSpaceProjection([layer], _space(layer.rows(x)))
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight))
    projection.project_displacements()
    once = layer.weight.detach().clone()
    projection.project_displacements()
    torch.testing.assert_close(layer.weight.detach(), once, rtol=0, atol=1e-6)
    assert projection.relative_change() > 0.1
    assert (module(x) - before).abs().max() < 2e-5
    layer.weight.grad = torch.randn_like(layer.weight)
    projection.project_gradients()
    assert (layer.as_matrix(layer.weight.grad) @ layer.rows(x).mT).abs().max() < 2e-5
    projection.restore()
    assert torch.equal(module(x), before)


def test_leak_is_the_relative_change_of_outputs() -> None:
    linear = nn.Linear(8, 5, bias=False)
    layer = layer_of(linear)
    space = _space(torch.randn(1, 20, 3) @ torch.randn(1, 3, 8))
    projection = NullSpaceProjection([layer], space)
    x = torch.randn(50, 8)
    before = linear(x).detach()
    with torch.no_grad():
        linear.weight.add_(0.3 * torch.randn_like(linear.weight))
    moments = {"layer": SecondMoment.zeros(1, 8).update(x[None])}
    leak = projection.leak(moments, space.module_keys)
    assert leak.total == pytest.approx(float((linear(x) - before).norm() / before.norm()), rel=1e-4)
    assert leak.worst == ("layer", leak.per_layer["layer"])


def test_the_mathematics_does_not_import_transformers() -> None:
    files = [file for file in Path(unsc_hf.__file__).parent.joinpath("nullspace").glob("*.py") if file.stem != "lora"]
    assert len(files) > 8
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
        assert not any(name.split(".")[0] in ("transformers", "datasets", "peft", "accelerate") for name in modules)
