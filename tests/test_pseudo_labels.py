"""A pseudo-label is a remaining class, never the row's own, chosen as its strategy says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unsc_hf import UNSCError
from unsc_hf.outputs import Outputs
from unsc_hf.pseudo_labels import STRATEGIES, pseudo_labels


def _outputs(rows: int, classes: int, labels: torch.Tensor | None = None) -> Outputs:
    return Outputs(
        torch.randn(rows, classes),
        torch.randn(rows, 6),
        torch.randint(classes, (rows,)) if labels is None else labels,
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(4, 8), st.sampled_from(STRATEGIES), st.data())
def test_only_remaining_classes_and_never_the_own(rows: int, classes: int, strategy: str, data: st.DataObject) -> None:
    remaining = sorted(data.draw(st.sets(st.integers(0, classes - 1), min_size=3)))
    forget = _outputs(rows, classes)
    retain = _outputs(30 * len(remaining), classes, torch.tensor(remaining * 30))
    targets = pseudo_labels(strategy, forget, remaining, retain=retain)
    if strategy == "soft":
        torch.testing.assert_close(targets.sum(1), torch.ones(rows))
        assert not targets[torch.arange(rows), forget.labels].any()
        assert not targets[:, [c for c in range(classes) if c not in remaining]].any()
    else:
        assert set(targets.tolist()) <= set(remaining)
        assert not (targets == forget.labels).any()


def test_top1_and_second_follow_the_logits() -> None:
    forget = Outputs(torch.tensor([[9.0, 1.0, 5.0, 7.0], [0.0, 3.0, 2.0, 1.0]]), None, torch.tensor([0, 1]))
    assert pseudo_labels("top1", forget, [1, 2, 3]).tolist() == [3, 2]
    assert pseudo_labels("second", forget, [1, 2, 3]).tolist() == [2, 3]


def test_nearest_mean_finds_the_nearest_class() -> None:
    centres = 10 * torch.eye(4, 6)
    retain = Outputs(
        torch.zeros(30, 4), centres[[1, 2, 3] * 10] + 0.1 * torch.randn(30, 6), torch.tensor([1, 2, 3] * 10)
    )
    forget = Outputs(torch.zeros(3, 4), centres[[3, 1, 2]] + 0.1 * torch.randn(3, 6), torch.zeros(3, dtype=torch.long))
    assert pseudo_labels("nearest_mean", forget, [1, 2, 3], retain=retain).tolist() == [3, 1, 2]


def test_random_is_seeded_and_spreads() -> None:
    forget = _outputs(3000, 5, torch.zeros(3000, dtype=torch.long))
    first, again, other = (pseudo_labels("random", forget, [1, 2, 3, 4], seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.bincount(first, minlength=5)[1:].min() > 600


def test_bad_input() -> None:
    forget = _outputs(4, 3, torch.zeros(4, dtype=torch.long))
    with pytest.raises(UNSCError, match="choose from top1"):
        pseudo_labels("best", forget, [1, 2])
    with pytest.raises(UNSCError, match="needs 1 remaining"):
        pseudo_labels("top1", forget, [0])
    with pytest.raises(UNSCError, match="needs 2 remaining"):
        pseudo_labels("second", forget, [0, 1])
