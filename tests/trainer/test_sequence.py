"""Requests one after another: statistics by subtraction, no growing drift, a log, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from helpers.models import logits, make_vit, relative
from helpers.rows import tensor_dataset
from helpers.training import quiet_config
from peft import LoraConfig

from unsc_hf import ActivationStatistics, UNSCConfig, UNSCError, serve_request, split_dataset
from unsc_hf.trainer.sequence import request_digest
from unsc_hf.utils.fingerprint import row_digests, weight_hash

NAMES = list("abcdefghij")


def options(folder: Path, **changes: Any) -> UNSCConfig:
    settings: dict[str, Any] = {
        "energy": 1.0, "max_steps": 3, "learning_rate": 2e-4, "check_steps": 10, "max_leak": None,
        "rows_per_direction": None, "target_forget_accuracy": 0.0,
    }  # fmt: skip
    return quiet_config(folder / "out", **{**settings, **changes})


def rows_of_images(count: int, copies: int = 3) -> list[Dataset]:
    """One small data set for each of `count` images; classes repeat."""
    images = torch.randn(count, 3, 8, 8)
    return [tensor_dataset(image.repeat(copies, 1, 1, 1), [i % 3] * copies, NAMES) for i, image in enumerate(images)]


def test_ten_requests_leave_retained_rows_where_they_were(tmp_path: Path) -> None:
    """Rows, not classes: every request shares its class with rows that stay."""
    model = make_vit(labels=10, hidden=96)
    parts = rows_of_images(13, copies=4)
    kept = concatenate_datasets(parts[10:])
    before = logits(model, kept)
    drifts = []
    for i in range(10):
        retain = concatenate_datasets(parts[i + 1 :])
        moved = logits(model, parts[i])
        serve_request(model, tmp_path / "statistics", options(tmp_path), parts[i], retain)
        assert relative(logits(model, parts[i]), moved) > 1e-3
        drifts.append(relative(logits(model, kept), before))
    assert drifts[0] <= 1e-6
    assert drifts[-1] <= 3e-6  # ten roundings

    # What is stored equals what would be collected now, and holds none of the forgotten rows.
    stored = ActivationStatistics.from_pretrained(tmp_path / "statistics", model)
    fresh = ActivationStatistics.collect(model, kept, progress=False)
    for group, by_key in fresh.moments.items():
        for key, moment in by_key.items():
            assert stored.moments[group][key].rows == moment.rows
            assert relative(stored.moments[group][key].matrix, moment.matrix) < 1e-5
    assert len(stored.requests) == 10
    assert stored.fingerprint.still_held(concatenate_datasets(parts[:10])) == 0
    assert stored.fingerprint.still_held(kept) == 3
    for i, entry in enumerate(stored.requests):
        assert entry["rows"] == 4
        assert entry["digest"] == request_digest(row_digests(parts[i]), entry["salt"])
        assert entry["leak"] < 1e-5


def test_classes_are_dropped_even_with_budgets(tmp_path: Path) -> None:
    model = make_vit(labels=10, hidden=96)
    data = concatenate_datasets(rows_of_images(6, copies=6))
    args = options(tmp_path, rows_per_direction=1)
    forget, retain = split_dataset(data, forget_classes=["a"])
    trainer = serve_request(model, tmp_path / "statistics", args, forget, retain)
    stored = ActivationStatistics.from_pretrained(tmp_path / "statistics", model)
    assert sorted(stored.moments) == ["1", "2"]
    with pytest.raises(UNSCError, match="train releases them"):
        _ = trainer.spaces.retained
    forget, retain = split_dataset(retain, forget_classes=["b"])
    serve_request(model, tmp_path / "statistics", args, forget, retain)
    assert sorted(ActivationStatistics.from_pretrained(tmp_path / "statistics", model).moments) == ["2"]


def test_stale_foreign_and_repeated_requests_are_refused(tmp_path: Path) -> None:
    model, parts = make_vit(labels=10, hidden=96), rows_of_images(8)
    args, folder = options(tmp_path), tmp_path / "statistics"
    serve_request(model, folder, args, parts[0], concatenate_datasets(parts[1:]))
    after = weight_hash(model)
    stored = (folder / "statistics.json").read_text()

    with pytest.raises(UNSCError, match="row 0 was forgotten by an earlier request"):
        serve_request(model, folder, args, parts[0], concatenate_datasets(parts[1:]))
    with pytest.raises(UNSCError, match="collected from weights"):
        serve_request(make_vit(labels=10, hidden=96), folder, args, parts[1], concatenate_datasets(parts[2:]))
    stranger = rows_of_images(1, copies=9)[0]
    with pytest.raises(UNSCError, match="more rows to take out than these statistics hold"):
        serve_request(model, folder, args, stranger, concatenate_datasets(parts[2:]))
    with pytest.raises(UNSCError, match="requests in sequence change the weights"):
        serve_request(model, folder, args, parts[1], parts[2], peft_config=LoraConfig(r=2))
    assert weight_hash(model) == after
    assert (folder / "statistics.json").read_text() == stored


def test_single_rows_need_statistics_without_budgets(tmp_path: Path) -> None:
    model, parts = make_vit(labels=10, hidden=96), rows_of_images(8)
    args = options(tmp_path, rows_per_direction=2, energy=0.9)
    with pytest.raises(UNSCError, match="were collected with a budget"):
        serve_request(model, tmp_path / "statistics", args, parts[0], concatenate_datasets(parts[1:]))


def test_a_request_gets_what_is_left_of_the_budget_and_leaves_nothing_stale(tmp_path: Path) -> None:
    model, parts = make_vit(labels=10, hidden=96), rows_of_images(8)
    args, folder = options(tmp_path, energy=0.9, max_leak=0.5), tmp_path / "statistics"
    first = serve_request(model, folder, args, parts[0], concatenate_datasets(parts[1:]))
    spent = first.certify().leak
    assert spent > 0
    assert (first.args.max_leak, args.max_leak) == (0.5, 0.5)
    assert (tmp_path / "out" / "request-1" / "model.safetensors").is_file()

    second = serve_request(model, folder, args, parts[1], concatenate_datasets(parts[2:]))
    assert second.args.max_leak == pytest.approx(0.5 - spent)
    assert second.certify().max_leak == second.args.max_leak
    assert args.max_leak == 0.5
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["request-2"]
    stored = ActivationStatistics.from_pretrained(folder, model)
    assert [entry["leak"] for entry in stored.requests] == [spent, second.certify().leak]
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]

    args.max_leak = sum(entry["leak"] for entry in stored.requests)
    with pytest.raises(UNSCError, match=rf"2 requests have spent (.*) of the budget {args.max_leak:.3g}; raise it"):
        serve_request(model, folder, args, parts[2], concatenate_datasets(parts[3:]))
