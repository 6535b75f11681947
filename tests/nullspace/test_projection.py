"""Projectors equal the dense matrix they stand for; the leak equals what is measured on rows. Displacements fade and
stay within their limit; of adapters it is the product that counts."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from helpers.models import layer_of, make_vit
from helpers.rows import Data
from helpers.training import make_trainer
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

import unsc_hf
from unsc_hf.nullspace.moments import SecondMoment
from unsc_hf.nullspace.projection import MOST_CHANGE, NullSpaceProjection, Projector
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


def _projection(identity: bool = False) -> tuple[nn.Linear, torch.Tensor, NullSpaceProjection]:
    """A layer, rows that it keeps, and its projection."""
    rows, module = torch.randn(40, 3) @ torch.randn(3, 12), nn.Linear(12, 7)
    return module, rows, NullSpaceProjection([layer_of(module)], _space(rows[None]), identity)


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
    projection = NullSpaceProjection([layer_of(module)], _space(torch.randn(1, 40, 3) @ torch.randn(3, 12)))
    projection.project_displacements()
    assert not module.weight.any()
    moments = {"layer": SecondMoment.zeros(1, 12).update(torch.randn(1, 20, 12))}
    assert projection.relative_change() == 0.0
    assert projection.leak(moments, {"layer": "layer"}).total == 0.0
    with torch.no_grad():
        module.weight += torch.randn(7, 12)
    projection.project_displacements()
    assert bool(module.weight.any())
    assert bool(module.weight.isfinite().all())
    assert projection.leak(moments, {"layer": "layer"}).total == float("inf"), "outputs where there were none"
    assert projection.relative_change() == 0.0, "nothing to measure it by"


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_a_displacement_is_projected_in_the_stated_precision(dtype: torch.dtype | None) -> None:
    module, rows, projection = _projection()
    projector = Projector.from_subspace(_space(rows[None])["layer"]).to(dtype or torch.float32, torch.device("cpu"))
    start = module.weight.detach().clone()
    with torch.no_grad():
        module.weight += 0.1 * torch.randn(7, 12)
    change = projector((module.weight.detach().to(projector.factor.dtype) - start)[None])[0]
    projection.project_displacements(dtype=dtype)
    assert torch.equal(module.weight.detach(), (start + change).float())


def test_of_adapters_the_product_fades_and_is_limited(low_rank_data: Data, tmp_path: Path) -> None:
    trainer = make_trainer(make_vit(), low_rank_data, tmp_path, peft_config=LoraConfig(r=4))
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
    assert leak.per_layer == {"layer": leak.total}


def test_the_mathematics_does_not_import_transformers() -> None:
    files = [file for file in Path(unsc_hf.__file__).parent.joinpath("nullspace").glob("*.py") if file.stem != "lora"]
    assert len(files) > 8
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
        assert not any(name.split(".")[0] in ("transformers", "datasets", "peft", "accelerate") for name in modules)
