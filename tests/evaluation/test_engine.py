"""The one evaluation, on outputs made by hand: every number comes from the rows it should come from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.rows import tensor_dataset
from torch import Tensor
from transformers import EvalPrediction

from unsc_hf.evaluation.accuracy import macro_accuracy
from unsc_hf.evaluation.audits import AUDITS, Examination
from unsc_hf.evaluation.engine import EvaluationRows, evaluate_outputs, output_metrics
from unsc_hf.evaluation.verdict import mean_result
from unsc_hf.models.outputs import Outputs, RowOutputs
from unsc_hf.tasks.causal_lm import CausalLMTask
from unsc_hf.tasks.classification import ClassificationTask

FORGOTTEN = [2]
HEAD = (3 * torch.eye(3, 6), torch.zeros(3))  # what it is matters to the prototype attack alone


def predict(labels: Tensor, right: float, confidence: float, doubt: float | None = None) -> Tensor:
    """Logits: the first `right` of each class's rows are right; every other row has `doubt` instead of `confidence`."""
    logits = torch.zeros(len(labels), 3)
    for c in labels.unique().tolist():
        rows = (labels == c).nonzero()[:, 0]
        wrong = torch.arange(len(rows)) >= right * len(rows)
        strength = torch.full((len(rows),), confidence)
        strength[1::2] = confidence if doubt is None else doubt
        logits[rows, torch.where(wrong, (c + 1) % 3, c)] = strength
    return logits + 0.02 * torch.rand(len(labels), 3)


def features(labels: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Rows of each class lie along an axis of their own."""
    return 3 * torch.eye(6)[torch.tensor(axes)[labels]] + 0.3 * torch.randn(len(labels), 6)


@pytest.fixture
def outputs() -> RowOutputs:
    """In the features of test rows, classes 0 and 2 have changed places."""
    forget, retain = torch.full((200,), 2), torch.arange(400) % 2
    test = torch.arange(600) % 3
    return RowOutputs(
        Outputs(predict(forget, 0.25, 8.0, 1.0), features(forget, (0, 1, 2)), forget),
        Outputs(predict(retain, 0.75, 8.0), features(retain, (0, 1, 2)), retain),
        Outputs(predict(test, 0.5, 1.0), features(test, (2, 1, 0)), test),
    )


def test_every_number_comes_from_its_own_rows(outputs: RowOutputs) -> None:
    # Half of the forgotten training rows are as confident as other training rows, the other half as unseen rows are.
    found = evaluate_outputs(outputs, HEAD, FORGOTTEN, 0.1, 7.0)
    assert (found.AccDf, found.AccDr, found.AccDut, found.AccDrt) == (0.25, 0.75, 0.5, 0.5)
    assert found.per_class == {0: 0.5, 1: 0.5, 2: 0.5}
    assert (found.leak, found.seconds) == (0.1, 7.0)
    assert found.mia_auc == pytest.approx(0.75, abs=0.1)
    # With members and others exchanged, the following would be near zero. More than a half are unsure rows by chance.
    assert 0.5 <= found.mia_tpr_at_1pct_fpr < 0.65
    # Training rows teach that this is class 0, test rows would teach that it is class 2.
    assert found.probe_forget < 0.1
    assert found.prototype_attack_10 < 0.1


def test_what_forgotten_test_rows_are_called(outputs: RowOutputs) -> None:
    found = evaluate_outputs(outputs, HEAD, FORGOTTEN, None, None)
    assert found.answers == {2: {2: 0.5, 0: 0.5}}  # a wrong answer is the next class
    other = replace(found, answers={2: {1: 1.0}})
    assert mean_result([found, other]).answers == {2: {2: 0.25, 0: 0.25, 1: 0.5}}
    assert mean_result([replace(found, answers=None)] * 2).answers is None
    assert output_metrics(outputs, [])["answers"] is None  # single rows were forgotten


def test_test_accuracies_are_kept_apart(outputs: RowOutputs) -> None:
    test = outputs.test
    known = replace(outputs, test=replace(test, logits=predict(test.labels, 1.0, 1.0)))
    known.test.logits[test.labels == 2] = torch.tensor([1.0, 0.0, 0.0])
    found = output_metrics(known, FORGOTTEN)
    assert (found["AccDut"], found["AccDrt"]) == (0.0, 1.0)
    assert found["per_class"] == {0: 1.0, 1: 1.0, 2: 0.0}


def test_single_rows_are_accused_beside_half_of_the_test_rows(outputs: RowOutputs) -> None:
    found = evaluate_outputs(outputs, HEAD, [], None, None)
    assert (found.AccDf, found.AccDut, found.AccDrt) == (0.25, None, 0.5)
    assert 0.5 <= found.mia_tpr_at_1pct_fpr < 0.65
    assert (found.probe_forget, found.prototype_attack_10) == (None, None)


def test_a_model_that_diverged_has_no_attacks(outputs: RowOutputs) -> None:
    broken = replace(outputs, test=replace(outputs.test, features=torch.full((600, 6), torch.nan)))
    found = evaluate_outputs(broken, HEAD, FORGOTTEN, None, None)
    assert (found.mia_auc, found.probe_forget, found.prototype_attack_10) == (None, None, None)
    assert found.AccDut == 0.5


def test_audits_and_single_runs_agree_on_a_quantity(outputs: RowOutputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unsc_hf.evaluation.audits.probe.head_weights", lambda *_: HEAD)
    empty: Any = None
    exam = Examination(empty, outputs, outputs, [], FORGOTTEN, empty, empty, empty, empty, empty)
    found = evaluate_outputs(outputs, HEAD, FORGOTTEN, None, None)
    membership = AUDITS["membership"].run(exam)
    assert (membership["auc"], membership["tpr_at_1pct_fpr"]) == (found.mia_auc, found.mia_tpr_at_1pct_fpr)
    assert AUDITS["prototype"].run(exam)["shots_10"] == found.prototype_attack_10
    monkeypatch.setattr("unsc_hf.evaluation.audits.probe.few_of_each", lambda *_: empty)
    monkeypatch.setattr("unsc_hf.evaluation.audits.probe.forgotten_rows", lambda *_: empty)
    monkeypatch.setattr("unsc_hf.evaluation.audits.probe.hidden_states", lambda *_: ([], empty))
    assert AUDITS["probe"].run(exam) == {"head": found.probe_forget}


def test_every_model_is_evaluated_on_the_same_rows_of_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [0] * 900 + [1] * 300
    train = tensor_dataset(torch.arange(1200.0)[:, None], labels)
    test = tensor_dataset(torch.randn(7, 1), [0] * 7)
    first, again = (EvaluationRows.sample(train, train, test, None) for _ in range(2))
    assert np.bincount(first.forget["label"]).tolist() == [500, 300]
    assert first.forget["pixel_values"] == again.retain["pixel_values"]
    assert len(first.test) == 7
    parts = first.outputs(lambda rows: Outputs(torch.zeros(len(rows), 2), None, torch.as_tensor(rows["label"][:])))
    assert [len(part.labels) for part in (parts.forget, parts.retain, parts.test)] == [800, 800, 7]
    monkeypatch.setattr("unsc_hf.evaluation.engine.ROWS", 300)  # fewer of each where there are many classes
    many = EvaluationRows.sample(tensor_dataset(torch.randn(1200, 1), [*range(30)] * 40), train, test, None)
    assert np.bincount(many.forget["label"]).tolist() == [10] * 30


def test_the_trainer_reports_accuracies_by_modules_of_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    task: Any = None
    logits, labels = torch.randn(50, 4), torch.randint(4, (50,))
    prediction = EvalPrediction(logits.numpy(), labels.numpy())
    found = ClassificationTask.compute_metrics(task, prediction)
    assert found["accuracy"] == macro_accuracy(logits, labels)
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    tokens = np.array([[1, 2, 3, 4], [1, 2, 3, 4]])
    following = np.array([[9, 1, 2, 9], [-100, -100, 2, -100]])
    assert CausalLMTask.compute_metrics(task, EvalPrediction(tokens, following)) == {"accuracy": 0.75}
    for name, used in (("MacroAccuracy", ClassificationTask), ("TokenAccuracy", CausalLMTask)):
        monkeypatch.setattr(f"unsc_hf.evaluation.metrics.{name}._compute", lambda *_, **__: {"accuracy": 7.0})
        given = prediction if used is ClassificationTask else EvalPrediction(tokens, following)
        assert used.compute_metrics(task, given)["accuracy"] == 7.0


def test_changed_decisions_are_counted_on_kept_test_rows_against_the_original(outputs: RowOutputs) -> None:
    labels = outputs.test.labels
    moved = outputs.test.logits.clone()
    rows = (labels == 0).nonzero()[:30, 0]  # of the 400 kept rows; the first 100 of each class are right
    moved[rows] = torch.tensor([0.0, 9.0, 0.0])
    moved[labels == 2] = torch.tensor([9.0, 0.0, 0.0])  # forgotten rows do not count
    moved[:, 2] = -9.0  # nor does the forgotten logit
    now = replace(outputs, test=replace(outputs.test, logits=moved))
    found = evaluate_outputs(now, HEAD, FORGOTTEN, None, None, original=outputs)
    assert (found.flips, found.negative_flips) == (30 / 400, 30 / 400)
    assert found.drift > 0
    same = evaluate_outputs(outputs, HEAD, FORGOTTEN, None, None, original=outputs)
    assert (same.flips, same.negative_flips, same.drift) == (0.0, 0.0, 0.0)
    assert evaluate_outputs(outputs, HEAD, FORGOTTEN, None, None).flips is None
