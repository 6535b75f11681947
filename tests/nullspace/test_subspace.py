"""Rules choose what they say, on data whose spectrum is known."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unsc_hf.errors import UNSCError
from unsc_hf.nullspace.moments import SecondMoment
from unsc_hf.nullspace.rules import build_subspace, descending_eigh, full_layers
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


def _grouped(rows: int = 300, width: int = 5) -> tuple[SecondMoment, torch.Tensor]:
    """Two groups of rows that use the directions differently, and their moment."""
    spread = torch.stack([torch.logspace(0, -1, width), torch.logspace(-1, 0, width)]).double()
    x = torch.randn(2, rows, width, dtype=torch.float64) * spread[:, None]
    x = x @ torch.linalg.qr(torch.randn(2, width, width, dtype=torch.float64))[0]
    return SecondMoment.zeros(2, width).update(x), x


def test_ratio_is_that_of_generalised_eigenvalues_in_each_group() -> None:
    (retained, _), (forgotten, _) = _grouped(), _grouped(rows=200)
    for ratio in (0.5, 1.0, 2.0):
        space = build_subspace({"0": {"layer": retained}}, KEYS, rule="ratio", size=ratio, forget={"layer": forgotten})[
            "layer"
        ]
        for g in range(2):
            r, f = retained.matrix[g].numpy() / 300, forgotten.matrix[g].numpy() / 200
            values, vectors = scipy.linalg.eigh(f, r)
            expected = torch.from_numpy(vectors[:, values > ratio])
            assert space.ranks[g] == 5 - expected.shape[1]
            free = space.basis[g, :, space.ranks[g] :]
            torch.testing.assert_close(free @ (free.mT @ expected), expected)
            torch.testing.assert_close(space.basis[g].mT @ space.basis[g], torch.eye(5, dtype=torch.float64))


def test_ratio_frees_what_retained_rows_never_use() -> None:
    retain = torch.randn(100, 3, dtype=torch.float64) @ torch.eye(3, 6, dtype=torch.float64)
    space = _space(retain, rule="ratio", size=10.0, forget={"layer": _moment(torch.randn(100, 6))})
    assert space.ranks == (3,)
    assert space.null_energy < 1e-9


def test_joined_bases_count_no_direction_that_no_class_uses() -> None:
    classes = {str(c): {"layer": _moment(torch.eye(4, dtype=torch.float64)[:1] * (c + 1))} for c in range(2)}
    assert build_subspace(classes, KEYS, energy=1.0, rule="class_energy")["layer"].ranks == (1,)
    one = {"0": {"layer": _moment(torch.randn(1, 4, dtype=torch.float64))}}
    assert build_subspace(one, KEYS, energy=1.0, rule="class_energy")["layer"].ranks == (1,)
    nothing = {"0": {"layer": _moment(torch.zeros(3, 4))}}
    assert build_subspace(nothing, KEYS, energy=1.0, rule="class_energy")["layer"].ranks == (0,)


def test_figures_of_several_groups_are_means_and_stay_without_the_matrices() -> None:
    moment, x = _grouped()
    space = build_subspace({"0": {"layer": moment}}, KEYS, rule="energy", energy=0.8)
    layer = replace(space["layer"], ranks=(1, 4))
    assert (layer.width, layer.rank, layer.capacity, layer.has_capacity) == (5, 2.5, 2.5, True)
    assert replace(layer, ranks=(5, 4)).has_capacity
    assert not replace(layer, ranks=(5, 5)).has_capacity
    free = [basis[:, rank:] for basis, rank in zip(space["layer"].basis, space["layer"].ranks, strict=True)]
    outside = sum(float((rows @ basis).square().sum()) for rows, basis in zip(x, free, strict=True))
    assert space["layer"].null_energy == pytest.approx(outside / float(x.square().sum()))

    bare = space.without_bases()
    assert bare["layer"].basis.numel() == 0
    assert bare["layer"].basis.untyped_storage().nbytes() == 0
    assert bare.report() == space.report()
    assert str(bare) == str(space)
    assert str(space).endswith(" "), "energies of forgotten rows were not measured"


def test_a_random_control_is_drawn_from_its_seed_with_the_energies_of_chance() -> None:
    space = _build(torch.randn(60, 4) @ torch.randn(4, 9), energy=1.0)
    first, again, other = (space.randomised(seed)["layer"] for seed in (3, 3, 4))
    assert torch.equal(first.basis, again.basis)
    assert not torch.equal(first.basis, other.basis)
    assert first.null_energy == first.forget_null_energy == pytest.approx(5 / 9)


def _protected(*names: str) -> Any:
    return [SimpleNamespace(name=name) for name in names]


def test_layers_without_a_free_direction_are_named_with_an_energy_that_frees_one() -> None:
    x = torch.randn(50, 5, dtype=torch.float64)
    narrow, wide = _space(x, energy=1.0), _space(torch.randn(50, 3) @ torch.randn(3, 8), energy=1.0)
    both = Subspace({"a": narrow, "b": wide}, {"narrow": "a", "wide": "b"})
    (why,) = full_layers(both, _protected("narrow", "wide"), energy=1.0).items()
    assert why[0] == "narrow"
    assert "keeps all 5 directions" in why[1]
    stated = float(why[1].split("an energy of ")[1].split()[0])
    assert narrow.next_energy - 1.1e-6 <= stated < narrow.next_energy
    assert _space(x, energy=stated).ranks == (4,)

    spread = _space(x * torch.logspace(0, -1, 5, dtype=torch.float64), energy=1.0)
    none_free = Subspace({"a": narrow, "b": spread}, {"narrow": "a", "spread": "b"})
    nearest = math.floor(1e6 * spread.next_energy) / 1e6
    with pytest.raises(UNSCError, match=f"'spread' would be the first to have some, at an energy of {nearest:g}"):
        full_layers(none_free, _protected("narrow", "spread"), energy=1.0)
    for rule, advice in (("rank", r"lower subspace_size \(8\)"), ("class_energy", "use subspace_rule 'energy'")):
        with pytest.raises(UNSCError, match=rf"'{rule}' leaves no layer any capacity \(widest layer: 8\); {advice}"):
            full_layers(both, _protected("narrow"), energy=1.0, size=8, rule=rule)
