"""Flips count changed decisions among the remaining classes; the bound holds as often as it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from unsc_hf import UNSCError
from unsc_hf.evaluation.flips import count_flips, upper_bound


def test_flips_are_counted_among_the_remaining_classes() -> None:
    labels = torch.tensor([0, 1, 2, 0, 2])
    before = torch.eye(4)[[0, 1, 2, 1, 0]] * 3.0  # right, right, right, wrong, wrong
    after = torch.eye(4)[[1, 1, 2, 0, 1]] * 3.0  # wrong now, right, right, right now, still wrong
    before[:, 3] = 100 * torch.rand(5)  # the forgotten class would win everywhere
    after[:, 3] = -100.0
    flips = count_flips(before, after, labels, [3])
    assert (flips.rows, flips.changed, flips.negative, flips.positive) == (5, 3, 1, 1)
    assert flips.share == 0.6
    assert flips.negative_share == 0.2
    assert flips.drift == pytest.approx(float((after[:, :3] - before[:, :3]).norm() / before[:, :3].norm()))


def test_the_same_logits_flip_nothing_and_an_order_counts() -> None:
    logits, labels = torch.randn(50, 6), torch.randint(6, (50,))
    same = count_flips(logits, logits.clone(), labels, [1])
    assert (same.changed, same.negative, same.positive, same.drift) == (0, 0, 0, 0.0)
    other = torch.randn(50, 6)
    there, back = count_flips(logits, other, labels, [1]), count_flips(other, logits, labels, [1])
    assert there.changed == back.changed > 0
    assert (there.negative, there.positive) == (back.positive, back.negative)


@pytest.mark.parametrize(
    ("count", "rows", "bound"), [(0, 1000, 0.00299), (3, 1000, 0.00773), (17, 40, 0.567), (5, 5, 1.0), (0, 1, 0.95)]
)
def test_the_bound_is_clopper_and_pearsons(count: int, rows: int, bound: float) -> None:
    exact = binomtest(count, rows, alternative="less").proportion_ci(0.95, "exact").high
    assert upper_bound(count, rows) == pytest.approx(exact) == pytest.approx(bound, rel=2e-3)


def test_the_bound_holds_in_at_least_95_of_100_draws() -> None:
    share = float(np.random.default_rng(int(torch.randint(2**31, ()))).uniform(0.002, 0.2))
    seen = torch.distributions.Binomial(300, torch.tensor(share)).sample((4000,))
    held = np.mean([upper_bound(int(count), 300) >= share for count in seen])
    assert held >= 0.95 - 0.015  # four standard deviations of the mean


def test_rows_that_cannot_be_compared_are_refused() -> None:
    logits, labels = torch.randn(3, 2), torch.zeros(3, dtype=torch.long)
    for before, after, truth, gone in (
        (logits, logits[:2], labels, []), (logits, logits, labels[:2], []), (logits, logits, labels, [0, 1]),
        (logits[:0], logits[:0], labels[:0], []),
    ):  # fmt: skip
        with pytest.raises(UNSCError, match="^logits: "):
            count_flips(before, after, truth, gone)
