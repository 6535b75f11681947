"""Closed-form erasure: the asked shifts and no more, at the least leak; class means then give nothing away."""

from __future__ import annotations

import pytest
import torch

from unsc_hf import UNSCError
from unsc_hf.erasure.closed_form import LowRank, differences, least_leak, output_shifts, ridged, shared_pairs


def _moment(width: int) -> torch.Tensor:
    x = torch.randn(4 * width, width, dtype=torch.float64) * torch.logspace(-1, 1, width, dtype=torch.float64)
    return x.T @ x / len(x)


def test_means_move_as_asked_and_other_directions_of_the_constraints_stay() -> None:
    inputs, shifts = torch.randn(12, 3), torch.randn(7, 3)
    change = least_leak(inputs, shifts, _moment(12))
    assert torch.allclose(change.dense() @ inputs.double(), shifts.double(), atol=1e-8)
    assert torch.linalg.matrix_rank(change.dense()) == 3
    assert torch.allclose(change.scaled(0.5).dense(), 0.5 * change.dense())


def test_no_other_change_that_does_this_leaks_less() -> None:
    moment, inputs, shifts = _moment(12), torch.randn(12, 2), torch.randn(7, 2)
    best = least_leak(inputs, shifts, moment, ridge=1e-9).dense()
    basis = torch.linalg.qr(inputs.double()).Q
    for _ in range(20):
        other = best + torch.randn(7, 12, dtype=torch.float64) @ (torch.eye(12).double() - basis @ basis.T)
        assert torch.allclose(other @ inputs.double(), shifts.double(), atol=1e-8)
        assert float(torch.trace(best @ moment @ best.T)) <= float(torch.trace(other @ moment @ other.T))


def test_constraints_that_repeat_each_other() -> None:
    once = torch.randn(12, 1)
    change = least_leak(torch.cat([once, once], 1), torch.ones(3, 2), _moment(12))
    assert torch.allclose(change.dense() @ once.double(), torch.ones(3, 1).double(), atol=1e-6)


def test_a_linear_reader_finds_no_difference_of_means_between_the_rows_of_a_class() -> None:
    """Two classes; rows of two forgotten classes differ from the retained rows of each by a shift of their own."""
    width, rows = 10, 8000
    centres, shifts = 3 * torch.randn(2, width), 2 * torch.randn(2, 2, width)
    labels, relabelled, own = torch.arange(rows) % 2, torch.arange(rows) % 2, torch.arange(rows) // 2 % 2
    retained = centres[labels] + torch.randn(rows, width)
    forgotten = centres[relabelled] + shifts[own, relabelled] + torch.randn(rows, width)
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1)]
    found = differences(forgotten, own, relabelled, retained, labels, pairs)
    assert torch.allclose(found.T.float(), shifts.reshape(4, width), atol=0.2)
    change = least_leak(found, -found, (retained.T @ retained).double() / rows).dense()  # the layer is the identity
    after_f, after_r = (x.double() + x.double() @ change.T for x in (forgotten, retained))
    left = differences(after_f, own, relabelled, after_r, labels, pairs)
    assert float(left.norm()) < 1e-6 * float(found.norm())
    apart = (after_r[labels == 0].mean(0) - after_r[labels == 1].mean(0)).norm()
    assert float(apart) > 0.3 * float((centres[0] - centres[1]).norm())  # the classes stay apart


def test_shifts_of_the_output_that_move_the_features() -> None:
    jacobian, wanted = torch.randn(5, 9), torch.randn(5, 2)
    assert torch.allclose(jacobian.double() @ output_shifts(jacobian, wanted, ridge=1e-6), wanted.double(), atol=1e-3)
    stuck = jacobian.clone()
    stuck[0] *= 1e-4  # a feature that hardly moves is given up, not paid for with all the others
    assert float(output_shifts(stuck, wanted).norm()) < 3 * float(output_shifts(jacobian, wanted).norm())


def test_classes_with_enough_rows_of_both_kinds() -> None:
    relabelled, own = torch.tensor([0] * 60 + [1] * 39 + [2]), torch.full((100,), 9)
    assert shared_pairs(own, relabelled, torch.tensor([0, 1, 2])) == [(9, 0), (9, 1)]
    assert shared_pairs(own, relabelled, torch.tensor([1, 2])) == [(9, 1)]
    both = shared_pairs(
        torch.cat([own, torch.full((10,), 5)]), torch.cat([relabelled, torch.full((10,), 2)]), torch.arange(3)
    )
    assert both == [(5, 2), (9, 0), (9, 1)]  # a small class counts by its own rows
    with pytest.raises(UNSCError, match="pseudo_labels: no retained class takes two of the 100 forgotten rows"):
        shared_pairs(own, relabelled, torch.tensor([2, 3]))
    spread = torch.cat([torch.arange(40).repeat(5), torch.full((3,), 7), torch.full((2,), 9)])
    few = shared_pairs(torch.zeros_like(spread), spread, torch.arange(40))  # none takes 5 %
    assert len(few) == 8
    assert {(0, 7), (0, 9)} <= set(few)


def test_ridge_makes_few_rows_invertible() -> None:
    x = torch.randn(3, 20, dtype=torch.float64)
    assert float(torch.linalg.cond(ridged(x.T @ x))) < 1e4
    assert isinstance(least_leak(torch.randn(20, 1), torch.randn(4, 1), x.T @ x), LowRank)
