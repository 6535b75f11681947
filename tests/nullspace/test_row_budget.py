"""A budget of rows: how many samples it takes, of which classes, and what may be subtracted under it."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from helpers.language import VOCABULARY, make_lm
from helpers.models import make_vit
from helpers.rows import random_rows

from unsc_hf.errors import UNSCError
from unsc_hf.nullspace import collect
from unsc_hf.nullspace.statistics import ActivationStatistics


def test_the_row_budget_follows_the_layer_that_needs_most_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head reads one row of a sample and is 16 wide: two rows a direction are 32 samples, over three classes."""
    monkeypatch.setattr(collect, "_LEAST_SAMPLES", 20)
    model, data = make_vit(hidden=16, labels=3), random_rows(90)
    pooled = ActivationStatistics.collect(model, data, rows_per_direction=2, pool_as="all", progress=False)
    assert pooled.fingerprint.samples == 32
    assert pooled.moments["all"]["classifier"].rows == 32
    apart = ActivationStatistics.collect(model, data, rows_per_direction=1)  # each class has a subspace of its own
    assert [by_key["classifier"].rows for by_key in apart.moments.values()] == [20, 20, 20]
    everything = ActivationStatistics.collect(model, data, rows_per_direction=100, pool_as="all", progress=False)
    unlimited = ActivationStatistics.collect(model, data, pool_as="all", progress=False)
    for key, moment in unlimited.moments["all"].items():
        assert torch.equal(everything.moments["all"][key].matrix, moment.matrix)


def test_what_small_classes_lack_is_taken_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "_LEAST_SAMPLES", 40)
    data = random_rows(90)
    labels = ["a"] * 80 + [f"one {i}" for i in range(10)]
    statistics = ActivationStatistics.collect(
        make_vit(hidden=16), data, rows_per_direction=1, pool_as="all", groups=labels, progress=False
    )
    assert statistics.fingerprint.samples == 40


def test_padding_does_not_count_as_rows_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine of ten tokens are padding, so ten times as many samples are read."""
    monkeypatch.setattr(collect, "_LEAST_SAMPLES", 1)
    samples = {}
    for real in (20, 2):
        ids = torch.randint(3, VOCABULARY, (300, 20))
        mask = (torch.arange(20) < real).long().expand(300, 20)
        rows = Dataset.from_dict({"input_ids": ids, "attention_mask": mask, "labels": ids}).with_format("torch")
        found = ActivationStatistics.collect(
            make_lm(), rows, groups=["all"] * 300, pool_as="all", rows_per_direction=1, progress=False,
            target_modules=["q_proj"], collate_fn=lambda part: {k: torch.stack([r[k] for r in part]) for k in part[0]},
        )  # fmt: skip
        samples[real] = found.fingerprint.samples
    assert samples == {20: 3, 2: 24}


def test_rows_of_equal_number_are_not_taken_for_the_whole_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a budget as many rows are read of a class as of half of it; taking these out must not drop the class."""
    monkeypatch.setattr(collect, "_LEAST_SAMPLES", 1)
    model, data = make_vit(hidden=16, labels=3), random_rows(60)
    some = ActivationStatistics.collect(
        model, data.select(range(0, 60, 2)), rows_per_direction=1, groups=["0"] * 30, progress=False
    )
    whole = ActivationStatistics.collect(model, data, rows_per_direction=1, groups=["0"] * 60, progress=False)
    assert some.moments["0"]["classifier"].rows == whole.moments["0"]["classifier"].rows
    with pytest.raises(UNSCError, match="take out whole classes"):
        whole - some
