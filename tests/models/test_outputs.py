"""Running a batch in pieces and keeping prepared rows change nothing but the time."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.architectures import VOCABULARY, build
from helpers.rows import tensor_dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from unsc_hf.comparison.references import training
from unsc_hf.data.inputs import CachedRows, prepare_dataset
from unsc_hf.evaluation.audits import probe
from unsc_hf.models.outputs import Outputs, classify, collect_outputs


def bert() -> PreTrainedModel:
    return build("bert")


def texts(rows: int, longest: int) -> dict[str, torch.Tensor]:
    lengths = torch.randint(1, longest + 1, (rows,))
    lengths[0] = longest
    mask = (torch.arange(longest)[None] < lengths[:, None]).long()
    return {"input_ids": torch.randint(3, VOCABULARY, (rows, longest)) * mask, "attention_mask": mask}


@pytest.mark.parametrize("rows", [3, 8, 29])
def test_pieces_of_like_length_give_the_logits_and_gradients_of_the_batch(rows: int) -> None:
    model, batch = bert(), texts(rows, 17)
    widths: list[int] = []
    model.bert.embeddings.register_forward_hook(lambda _m, _i, output: widths.append(output.shape[1]))
    plain = model(**batch).logits
    logits, order = classify(model, batch)
    torch.testing.assert_close(logits, plain, atol=2e-6, rtol=1e-5)
    assert sorted(order.tolist()) == list(range(rows))
    if rows >= 8:
        assert widths[-1] == 17
        assert sum(widths[1:]) < 4 * 17  # short texts are not padded to the longest
    wanted = torch.autograd.grad(plain.square().sum(), model.classifier.weight)[0]
    torch.testing.assert_close(
        torch.autograd.grad(logits.square().sum(), model.classifier.weight)[0], wanted, atol=1e-5, rtol=1e-4
    )


def test_probed_hidden_states_stay_beside_their_labels() -> None:
    model, batch, labels = bert(), texts(40, 11), torch.arange(40)
    exam: Any = SimpleNamespace(model=model, batches=lambda rows, size, seed: iter([{**batch, "labels": labels}]))
    states, found = probe.hidden_states(exam, labels)
    assert sorted(found.tolist()) == list(range(40))
    with torch.no_grad():
        whole = model(**batch, output_hidden_states=True).hidden_states
    assert len(states) == len(whole) == 3
    for state, expected in zip(states, whole, strict=True):
        pooled = probe.pool(expected, batch["attention_mask"])
        torch.testing.assert_close(state, pooled[found], atol=2e-6, rtol=1e-5)


def test_features_stay_beside_their_rows() -> None:
    model, batch, labels = bert(), texts(40, 11), torch.randint(4, (40,))
    rows = [
        {"input_ids": i[:n], "attention_mask": m[:n], "labels": y}
        for i, m, y, n in zip(
            batch["input_ids"], batch["attention_mask"], labels, batch["attention_mask"].sum(1), strict=True
        )
    ]

    def pad(part: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        names = ("input_ids", "attention_mask")
        padded = {n: torch.nn.utils.rnn.pad_sequence([r[n] for r in part], batch_first=True) for n in names}
        return {**padded, "labels": torch.stack([r["labels"] for r in part])}

    found = collect_outputs(model, rows, pad, features=True, batch_size=20)
    assert torch.equal(found.labels, labels)
    head = model.classifier
    torch.testing.assert_close(found.need_features() @ head.weight.T + head.bias, found.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.logits, model(**batch).logits, atol=2e-6, rtol=1e-5)


def test_rows_are_prepared_once_up_to_the_budget_and_stay_the_same() -> None:
    data = tensor_dataset(torch.randn(12, 3, 4, 4), list(range(3)) * 4)
    read: list[int] = []

    def prepare(rows: Dataset) -> Dataset:
        def transform(batch: dict[str, Any]) -> dict[str, Any]:
            read.extend(batch["label"])
            return {"pixel_values": torch.tensor(batch["pixel_values"]), "labels": batch["label"]}

        return rows.with_format(None).with_transform(transform)

    size = 3 * 4 * 4 * 4 + sys.getsizeof(0)
    rows, wanted = CachedRows(prepare(data), 5 * size), prepare_dataset(data, None, torch.nn.Identity())
    read.clear()  # the first row, for its size
    for _ in range(2):
        for i in range(12):
            assert torch.equal(rows[i]["pixel_values"], wanted[i]["pixel_values"])
            assert rows[i]["labels"] == int(wanted[i]["label"])
    assert len(read) == 5 + 4 * 7  # five are kept; the others are read each of four times
    assert [row["labels"] for row in rows.__getitems__([3, 1, 3])] == [0, 1, 0]


def test_references_train_on_the_loss_of_the_whole_batch(tmp_path: Path) -> None:
    model, batch = bert(), {**texts(29, 17), "labels": torch.randint(4, (29,))}
    found = []
    for kind in (training._Trainer, Trainer):
        trainer = kind(model=model, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"))
        loss = trainer.compute_loss(model, dict(batch))
        found.append((loss.detach(), torch.autograd.grad(loss, model.bert.encoder.layer[0].output.dense.weight)[0]))
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-6, rtol=1e-5)


def test_the_first_rows_are_as_many_as_were_asked_for() -> None:
    outputs = Outputs(torch.randn(9, 4), torch.randn(9, 3), torch.arange(9))
    assert outputs.first(None).labels.tolist() == list(range(9))
    for elements, rows in ((3, 1), (8, 2), (11, 2), (100, 9)):
        part = outputs.first(elements)
        assert (len(part.logits), len(part.need_features()), part.labels.tolist()) == (rows, rows, list(range(rows)))
