"""Sizes are read as they are meant; what a plan holds fits, and nothing is left out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unsc_hf.errors import UNSCError
from unsc_hf.models.layers import ProtectedLayer, row_geometry
from unsc_hf.nullspace.memory import plan_memory, scratch_bytes, whole_bytes
from unsc_hf.utils.sizes import format_size, parse_size


def _layers(widths: list[int]) -> list[ProtectedLayer]:
    """Layers of these widths, without memory."""
    modules = [nn.Linear(width, 1, device="meta") for width in widths]
    return [ProtectedLayer(f"layer {i}", m, row_geometry(m)) for i, m in enumerate(modules)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9),
        ("2 gb", 2 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("500M", 500 * 10**6),
        ("64KiB", 65536),
        ("12345", 12345),
        (" 7b ", 7),
        (7, 7),
        (None, None),
    ],
)
def test_sizes(text: str | int | None, size: int | None) -> None:
    assert parse_size(text, "max_memory") == size


@pytest.mark.parametrize(
    "text", ["", "GB", "2 GB of it", "-2GB", "0", "0.1", "2e9", "two", "nan", "2PB", True, -5, 0, [2]]
)
def test_nonsense_is_refused(text: object) -> None:
    with pytest.raises(UNSCError, match=r'max_memory: .* is not a size; .*"2GB"'):
        parse_size(text, "max_memory")  # type: ignore[arg-type]


@settings(max_examples=500)
@given(st.integers(1, 10**13))
def test_a_size_that_is_told_is_enough(size: int) -> None:
    told = parse_size(format_size(size), "max_memory")
    assert told is not None
    assert size <= told <= 1.1 * size


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([64, 768, 3072, 4096, 14336]), min_size=1, max_size=12), st.integers(3 * 10**8, 10**10))
def test_every_layer_is_read_once_and_every_pass_fits(widths: list[int], limit: int) -> None:
    layers = _layers(widths)
    plan = plan_memory(layers, limit)
    assert sorted(layer.name for part in plan.passes for layer in part) == sorted(layer.name for layer in layers)
    for part in plan.passes:
        held = sum(8 * w * plan.columns.get(x.name, w) for x in part for w in [x.geometry.width])
        assert held + max(scratch_bytes(1, layer.geometry.width, torch.float64) for layer in part) <= limit
    for layer in layers:
        width = layer.geometry.width
        fits = whole_bytes(1, width) + scratch_bytes(1, width, torch.float64) <= limit
        assert (layer.name in plan.columns) is not fits
        assert plan.columns.get(layer.name, 16) >= 16
        assert plan.columns.get(layer.name, 0) <= width // 2
    assert plan.peak <= limit
    assert len(plan_memory(layers, None).passes) == 1


def test_a_limit_that_is_too_small_says_what_is_needed() -> None:
    layers = _layers([768, 4096, 14336])
    with pytest.raises(
        UNSCError, match=r"max_statistics_memory: 1MB cannot hold layer 'layer 2', 14336 wide"
    ) as refusal:
        plan_memory(layers, 10**6)
    needed = parse_size(str(refusal.value).split(" needs ")[1].split(";")[0], "max_memory")
    plan_memory(layers, needed)
    with pytest.raises(UNSCError, match="a sketch of 7000 columns needs"):
        plan_memory(layers, 9 * 10**8, sketch_size=7000)
    assert plan_memory(layers, 10**9, sketch_size=700).columns == {"layer 2": 700}
    assert plan_memory(_layers([96]), 1_220_000).columns == {"layer 0": 48}  # more would fit, and be no sketch
    assert plan_memory(layers, None, layout={"layer 0": 30}).columns == {"layer 0": 30}
    with pytest.raises(UNSCError, match="its moment needs"):
        plan_memory(layers, 10**9, layout={})


def test_grouped_convolutions_are_never_sketched() -> None:
    conv = nn.Conv2d(2 * 600, 4, 3, groups=2, device="meta")
    layer = ProtectedLayer("conv", conv, row_geometry(conv))  # type: ignore[arg-type]
    assert not plan_memory([layer], 10**9).columns
    with pytest.raises(UNSCError, match="'conv', 5400 wide: its moment needs"):
        plan_memory([layer], 4 * 10**8)
