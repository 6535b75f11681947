"""Rules choose what they say, on data whose spectrum is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unsc_hf.errors import UNSCError
from unsc_hf.nullspace.moments import SecondMoment
from unsc_hf.nullspace.rules import build_subspace, descending_eigh
from unsc_hf.nullspace.subspace import LayerSubspace, Subspace

KEYS = {"layer": "layer"}


def _moment(x: torch.Tensor) -> SecondMoment:
    return SecondMoment.zeros(1, x.shape[1]).update(x[None])


def _build(x: torch.Tensor, **options: Any) -> Subspace:
    return build_subspace({"0": {"layer": _moment(x)}}, KEYS, **options)


def _space(x: torch.Tensor, **options: Any) -> LayerSubspace:
    return _build(x, **options)["layer"]


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 0.999), st.integers(2, 12), st.integers(1, 40))
def test_energy_keeps_the_fewest_directions_that_reach_it(energy: float, width: int, rows: int) -> None:
    x = torch.randn(rows, width, dtype=torch.float64) * torch.rand(width, dtype=torch.float64)
    values = torch.linalg.svdvals(x).square()
    share = values.cumsum(0) / values.sum()
    expected = int((share < energy - 1e-12).sum()) + 1
    layer = _space(x, rule="energy", energy=energy)
    assert abs(layer.ranks[0] - expected) <= (1 if bool(((share - energy).abs() < 1e-9).any()) else 0)
    assert layer.null_energy <= 1 - energy + 1e-9


@pytest.mark.parametrize("rank", [0, 1, 5, 11])
def test_energy_one_finds_the_exact_rank_in_float32(rank: int) -> None:
    x = torch.randn(300, rank) @ torch.randn(rank, 12) if rank else torch.zeros(300, 12)
    layer = _space(x, energy=1.0)
    assert layer.ranks == (rank,)
    free = layer.basis[0, :, rank:].float()
    assert (x @ free).abs().max() <= 1e-5 * max(float(x.abs().max()), 1e-30)


def test_rules_are_relative_to_the_scale() -> None:
    x = torch.randn(100, 8, dtype=torch.float64) * torch.logspace(0, -4, 8, dtype=torch.float64)
    assert _space(x, energy=0.99).ranks == _space(1e-9 * x, energy=0.99).ranks
    assert _space(x, energy=1.0).ranks == _space(1e-9 * x, energy=1.0).ranks


def test_rank_rule() -> None:
    assert _space(torch.randn(50, 8), rule="rank", size=3).ranks == (3,)
    assert _space(torch.randn(50, 8), rule="rank", size=99).ranks == (8,)


def test_ratio_frees_what_forgotten_rows_use_more() -> None:
    retain = torch.randn(4000, 6, dtype=torch.float64) * torch.tensor([3.0, 2, 1, 0.5, 0.5, 0.1])
    forget = torch.randn(4000, 6, dtype=torch.float64) * torch.tensor([1.0, 1, 1, 2.0, 0.2, 2.0])
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    layer = _space(retain @ rotation, rule="ratio", size=2.0, forget={"layer": _moment(forget @ rotation)})
    assert layer.ranks == (4,)
    free = layer.basis[0, :, 4:]
    torch.testing.assert_close(free.mT @ free, torch.eye(2, dtype=torch.float64))
    assert (rotation.T[:, [3, 5]] - free @ (free.mT @ rotation.T[:, [3, 5]])).norm() < 0.2
    assert layer.forget_null_energy > 10 * layer.null_energy


def test_the_sum_is_exact_where_each_class_is_and_joined_bases_span_every_class() -> None:
    a = torch.randn(40, 2, dtype=torch.float64) @ torch.randn(2, 10, dtype=torch.float64)
    b = torch.randn(40, 3, dtype=torch.float64) @ torch.randn(3, 10, dtype=torch.float64)
    per_class = {"0": {"layer": _moment(a)}, "1": {"layer": _moment(b)}}
    for rule in ("energy", "class_energy"):
        layer = build_subspace(per_class, KEYS, energy=1.0, rule=rule)["layer"]
        assert layer.ranks == (5,)
        free = layer.basis[0, :, 5:]
        assert max((a @ free).abs().max(), (b @ free).abs().max()) < 1e-6
    # A class with few rows is outvoted in the sum, and kept by its own basis.
    rare = {"0": {"layer": _moment(1000 * a)}, "1": {"layer": _moment(b)}}
    assert build_subspace(rare, KEYS, energy=0.9)["layer"].ranks[0] <= 2
    assert build_subspace(rare, KEYS, energy=0.9, rule="class_energy")["layer"].ranks[0] > 2


def test_released_ramp_raises_the_energy_with_the_class_id() -> None:
    x = torch.randn(500, 30, dtype=torch.float64) * torch.logspace(0, -1.5, 30, dtype=torch.float64)
    groups = [{str(c): {"layer": _moment(x)}} for c in (0, 5, 12)]
    ranks = [build_subspace(group, KEYS, rule="released_ramp")["layer"].ranks[0] for group in groups]
    assert ranks[0] < ranks[1] < ranks[2] == 30
    with pytest.raises(UNSCError, match="integer class ids"):
        build_subspace({"cat": {"layer": _moment(x)}}, KEYS, rule="released_ramp")


def test_report_and_table() -> None:
    retain, forget = torch.randn(60, 4) @ torch.randn(4, 9), torch.randn(60, 9)
    space = _build(retain, energy=1.0, forget={"layer": _moment(forget)})
    (row,) = space.report()
    assert (row.layer, row.width, row.rank, row.capacity) == ("layer", 9, 4, 5)
    free = space["layer"].basis[0, :, 4:].float()
    share = float((forget @ free).square().sum() / forget.square().sum())
    assert row.forget_null_energy == pytest.approx(share, rel=1e-4)
    assert row.retain_null_energy < 1e-9
    assert "forgotten energy" in str(space)
    assert " 4 " in str(space)


def test_next_energy_is_where_capacity_begins() -> None:
    x = torch.randn(50, 5, dtype=torch.float64)
    full = _space(x, energy=1.0)
    assert not full.has_capacity
    assert _space(x, energy=full.next_energy - 1e-9).ranks == (4,)
    assert _space(x, energy=min(1.0, full.next_energy + 1e-9)).ranks == (5,)


def test_random_control_has_the_same_ranks_and_other_directions() -> None:
    space = _build(torch.randn(60, 4) @ torch.randn(4, 9), energy=1.0)
    control = space.randomised(0)["layer"]
    assert control.ranks == space["layer"].ranks
    torch.testing.assert_close(control.basis[0].mT @ control.basis[0], torch.eye(9, dtype=torch.float64))
    assert (control.basis - space["layer"].basis).norm() > 1


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"energy": 0.0}, "energy"),
        ({"energy": 1.2}, "energy"),
        ({"energy": float("nan")}, "energy"),
        ({"rule": "best"}, "subspace_rule"),
        ({"rule": "rank"}, "subspace_size"),
        ({"rule": "ratio", "size": 2.0}, "subspace_size"),
    ],
)
def test_bad_options_name_the_argument(options: dict[str, object], argument: str) -> None:
    with pytest.raises(UNSCError, match=argument):
        _space(torch.randn(20, 4), **options)


def test_decomposition_survives_a_solver_that_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen with dead ReLU channels: torch's divide and conquer does not converge on many exactly zero eigenvalues."""
    x = torch.randn(2, 30, 5, dtype=torch.float64) @ torch.randn(2, 5, 12, dtype=torch.float64)
    matrix = x.mT @ x
    expected, _ = descending_eigh(matrix)

    def give_up(*args: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", give_up)
    values, vectors = descending_eigh(matrix)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(vectors * values[:, None, :] @ vectors.mT, matrix)
