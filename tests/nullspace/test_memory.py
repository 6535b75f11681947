"""Sizes are read as they are meant; every pass of a plan fits, and no layer is left out."""

from __future__ import annotations

import pytest
import torch
from helpers.models import layer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unsc_hf.errors import UNSCError
from unsc_hf.models.layers import ProtectedLayer
from unsc_hf.nullspace.memory import moment_bytes, plan_memory, scratch_bytes
from unsc_hf.utils.sizes import format_size, size_in_bytes


def _layers(widths: list[int]) -> list[ProtectedLayer]:
    """Layers of these widths, without memory."""
    return [layer_of(nn.Linear(width, 1, device="meta"), f"layer {i}") for i, width in enumerate(widths)]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9),
        ("2 gb", 2 * 10**9),
        ("1.5GiB", 3 * 2**29),
        (" 500MB ", 500 * 10**6),
        ("64KiB", 65536),
        (7, 7),
        (None, None),
    ],
)
def test_sizes(text: str | int | None, size: int | None) -> None:
    assert size_in_bytes(text, "max_memory") == size


@pytest.mark.parametrize(
    "text",
    ["", "GB", "2 GB of it", "-2GB", "0", "0.1", "2e9", "two", "nanGB", "infGB", "2PB", "0KB", True, -5, 0, [2]],
)
def test_nonsense_is_refused(text: object) -> None:
    with pytest.raises(UNSCError, match=r'max_memory: .* is not a size; .*"2GB"'):
        size_in_bytes(text, "max_memory")  # type: ignore[arg-type]


@settings(max_examples=500)
@given(st.integers(1000, 10**13))
def test_a_size_that_is_named_is_enough(size: int) -> None:
    named = size_in_bytes(format_size(size), "max_memory")
    assert size <= named <= 1.1 * size


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([64, 768, 3072, 4096]), min_size=1, max_size=12), st.integers(4 * 10**8, 10**10))
def test_every_layer_is_read_once_and_every_pass_fits(widths: list[int], limit: int) -> None:
    layers = _layers(widths)
    plan = plan_memory(layers, limit)
    assert sorted(layer.name for part in plan.passes for layer in part) == sorted(layer.name for layer in layers)
    for part in plan.passes:
        held = sum(8 * layer.geometry.width**2 for layer in part)
        assert held + max(scratch_bytes(layer, torch.float64) for layer in part) <= plan.peak <= limit
    assert plan.results == sum(map(moment_bytes, layers))
    assert len(plan_memory(layers, None).passes) == 1


def test_a_limit_that_is_too_small_names_the_layer_and_its_need() -> None:
    layers = _layers([768, 14336, 4096])
    message = r"max_statistics_memory: 1MB is too small: the moment of layer 'layer 1', 14336 wide, needs "
    with pytest.raises(UNSCError, match=message) as refusal:
        plan_memory(layers, 10**6)
    needed = size_in_bytes(str(refusal.value).split(" needs ")[1].split(";")[0], "max_memory")
    assert len(plan_memory(layers, needed).passes) == 2


def test_moments_of_all_groups_count() -> None:
    layer = layer_of(nn.Conv2d(2 * 600, 4, 3, groups=2, device="meta"), "conv")
    assert moment_bytes(layer) == 2 * 8 * 5400**2
    with pytest.raises(UNSCError, match="'conv', 5400 wide, needs"):
        plan_memory([layer], 4 * 10**8)
