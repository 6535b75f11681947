"""Audits: what each number means, on inputs whose answer is known; and all of them on a tiny model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.models import learned, make_vit
from helpers.rows import Data, separable
from transformers import DefaultDataCollator, PreTrainedModel

from unsc_hf.comparison.summary import judge_method
from unsc_hf.evaluation.audits import AUDITS, Examination, calibrate, relearning
from unsc_hf.evaluation.audits.relearning import STEPS, rounded, with_fresh_rows
from unsc_hf.evaluation.audits.similarity import jensen_shannon, linear_cka
from unsc_hf.models.outputs import Outputs, RowOutputs, collect_outputs


@pytest.fixture(scope="module")
def rows() -> Data:
    draw = separable()
    return draw(30), draw(20)


@pytest.fixture(scope="module")
def original(rows: Data) -> PreTrainedModel:
    return learned(rows[0])


def collect(model: PreTrainedModel, data: Dataset) -> Outputs:
    return collect_outputs(model, data, DefaultDataCollator(), features=True)


def batches(data: Dataset, size: int, seed: int) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randperm(len(data), generator=generator)[:size].tolist()
        yield DefaultDataCollator()(data.__getitems__(chosen))


def examination(
    model: PreTrainedModel, original: PreTrainedModel, rows: Data, references: list[PreTrainedModel]
) -> Examination:
    train, test = rows
    forget, retain = train.select(range(60, 90)), train.select(range(60))

    def all_rows(one: PreTrainedModel) -> RowOutputs:
        return RowOutputs(collect(one, forget), collect(one, retain), collect(one, test))

    return Examination(
        model, all_rows(model), all_rows(original), [all_rows(one) for one in references], [2], forget, retain, test,
        collect, batches,
    )  # fmt: skip


def test_a_model_that_knows_is_told_from_one_that_does_not(rows: Data, original: PreTrainedModel) -> None:
    blank = make_vit()
    with torch.no_grad():  # it says "cat" to everything: a head drawn at random may tell two of three classes apart
        blank.classifier.weight.zero_()
        blank.classifier.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    readings = {}
    chosen = calibrate(examination(original, original, rows, []), AUDITS.values())
    assert set(chosen) == {"relearning"}
    for name, model in (("knows", original), ("blank", blank)):
        exam = replace(examination(model, original, rows, [make_vit(), make_vit()]), calibration=chosen)
        readings[name] = {audit.name: audit.run(exam) for audit in AUDITS.values()}
    knows, other = readings["knows"], readings["blank"]
    assert knows["quantisation"]["int8"] > 0.9
    assert knows["relearning"]["area"] > other["relearning"]["area"]
    assert knows["relearning"]["steps_to_80"] <= STEPS
    assert len(knows["relearning"]["curve"]) == 9
    assert 0 <= knows["relearning"]["head_area"] <= 1
    assert knows["prototype"]["shots_10"] > 0.6
    assert knows["fine_tuning"]["AccDut"] > 0.9
    assert {"head", "layer_00", "layer_01", "layer_02"} == set(knows["probe"])
    assert knows["collateral"]["change"] == 0.0
    assert other["collateral"]["change"] < -0.5
    assert other["collateral"]["worst_class"] == 1
    for reading in readings.values():
        assert 0 <= reading["membership"]["auc"] <= 1
        assert 0 <= reading["membership"]["rmia_auc"] <= 1
        assert 0 <= reading["similarity"]["tow"] <= 1
        for found in reading.values():
            numbers = [v for name, v in found.items() if name != "steps_to_80" and not isinstance(v, list)]
            assert all(map(math.isfinite, numbers))


def test_audits_leave_the_model_alone(rows: Data, original: PreTrainedModel) -> None:
    before = {name: value.clone() for name, value in original.state_dict().items()}
    exam = examination(original, original, rows, [])
    for one in AUDITS.values():
        one.run(exam)
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert not original.training
    assert AUDITS["similarity"].run(exam) == {}
    assert "rmia_auc" not in AUDITS["membership"].run(exam)


def test_rmia_finds_a_row_that_only_this_model_knows(rows: Data, original: PreTrainedModel) -> None:
    exam = examination(original, original, rows, [make_vit(), make_vit()])
    memorised = exam.outputs.forget.logits.clone()
    memorised[torch.arange(len(memorised)), exam.outputs.forget.labels] += 20
    weak = exam.outputs.test.logits * 0.01
    outputs = RowOutputs(
        Outputs(memorised, exam.outputs.forget.features, exam.outputs.forget.labels), exam.outputs.retain,
        Outputs(weak, exam.outputs.test.features, exam.outputs.test.labels),
    )  # fmt: skip
    exam = Examination(**{**vars(exam), "outputs": outputs})
    reading = AUDITS["membership"].run(exam)
    assert reading["rmia_auc"] > 0.9
    assert reading["loss_auc"] > 0.95


def test_relearning_takes_the_smallest_rate_that_brings_it_back(rows: Data, original: PreTrainedModel) -> None:
    exam = examination(original, original, rows, [])
    chosen = relearning.choose_rate(exam)
    rate, reached = chosen["learning_rate"], chosen["reached"]
    assert chosen["goal"] == pytest.approx(0.5 * float((exam.outputs.test.logits.argmax(1) == 2)[40:].float().mean()))
    assert float(list(reached)[-1]) == rate
    assert reached[f"{rate:g}"] >= chosen["goal"]
    assert all(best < chosen["goal"] for name, best in reached.items() if float(name) < rate)
    assert f"learning rate {rate:g}" in chosen["summary"]
    curve = AUDITS["relearning"].run(replace(exam, calibration={"relearning": chosen}))["curve"]
    assert curve[-1] == reached[f"{rate:g}"]  # the original itself is taught as everybody is


def test_relearning_that_cannot_bring_the_original_back_is_no_evidence(
    rows: Data, original: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relearning, "RATES", (1e-4, 1e-3))
    monkeypatch.setattr(relearning, "ENOUGH", 1.5)  # more than anybody can reach
    exam = examination(original, original, rows, [])
    chosen = calibrate(exam, AUDITS.values())
    assert chosen["relearning"]["learning_rate"] is None
    summary = "no evidence, in 40 steps no learning rate up to 0.001 brings the original itself back"
    assert summary in chosen["relearning"]["summary"]
    reading = AUDITS["relearning"].run(replace(exam, calibration=chosen))
    assert set(reading) == {"area", "steps_to_80", "head_area"}
    assert all(isinstance(value, float) and math.isnan(value) for value in reading.values())
    silent = [{"per_class": {"2": 0.0}, "audits": {"relearning": reading}}] * 3
    assert judge_method(silent, silent, [2]) == ("suppressed", [])  # what says nothing cannot say "removed"


def test_an_attacker_starts_the_forgotten_rows_of_every_head_anew(original: PreTrainedModel) -> None:
    copy = with_fresh_rows(original, [2])
    assert not copy.classifier.weight[2].any()
    assert float(copy.classifier.bias[2]) == pytest.approx(float(original.classifier.bias[:2].mean()))
    assert torch.equal(copy.classifier.weight[:2], original.classifier.weight[:2])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(5, 7), (6, 3, 2, 2)])
def test_rounding_is_to_the_nearest_of_two_to_the_bits_values(bits: int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    found = rounded(weight, bits)
    scale = weight.flatten(1).abs().amax(1) / (2 ** (bits - 1) - 1)
    error = (found - weight).flatten(1).abs().amax(1)
    assert (error <= scale / 2 * (1 + 1e-5)).all()
    torch.testing.assert_close(rounded(found, bits), found)
    assert max(len(np.unique(np.round((row / s).numpy()))) for row, s in zip(found, scale, strict=True)) <= 2**bits


def test_cka_ignores_rotation_and_scale_and_sees_independence() -> None:
    x = torch.randn(400, 6)
    turned = 3.0 * x @ torch.linalg.qr(torch.randn(6, 6)).Q + torch.randn(6)
    assert linear_cka(x, turned) == pytest.approx(1.0, abs=1e-5)
    assert linear_cka(x, torch.randn(400, 6)) < 0.2
    assert linear_cka(x, torch.zeros(400, 2)) == 0.0


def test_jensen_shannon_is_zero_for_equals_and_one_bit_for_disjoint_distributions() -> None:
    logits = torch.randn(9, 4)
    assert jensen_shannon(logits, logits + 5.0) == pytest.approx(0.0, abs=1e-9)
    a, b = torch.zeros(2, 2), torch.zeros(2, 2)
    a[:, 0], b[:, 1] = 1e4, 1e4
    assert jensen_shannon(a, b) == pytest.approx(1.0)
