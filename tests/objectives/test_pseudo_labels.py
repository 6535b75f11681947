"""A pseudo-label is a remaining class, never the row's own, chosen as its strategy says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unsc_hf import UNSCError
from unsc_hf.models.outputs import Outputs
from unsc_hf.objectives.pseudo_labels import STRATEGIES, MatchedTargets, Matching, margin, pseudo_labels, sparse


def _outputs(rows: int, classes: int, labels: torch.Tensor | None = None) -> Outputs:
    labels = torch.randint(classes, (rows,)) if labels is None else labels
    return Outputs(torch.randn(rows, classes), torch.randn(rows, 6), labels)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(4, 8),
    st.sampled_from([name for name in STRATEGIES if name != "matched"]),
    st.data(),
)
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


def test_temperature_goes_from_the_originals_distribution_to_top1() -> None:
    forget = _outputs(20, 5, torch.arange(20) % 2)
    own = pseudo_labels("soft", forget, [2, 3, 4])
    torch.testing.assert_close(own[:, 2:], forget.logits[:, 2:].softmax(1))
    sharp = pseudo_labels("soft", forget, [2, 3, 4], temperature=1e-6)
    torch.testing.assert_close(sharp.max(1).values, torch.ones(20))
    assert torch.equal(sharp.argmax(1), pseudo_labels("top1", forget, [2, 3, 4]))


def test_nearest_mean_finds_the_nearest_class() -> None:
    centres, labels = 10 * torch.eye(4, 6), torch.tensor([1, 2, 3] * 10)
    retain = Outputs(torch.zeros(30, 4), centres[labels] + 0.1 * torch.randn(30, 6), labels)
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
    for strategy, remaining, message in (
        ("best", [1, 2], "choose from top1"), ("top1", [0], "needs 1 rem"), ("second", [0, 1], "needs 2 rem"),
    ):  # fmt: skip
        with pytest.raises(UNSCError, match=message):
            pseudo_labels(strategy, forget, remaining)


def test_matched_rows_are_known_as_well_as_unseen_ones() -> None:
    """True-label probabilities are distributed like those of unseen rows; better known rows stay better known."""
    classes = 6
    labels = torch.randint(classes, (400,))
    known = torch.nn.functional.one_hot(labels, classes) * (4 + 4 * torch.rand(400, 1)) + torch.randn(400, classes)
    unseen = Outputs(2 * torch.randn(300, classes), None, torch.randint(classes, (300,)))
    forget = Outputs(known, None, labels)
    matching = Matching.of([forget], [unseen])
    found = pseudo_labels("matched", forget, range(classes), matching=matching)
    torch.testing.assert_close(found.sum(1), torch.ones(400))
    true = found.gather(1, labels[:, None])[:, 0]
    expected = unseen.logits.double().softmax(1).gather(1, unseen.labels[:, None])[:, 0]
    for share in (0.1, 0.5, 0.9):
        assert float(true.double().quantile(share)) == pytest.approx(float(expected.quantile(share)), abs=0.05)
    order = margin(forget).argsort()
    assert bool((true[order].diff() >= 0).all())

    # The rest is shared as the original shares it.
    others = known.double().scatter(1, labels[:, None], -torch.inf).softmax(1)
    rest = found.double().scatter(1, labels[:, None], 0.0)
    torch.testing.assert_close(rest / rest.sum(1, keepdim=True), others, rtol=1e-4, atol=1e-6)

    # As many unseen rows as rows to forget: each gets the probability of the same rank, exactly.
    some = Outputs(known[:300], None, labels[:300])
    exact = Matching.of([some], [unseen]).labels(some).gather(1, some.labels[:, None])[:, 0]
    torch.testing.assert_close(exact[margin(some).argsort()], expected.sort().values.float())

    # Followed while the model changes: losses of unseen rows then say how well rows are to be known.
    losses = torch.rand(300, dtype=torch.float64).sort().values
    targets = MatchedTargets(matching, some, found[:300])
    targets.follow(losses)
    follows = targets.now.gather(1, some.labels[:, None])[:, 0].double()
    for share in (0.1, 0.5, 0.9):
        assert float(follows.quantile(share)) == pytest.approx(float((-losses).exp().quantile(share)), abs=0.05)

    # Batches of a large forget set are matched against all of it.
    halves = [Outputs(known[:200], None, labels[:200]), Outputs(known[200:], None, labels[200:])]
    again = Matching.of(halves, [unseen])
    parts = [pseudo_labels("matched", half, range(classes), matching=again) for half in halves]
    assert torch.equal(torch.cat(parts), found)
    with pytest.raises(UNSCError, match="needs unseen_dataset"):
        pseudo_labels("matched", forget, range(classes))


def test_sparse_keeps_the_largest_shares() -> None:
    distribution = torch.rand(5, 30).softmax(1)
    packed = sparse(distribution, 8)
    ids, shares = packed[:, :8].long(), packed[:, 8:]
    assert torch.equal(ids, distribution.topk(8).indices)
    torch.testing.assert_close(shares.sum(1), torch.ones(5, dtype=torch.float64))
