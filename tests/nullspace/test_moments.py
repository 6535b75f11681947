"""Second moments alone: what they say of rows, of each other, and of several processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from unsc_hf.errors import UNSCError
from unsc_hf.nullspace.moments import SecondMoment, rows_at_once, total_moment


def moment(rows: Tensor) -> SecondMoment:
    return SecondMoment.zeros(rows.shape[0], rows.shape[2]).update(rows)


def test_energy_is_that_of_the_outputs() -> None:
    rows, matrix = torch.randn(2, 30, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    assert moment(rows).energy(matrix) == pytest.approx(float((rows @ matrix.mT).square().sum()))
    assert moment(rows).energy(torch.zeros(2, 3, 5)) == 0.0
    small = SecondMoment(-1e-12 * torch.eye(5, dtype=torch.float64)[None])  # rounding of a subtraction
    assert small.energy(torch.ones(1, 1, 5)) == 0.0


def test_the_same_rows_are_told_from_others() -> None:
    rows = torch.randn(1, 30, 5, dtype=torch.float64)
    mine = moment(rows)
    assert mine.same_as(moment(rows.flip(1)))
    assert mine.same_as(replace(mine, matrix=mine.matrix * (1 + 5e-7)))
    assert not mine.same_as(replace(mine, matrix=mine.matrix * (1 + 5e-6)))
    assert not mine.same_as(replace(mine, matrix=-mine.matrix))
    assert not mine.same_as(replace(mine, rows=31))
    assert not mine.same_as(SecondMoment(torch.zeros(1, 6, 6, dtype=torch.float64), 30))
    assert not mine.same_as(moment(torch.randn(1, 30, 5)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_number_anywhere_is_seen(value: float) -> None:
    for group in range(2):
        for column in range(5):
            rows = torch.randn(2, 30, 5)
            assert moment(rows).is_finite()
            rows[group, 7, column] = value
            assert not moment(rows).is_finite()


def test_processes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes with the same rows, each ends with twice the sums."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: tensor.mul_(2))
    mine = moment(torch.randn(1, 30, 5))
    before = mine.clone()
    mine.all_reduce()
    assert mine.rows == 60
    torch.testing.assert_close(mine.matrix, 2 * before.matrix)


def test_sums_leave_their_parts_alone() -> None:
    parts = [moment(torch.randn(1, 30, 5)) for _ in range(3)]
    copies = [part.clone() for part in parts]
    total = total_moment(parts)
    assert total.rows == 90
    torch.testing.assert_close(total.matrix, sum(part.matrix for part in copies))
    back = total.add_(parts[2], sign=-1)
    assert back.rows == 60
    torch.testing.assert_close(back.matrix, copies[0].matrix + copies[1].matrix)
    assert all(torch.equal(part.matrix, copy.matrix) for part, copy in zip(parts, copies, strict=True))
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: total_moment([]), "keep at least one class"),
        (lambda: parts[0].add_(moment(torch.randn(1, 3, 6))), "is 6 wide in one and 5 in the other"),
    ]
    for call, message in refused:
        with pytest.raises(UNSCError, match=message):
            call()


def test_so_many_rows_are_multiplied_at_once() -> None:
    expected = {1: 512, 512: 512, 1024: 1024, 3000: 2796, 2**12: 2048, 2**13: 1024, 2**20: 512}
    assert {width: rows_at_once(width) for width in expected} == expected
