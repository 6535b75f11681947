"""Metrics of answers: by hand, by their properties, and against numbers that open-unlearning gave."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.language import Data, answer_logits, make_lm
from hypothesis import given
from hypothesis import strategies as st

from unsc_hf import UNSCError
from unsc_hf.data.dialogues import AnswerCollator
from unsc_hf.evaluation.language.flips import TokenFlips, count_token_flips, join_token_flips, token_flips
from unsc_hf.evaluation.language.knowledge import (
    exact_memorization,
    extraction_strength,
    forget_quality,
    model_utility,
    normalised_probability,
    perplexity,
    probability,
    rouge,
    truth_ratio,
    truth_ratio_of_forgotten,
    truth_ratio_of_kept,
)
from unsc_hf.evaluation.language.membership import auc, min_k, min_k_plus_plus, privleak, zlib_ratio
from unsc_hf.evaluation.language.readings import AnswerReading, gradient_norms, read_rows

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
NUMBERS: dict[str, dict[str, Any]] = GOLDEN["numbers"]

close = pytest.approx


def numbers(metric: str, key: str) -> list[Any]:
    return [row[key] for row in NUMBERS[metric].values()]


# ---- by hand ---------------------------------------------------------------------------------------------------------
def test_rouge_counts_stems_of_ascii_words() -> None:
    assert rouge("The cat sat.", "the CAT sat")["rougeL_recall"] == 1.0
    assert rouge("sat the cat", "the cat sat")["rougeL_recall"] == close(2 / 3)
    assert rouge("sat the cat", "the cat sat")["rouge1_recall"] == 1.0
    assert rouge("a dog", "the cat")["rougeL_recall"] == 0.0
    assert rouge("one two three four", "two four six eight")["rougeL_recall"] == 0.5
    assert rouge("she writes books", "she is writing a book")["rougeL_recall"] == close(3 / 5)
    assert rouge("Beltr", "Beltrán")["rougeL_recall"] == 0.5
    assert rouge("a", "")["rougeL_recall"] == 0.0


def test_memorised_tokens() -> None:
    assert extraction_strength([True] * 4) == exact_memorization([True] * 4) == 1.0
    assert extraction_strength([False, True, True, True]) == exact_memorization([False, True, True, True]) == 0.75
    assert extraction_strength([True, True, True, False]) == 0.25, "the floor is one token"
    assert extraction_strength([False] * 4) == 0.25
    assert exact_memorization([False] * 4) == 0.0
    for metric in (extraction_strength, exact_memorization):
        with pytest.raises(UNSCError, match="no token of its own"):
            metric([])


def test_probabilities_and_ratios() -> None:
    assert probability([math.log(0.5), math.log(0.125)]) == close(0.25)
    assert normalised_probability(0.2, [0.1, 0.1]) == close(0.5)
    assert truth_ratio([1.0], [1.0, 1.0]) == close(1.0)
    assert truth_ratio([1.0], [2.0]) == close(math.exp(-1))
    assert truth_ratio_of_forgotten([0.5, 2.0, 1.0]) == close(2 / 3)
    assert truth_ratio_of_kept([0.5, 2.0, 0.0]) == close(0.5)
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == math.inf


def test_quality_and_utility() -> None:
    ratios = np.linspace(0, 1, 40)
    assert forget_quality(ratios, ratios) == 1.0
    assert forget_quality(ratios, ratios + 2) < 1e-10
    assert model_utility([0.5] * 9) == close(0.5)
    assert model_utility([1.0] * 8 + [0.0]) == 0.0


def test_membership_scores() -> None:
    log_probs = [-1.0, -2.0, -3.0, -4.0, -5.0]
    assert min_k(log_probs) == 4.5
    assert min_k(log_probs, 0.01) == 5.0, "at least one token"
    assert min_k_plus_plus(log_probs, [0.0] * 5, [4.0] * 5) == 2.25
    assert auc([0.0, 1.0], [2.0, 3.0]) == 1.0
    assert auc([0.0, 1.0], [0.0, 1.0]) == 0.5
    assert privleak(0.5) == 0.0
    assert privleak(1.0, 0.75) == close(-100)


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_what_is_extracted_is_memorised(recited: list[bool]) -> None:
    strength, exact = extraction_strength(recited), exact_memorization(recited)
    assert 1 / len(recited) - 1e-12 <= strength <= max(exact, 1 / len(recited)) + 1e-12


def test_token_flips_are_counted_and_bounded() -> None:
    before = torch.randn(50, 7)
    same = count_token_flips(before, before * 2)
    assert (same.tokens, same.changed, same.share) == (50, 0, 0.0)
    assert same.drift > 0
    assert same.upper_95 == close(1 - 0.05 ** (1 / 50))
    after = before.clone()
    after[:5, 0] = 20.0
    before[:5, 0] = -20.0
    some = count_token_flips(before, after)
    log_p, log_q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    assert some.changed == 5
    assert some.drift == close(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    parts = [count_token_flips(before[rows], after[rows]) for rows in (slice(0, 20), slice(20, 50))]
    assert join_token_flips(parts) == TokenFlips(50, 5, close(some.drift))
    with pytest.raises(UNSCError, match=r"logits: shapes \(0, 7\)"):
        count_token_flips(before[:0], after[:0])


def test_flips_of_models_are_those_of_their_logits(token_data: Data) -> None:
    original, model, rows = make_lm(), make_lm(), token_data[0]
    expected = count_token_flips(answer_logits(original, rows), answer_logits(model, rows))
    found = token_flips(original, model, list(rows), 1, batch_size=5)
    assert (found.tokens, found.changed) == (expected.tokens, expected.changed)
    assert found.drift == close(expected.drift, rel=1e-4)


# ---- against open-unlearning ----------------------------------------------------------------------------------------
def test_rows_agree_with_open_unlearning() -> None:
    right, wrong = numbers("forget_Q_A_PARA_Prob", "avg_loss"), numbers("forget_Q_A_PERT_Prob", "avg_loss")
    expected = numbers("forget_truth_ratio", "score")
    assert [truth_ratio([a], b) for a, b in zip(right, wrong, strict=True)] == close(expected, rel=1e-5)
    pairs = zip(numbers("ra_Q_A_Prob", "prob"), numbers("ra_Q_A_PERT_Prob", "prob"), strict=True)
    assert [normalised_probability(*pair) for pair in pairs] == close(numbers("ra_Q_A_Prob_normalised", "prob"))
    assert [probability([-loss]) for loss in right] == close(numbers("forget_Q_A_PARA_Prob", "prob"), rel=1e-5)
    for row in NUMBERS["forget_Q_A_ROUGE"].values():
        ours = rouge(row["generation"], row["ground_truth"])
        assert ours == close({name: row[name] for name in ours}, abs=1e-12)
    for row in GOLDEN["zlib"]:
        assert zlib_ratio(row["loss"], row["text"]) == close(row["score"], abs=1e-12)


def test_aggregates_agree_with_open_unlearning() -> None:
    ratios = GOLDEN["ratios"]
    assert forget_quality(ratios["partial"], ratios["retrained"]) == close(GOLDEN["forget_quality"], rel=1e-9)
    for model, expected in GOLDEN["forget_truth_ratio"].items():
        assert truth_ratio_of_forgotten(ratios[model]) == close(expected, abs=1e-9)
    assert truth_ratio_of_kept(GOLDEN["retain_ratios"]) == close(GOLDEN["retain_Truth_Ratio"], abs=1e-9)
    found = auc(GOLDEN["min_k"]["forget"], GOLDEN["min_k"]["holdout"])
    assert found == close(GOLDEN["mia_min_k"])
    assert privleak(found) == close(GOLDEN["privleak"]["retrained"])
    assert privleak(1.0, found) == close(GOLDEN["privleak"]["partial"])


# ---- from a model ---------------------------------------------------------------------------------------------------
def test_readings_are_what_the_model_says(token_data: Data) -> None:
    """One row at a time, without padding, gives the same as batches; and the mean loss is the model's own."""
    model, rows = make_lm().eval(), list(token_data[0])
    together = read_rows(model, rows, 1, batch_size=7)
    for row, reading in zip(rows, together, strict=True):
        batch = AnswerCollator(1)([row])
        with torch.no_grad():
            out = model(**batch)
        assert reading.loss == close(float(out.loss), rel=1e-5)
        hidden = batch["labels"][0, 1:] != -100
        log_p = out.logits[0, :-1][hidden].double().log_softmax(-1)
        assert reading.recited.tolist() == (log_p.argmax(-1) == batch["labels"][0, 1:][hidden]).tolist()
        mean = (log_p.exp() * log_p).sum(-1)
        assert reading.mean == close(mean.numpy(), rel=1e-4)
        assert reading.variance == close(((log_p - mean[:, None]).square() * log_p.exp()).sum(-1).numpy(), rel=1e-3)
        assert len(reading.without_last().log_probs) == len(reading.log_probs) - 1


def test_gradient_norms_leave_no_trace(token_data: Data) -> None:
    model, rows = make_lm(), list(token_data[0])[:3]
    frozen = next(model.parameters()).requires_grad_(False)
    found = gradient_norms(model, rows)
    assert not frozen.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(found) == 3
    assert min(found) > 0


def test_a_reading_has_one_value_for_each_token() -> None:
    reading = AnswerReading(np.array([-1.0, -3.0]), np.array([True, False]), np.zeros(2), np.ones(2))
    assert reading.loss == 2.0
