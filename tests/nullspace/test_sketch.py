"""A sketch never says more than the moment it stands for, and says exactly how much less."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unsc_hf.errors import UNSCError
from unsc_hf.models.layers import ProtectedLayer, row_geometry
from unsc_hf.nullspace.lora import null_space_start
from unsc_hf.nullspace.moments import SecondMoment, total_moment
from unsc_hf.nullspace.projection import NullSpaceProjection, Projector
from unsc_hf.nullspace.sketch import MomentSketch, RandomTransform, RowSample
from unsc_hf.nullspace.subspace import LayerSubspace, build_subspace, randomised

KEYS = {"layer": "layer"}


def _rows(count: int, width: int, decay: float = 1.0) -> torch.Tensor:
    """Rows whose directions carry energies that fall like 1 / i^(2 decay), turned at random."""
    turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
    return (torch.randn(count, width, dtype=torch.float64) * torch.arange(1, width + 1) ** -decay) @ turn


def _sketch(rows: torch.Tensor, size: int) -> MomentSketch:
    return MomentSketch.zeros(rows.shape[1], size).update(rows[None])


def _moment(rows: torch.Tensor) -> SecondMoment:
    return SecondMoment.zeros(1, rows.shape[1]).update(rows[None])


def _approximation(sketch: MomentSketch) -> torch.Tensor:
    values, vectors = sketch.eigen()
    return vectors * values @ vectors.T


def _space(rows: torch.Tensor, size: int, **options: object) -> LayerSubspace:
    return build_subspace({"0": {"layer": _sketch(rows, size)}}, KEYS, **options)["layer"]  # type: ignore[arg-type]


@pytest.mark.parametrize(("width", "size"), [(1, 1), (2, 1), (7, 3), (12, 12), (130, 40), (131, 131)])
def test_the_transform_is_orthonormal_and_made_again_from_its_seed(width: int, size: int) -> None:
    transform = RandomTransform.make(width, size, 3)
    omega = transform.matrix()
    assert omega.shape == (width, size)
    torch.testing.assert_close(omega.T @ omega, torch.eye(size, dtype=torch.float64))
    rows = torch.randn(70, width, dtype=torch.float64)
    torch.testing.assert_close(transform(rows), rows @ omega)
    assert torch.equal(RandomTransform.make(width, size, 3).matrix(), omega)
    if width > 100:
        assert (RandomTransform.make(width, size, 4).matrix() - omega).norm() > 1


def test_the_random_bits_are_the_same_everywhere() -> None:
    """Stored sketches are read with another version of the libraries one day."""
    transform = RandomTransform.make(10, 4, 0)
    assert transform.frequencies.tolist() == [1, 3, 5, 8]
    assert transform.signs.tolist() == [-1, 1, 1, 1, -1, -1, -1, -1, -1, -1]


@settings(max_examples=20, deadline=None)
@given(st.integers(4, 60), st.floats(0.1, 3.0), st.integers(1, 150), st.integers(1, 30))
def test_the_error_is_exactly_what_the_trace_says(width: int, decay: float, count: int, size: int) -> None:
    rows = _rows(count, width, decay)
    sketch, moment = _sketch(rows, min(size, width)), rows.T @ rows
    total = float(moment.trace())
    missed = torch.linalg.eigvalsh(moment - _approximation(sketch))
    assert missed.min() >= -1e-10 * total
    assert float(sketch.trace) == pytest.approx(total)
    bound = float(sketch.trace - sketch.eigen()[0].sum())
    assert bound == pytest.approx(float(missed.clamp_min(0).sum()), abs=1e-9 * total)


def test_the_error_is_near_that_of_the_best_approximation_of_half_the_rank() -> None:
    rows = _rows(2000, 200, 1.0)
    values = torch.linalg.svdvals(rows).square()
    space = _space(rows, 60, energy=0.5)
    assert space.error_bound is not None
    assert space.error_bound <= 2 * float(values[30:].sum() / values.sum())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=4))
def test_sketches_add_subtract_and_merge_as_moments_do(sizes: list[int]) -> None:
    parts = [_rows(n, 30) for n in sizes]
    together = _sketch(torch.cat(parts), 12)
    sketches = [_sketch(part, 12) for part in parts]
    total = total_moment(sketches)
    assert total.rows == together.rows == sum(sizes)
    torch.testing.assert_close(total.products, together.products)
    rest = together - sketches[0]
    expected = _sketch(torch.cat(parts[1:]), 12)
    torch.testing.assert_close(rest.products, expected.products)
    torch.testing.assert_close(rest.trace, expected.trace)
    assert rest.rows == expected.rows
    tolerance = 1e-9 * float(together.trace)
    assert (_approximation(rest) - _approximation(expected)).abs().max() <= tolerance
    assert sketches[0].rows == sizes[0]  # nothing was changed in place


def test_a_class_is_taken_out_of_much_larger_ones() -> None:
    """The difference carries the rounding of what was taken out; it must still be a second moment."""
    large, small = 1e5 * _rows(300, 40), _rows(5, 40)
    rest = (_sketch(large, 20) + _sketch(small, 20)) - _sketch(large, 20)
    values, vectors = rest.eigen()
    exact = small.T @ small
    captured = float(((vectors.T @ exact) * vectors.T).sum())
    assert captured > 0.9 * float(exact.trace())
    assert float(values.sum()) <= float(rest.trace) * (1 + 1e-3)


def test_more_taken_out_than_was_in_it_is_told() -> None:
    with pytest.raises(UNSCError, match="more was taken out"):
        (_sketch(_rows(10, 20), 8) - _sketch(_rows(200, 20), 8)).eigen()


def test_different_kinds_do_not_add() -> None:
    rows = _rows(20, 10)
    for other in (_sketch(rows, 5), MomentSketch.zeros(10, 4, seed=7), _moment(rows)):
        with pytest.raises(UNSCError, match="max_statistics_memory"):
            _sketch(rows, 4) + other
    with pytest.raises(UNSCError, match="max_statistics_memory"):
        _moment(rows) + _sketch(rows, 4)
    with pytest.raises(UNSCError, match="wide_rows"):
        _sketch(rows, 4).energy(torch.randn(1, 3, 10))


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.97])
def test_the_energy_asked_for_is_held_for_certain(energy: float, caplog: pytest.LogCaptureFixture) -> None:
    rows = _rows(500, 120, 1.2)
    space = _space(rows, 60, energy=energy)
    kept = space.basis[0]
    held = float((rows @ kept).square().sum() / rows.square().sum())
    assert space.basis.shape == (1, 120, space.ranks[0])
    torch.testing.assert_close(kept.T @ kept, torch.eye(kept.shape[1], dtype=torch.float64))
    assert held >= 1 - space.null_energy >= energy
    values, _ = _sketch(rows, 60).eigen()
    assert (
        float(values[: space.ranks[0] - 1].sum() / rows.square().sum()) < energy
    )  # one direction fewer is not certain
    best = build_subspace({"0": {"layer": _moment(rows)}}, KEYS, energy=energy)["layer"]
    assert best.ranks[0] <= space.ranks[0] <= best.ranks[0] + 12
    assert not caplog.records
    assert space.has_capacity


def test_an_energy_out_of_reach_keeps_all_and_says_what_would_do(caplog: pytest.LogCaptureFixture) -> None:
    rows = _rows(3000, 400, 0.75)
    space = _space(rows, 30, energy=0.9)
    assert space.ranks == (30,)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "layer: energy 0.9 was asked for, its sketch of 30 columns gives 30 directions" in record.message
    assert f"{1 - space.null_energy:.6g} for certain" in record.message
    advised = int(record.message.split("sketch_size of about ")[1].split()[0])
    assert 1 - _space(rows, advised, energy=0.9).null_energy >= 0.85  # an extrapolation, not a promise
    assert 30 < advised <= 200
    caplog.clear()
    _space(_rows(3000, 60, 0.0), 20, energy=0.99)
    assert "keeps the whole moment" in caplog.text
    assert "sketch_size" not in caplog.text


def test_energy_one_is_exact_where_the_rank_is_below_the_sketch(caplog: pytest.LogCaptureFixture) -> None:
    rows = torch.randn(200, 7, dtype=torch.float64) @ torch.randn(7, 50, dtype=torch.float64)
    space = _space(rows.float().double(), 20, energy=1.0)
    assert space.ranks == (7,)
    assert not caplog.records
    outside = rows - (rows @ space.basis[0]) @ space.basis[0].T
    assert outside.norm() <= 1e-6 * rows.norm()
    _space(_rows(200, 50), 20, energy=1.0)
    assert "energy 1 was asked for" in caplog.text


def test_rank_rule_and_nothing_at_all(caplog: pytest.LogCaptureFixture) -> None:
    rows = _rows(100, 30)
    assert _space(rows, 15, rule="rank", rank=6).ranks == (6,)
    assert _space(rows[:4], 15, rule="rank", rank=6).ranks == (4,)  # there is no more in so few rows
    assert not caplog.records
    assert _space(rows, 15, rule="rank", rank=20).ranks == (15,)
    assert "subspace_rank 20 was asked for" in caplog.text
    nothing = _space(torch.zeros(5, 30, dtype=torch.float64), 15, energy=0.9)
    assert nothing.ranks == (0,)
    projector = Projector.from_subspace(nothing).to(torch.float32, torch.device("cpu"))
    matrix = torch.randn(1, 3, 30)
    assert torch.equal(projector(matrix), matrix)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"rule": "ratio", "ratio": 2.0, "forget": {"layer": _sketch(torch.ones(2, 30), 9)}}, "subspace_rule: 'ratio'"),
        ({"rule": "released_ramp"}, "subspace_rule: 'released_ramp'"),
        ({"merge": "concat"}, "subspace_merge: 'concat'"),
    ],
)
def test_rules_that_need_whole_moments_are_refused(options: dict[str, object], argument: str) -> None:
    with pytest.raises(UNSCError, match=f"{argument} needs the whole moment of 'layer'"):
        _space(_rows(40, 30), 9, **options)


def test_projection_and_random_control_of_a_sketched_layer() -> None:
    rows = (torch.randn(60, 5) @ torch.randn(5, 40)).double()
    linear = nn.Linear(40, 6, bias=False)
    layer = ProtectedLayer("layer", linear, row_geometry(linear))  # type: ignore[arg-type]
    space = build_subspace({"0": {"layer": _sketch(rows, 16)}}, KEYS, energy=1.0)
    before = linear(rows.float()).detach()
    projection = NullSpaceProjection([layer], space)
    with torch.no_grad():
        linear.weight.add_(torch.randn_like(linear.weight))
    projection.project_displacements()
    assert projection.relative_change() > 0.5
    assert (linear(rows.float()) - before).abs().max() < 1e-4 * before.abs().max()
    control = randomised(space, 0)["layer"]
    assert control.basis.shape == (1, 40, 5)
    torch.testing.assert_close(control.basis[0].T @ control.basis[0], torch.eye(5, dtype=torch.float64))
    assert control.null_energy == 35 / 40


@pytest.mark.parametrize("thin_rows", [True, False])
def test_adapters_start_from_forgotten_directions_that_are_free(thin_rows: bool) -> None:
    retain = _rows(40, 5) @ torch.randn(5, 60, dtype=torch.float64)
    forget = _rows(400, 60, 2.0) + _rows(400, 40) @ retain / retain.norm()  # most of it is used by retained rows, too
    dense = build_subspace({"0": {"layer": _moment(retain)}}, KEYS, energy=1.0)["layer"]
    space = _space(retain, 20, energy=1.0)
    forgotten = _sketch(forget, 30) if thin_rows else _moment(forget)
    start = null_space_start(space, forgotten, 4)
    assert (start @ retain.T).norm() <= 1e-6 * start.norm() * retain.norm()
    torch.testing.assert_close(start @ start.T, torch.eye(4, dtype=torch.float64) * 60 / 4)

    def caught(rows: torch.Tensor) -> float:
        return float((rows @ forget.T).square().sum())

    best = caught(null_space_start(dense, _moment(forget), 4))
    assert caught(start) >= (0.95 if thin_rows else 0.9999) * best
    wide = null_space_start(space, forgotten, 58)
    assert (wide @ retain.T).norm() <= 1e-6 * wide.norm() * retain.norm()
    assert int((wide.norm(dim=1) > 0).sum()) <= 55
    mixed = null_space_start(dense, _sketch(forget, 30), 4)  # the retained rows' moment whole, the forgotten ones' not
    assert caught(mixed) >= 0.95 * best


def test_more_than_half_the_width_may_be_kept_when_asked_for() -> None:
    rows = torch.randn(100, 30, dtype=torch.float64) @ torch.randn(30, 40, dtype=torch.float64)
    space = _space(rows, 36, energy=1.0)
    assert space.ranks == (30,)
    projector = Projector.from_subspace(space)
    moved = projector(torch.randn(1, 3, 40, dtype=torch.float64))
    assert (moved[0] @ rows.T).abs().max() < 1e-6
    assert moved.norm() > 0.1


def test_forgotten_energy_is_never_exaggerated() -> None:
    retain, forget = _rows(300, 50, 1.0), _rows(300, 50, 1.0)
    options = {"energy": 0.8, "forget": {"layer": _sketch(forget, 20)}}
    space = _space(retain, 25, **options)
    kept = space.basis[0]
    free = 1 - float((forget @ kept).square().sum() / forget.square().sum())
    assert space.forget_null_energy is not None
    assert 0.3 * free < space.forget_null_energy <= free + 1e-9
    exact = _space(retain, 25, energy=0.8, forget={"layer": _moment(forget)})
    assert exact.forget_null_energy == pytest.approx(free)
    report = build_subspace({"0": {"layer": _sketch(retain, 25)}}, KEYS, energy=0.8)
    assert "sketch of 25, error bound" in str(report)
    assert report.to_dict()[0]["sketch_size"] == 25


def test_a_sample_measures_the_leak_of_its_rows() -> None:
    rows, matrix = torch.randn(1, 30, 12), torch.randn(1, 5, 12)
    sample = RowSample.zeros(12, 50).update(rows[:, :20]).update(rows[:, 20:])
    assert (sample.kept, sample.rows) == (30, 30)
    exact = _moment(rows[0]).energy(matrix)
    assert sample.energy(matrix) == pytest.approx(exact, rel=1e-6)
    sample.stand_for(60)  # two rows of three were passed over
    assert sample.energy(matrix) == pytest.approx(3 * exact, rel=1e-6)
    full = RowSample.zeros(12, 8).update(rows)
    assert (full.kept, full.rows) == (8, 30)
    both = full + sample
    assert (both.kept, both.rows) == (38, 120)
    with pytest.raises(UNSCError, match="nothing can be taken out"):
        sample - full
