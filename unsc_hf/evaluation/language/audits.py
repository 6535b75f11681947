"""Audits of a language model: what it still knows of forgotten answers, and what brings them back.

Most read the same number, `exact_memorization`: the share of a forgotten answer's tokens that are the model's most
likely ones. A model that never saw the answers guesses some too, so numbers are compared with retrained models'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...data.dialogues import AnswerCollator
from ...models.hooks import evaluation_mode
from ...models.layers import row_geometry
from ...models.outputs import read_answers
from ..audits import Reading
from ..audits.relearning import EVERY, RATES, STEPS, rounded
from .answering import generate
from .flips import token_flips
from .knowledge import exact_memorization, rouge
from .readings import read_rows
from .tofu import MissingInputError, TofuEvaluation

Row = dict[str, list[int]]  # `input_ids`, and `labels` on the answer

SHARES = (0.0, 0.25, 0.5)  # of an answer that the prefix attack gives away
LEARNED = 0.9  # exact memorization of the given answers at which relearning counts as strong enough
BLOCK = 64  # weights that share a scale at 4 bits, where a row can be cut so
_RELEARNING = (1e-5, 3e-5, *RATES)


@dataclass(frozen=True)
class AnswerExamination:
    """One language model, and what an audit may compare it with."""

    evaluation: TofuEvaluation  #: the model under audit with its tokenizer and rows
    original: nn.Module  #: the model before unlearning, which reads the same tokens
    shots: int  #: forgotten answers that a relearning attacker has
    rate: float | None = None  #: of relearning, see `choose_rate`; None where no rate is strong enough

    @property
    def forgotten(self) -> list[Row]:
        """Forgotten questions and answers as tokens."""
        return [several[0] for several in self.evaluation.labelled("forget")]

    def given(self) -> tuple[list[Row], list[Row]]:
        """The answers that a relearning attacker has, evenly spaced and at most half of them, and the others."""
        rows = self.forgotten
        shots = max(1, min(self.shots, len(rows) // 2))
        chosen = {int(i) for i in np.linspace(0, len(rows) - 1, shots)}
        return [rows[i] for i in sorted(chosen)], [row for i, row in enumerate(rows) if i not in chosen]

    def known(self, model: nn.Module, rows: Sequence[Row]) -> float:
        """Mean exact memorization of a model on rows."""
        readings = read_rows(model, rows, self.evaluation.pad_token_id, self.evaluation.batch_size)
        return float(np.mean([exact_memorization(reading.without_last().recited) for reading in readings]))


Run = Callable[[AnswerExamination], Reading]


class AnswerAudit(NamedTuple):
    """One audit of a language model; a verdict compares the number called `headline` with retrained models'."""

    title: str
    headline: str | None
    run: Run


ANSWER_AUDITS: dict[str, AnswerAudit] = {}


def _audit(title: str, headline: str | None = None) -> Callable[[Run], Run]:
    def register(run: Run) -> Run:
        ANSWER_AUDITS[run.__name__] = AnswerAudit(title, headline, run)
        return run

    return register


@_audit("tokens recited", headline="exact_memorization")
def answers(exam: AnswerExamination) -> Reading:
    """`exact_memorization`, `extraction_strength` and `probability` of the forgotten answers, see `knowledge`."""
    names = {"probability": "forget_Q_A_Prob"}
    metrics = ("exact_memorization", "extraction_strength", "probability")
    return {name: exam.evaluation.result(names.get(name, name))["agg_value"] for name in metrics}


@_audit("ROUGE-L after half the answer", headline="rouge_l_50")
def prefix(exam: AnswerExamination) -> Reading:
    """`rouge_l_0`, `rouge_l_25`, `rouge_l_50`: ROUGE-L recall of the greedy rest of each forgotten answer, when the
    attacker has its first 0, 25 or 50 % (Carlini et al., arXiv 2012.07805)."""
    evaluation, reading = exam.evaluation, Reading()
    for share in SHARES:
        prompts, truths = [], []
        for start, ids in (several[0] for several in evaluation.tokens("forget")):
            cut = len(start) + int(share * (len(ids) - len(start) - 1))  # one token is left to say
            prompts.append(ids[:cut])
            truths.append(evaluation.decode(ids[cut:]))
        said = generate(
            evaluation.model, prompts, evaluation.pad_token_id, evaluation.tokenizer.eos_token_id,
            evaluation.max_new_tokens, evaluation.batch_size,
        )  # fmt: skip
        scores = [
            rouge(evaluation.decode(ids), truth)["rougeL_recall"] for ids, truth in zip(said, truths, strict=True)
        ]
        reading[f"rouge_l_{100 * share:.0f}"] = float(np.mean(scores))
    return reading


@_audit("recited when asked otherwise", headline="exact_memorization")
def paraphrase(exam: AnswerExamination) -> Reading:
    """`exact_memorization`: of the answers after a paraphrase of their questions, or, where the data have none, of
    paraphrased answers. TOFU's `_perturbed` configurations have both."""
    evaluation = exam.evaluation
    rows = evaluation.rows("forget")
    if "paraphrased_question" not in rows.column_names:
        several = evaluation.readings("forget", "paraphrased_answer")
        return {
            "exact_memorization": float(np.mean([exact_memorization(r[0].without_last().recited) for r in several]))
        }
    asked = rows.remove_columns("question").rename_column("paraphrased_question", "question")
    other = TofuEvaluation(evaluation.model, evaluation.tokenizer, {"forget": asked}, evaluation.prompt_format)
    return {"exact_memorization": exam.known(evaluation.model, [one[0] for one in other.labelled("forget")])}


@_audit("membership attack", headline="loss")
def membership(exam: AnswerExamination) -> Reading:
    """`loss`, `min_k`, `min_k_plus_plus`, `zlib`: AUC of telling forgotten rows from unseen ones, see `membership`."""
    return {name: exam.evaluation.result(f"mia_{name}")["auc"] for name in ("loss", "min_k", "min_k_plus_plus", "zlib")}


@_audit("recited at 4 bits", headline="int4")
def quantisation(exam: AnswerExamination) -> Reading:
    """`int8`, `int4`: exact memorization after rounding to that many bits, which can bring answers back (Zhang et al.,
    arXiv 2410.16454). Weights are rounded symmetrically, with a scale for each output at 8 bits and for each block of
    64 weights at 4. The head stays as it is, as in common quantised models."""
    reading: Reading = {}
    for bits in (8, 4):
        model = merged(exam.evaluation.model)
        head = model.get_output_embeddings()
        with torch.no_grad():
            for module in model.modules():
                if module is not head and row_geometry(module) is not None:
                    weight = module.weight.float()
                    blocks = weight.reshape(-1, BLOCK) if bits == 4 and weight[0].numel() % BLOCK == 0 else weight
                    module.weight.copy_(rounded(blocks, bits).reshape(weight.shape))
        reading[f"int{bits}"] = exam.known(model, exam.forgotten)
    return reading


@_audit("other answers after relearning", headline="area")
def relearning(exam: AnswerExamination) -> Reading:
    """`curve`: exact memorization of the *other* forgotten answers while the model is trained on some of them, every 5
    of 40 steps of AdamW (Łucki et al., arXiv 2409.18025). `area`: its mean. `learned`: of the given answers at the end.
    NaN where no learning rate is strong enough, see `choose_rate`."""
    if exam.rate is None:
        return {"area": math.nan, "learned": math.nan}
    given, others = exam.given()
    curve, model = _relearned(exam, exam.rate, others)
    return {"curve": curve, "area": float(np.mean(curve)), "learned": exam.known(model, given)}


@_audit("tokens changed by merging")
def merge(exam: AnswerExamination) -> Reading:
    """Of an adapter: `flips`, the share of kept answers' tokens that merging it into the base weights changes, and
    `exact_memorization` of the forgotten answers after that. Nothing for other models."""
    model = exam.evaluation.model
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return {}
    whole = merged(model)
    return {"flips": _flips(exam, model, whole), "exact_memorization": exam.known(whole, exam.forgotten)}


@_audit("tokens changed in kept answers")
def kept(exam: AnswerExamination) -> Reading:
    """`flips`: share of kept answers' tokens at which another token than the original's is the most likely one."""
    return {"flips": _flips(exam, exam.original, exam.evaluation.model)}


def examine(exam: AnswerExamination, audits: Sequence[str]) -> dict[str, Reading]:
    """Readings by audit; one whose rows or columns are missing reads nothing."""
    readings: dict[str, Reading] = {}
    for name in audits:
        try:
            readings[name] = ANSWER_AUDITS[name].run(exam)
        except MissingInputError:
            readings[name] = {}
    return readings


def choose_rate(exam: AnswerExamination) -> float | None:
    """The smallest learning rate at which 40 steps teach this model the given answers to 90 %; None where none does.

    It is chosen on a model that does not know them, and then used for all: an attack that cannot teach the given
    answers says nothing about the others.
    """
    given, _ = exam.given()
    return next((rate for rate in _RELEARNING if _relearned(exam, rate, given)[0][-1] >= LEARNED), None)


def merged(model: Any) -> Any:
    """A copy in which adapters are part of the weights."""
    copy = deepcopy(model)
    for module in copy.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    return copy


def _flips(exam: AnswerExamination, before: nn.Module, after: nn.Module) -> float:
    rows = [several[0] for several in exam.evaluation.labelled("retain")]
    return token_flips(before, after, rows, exam.evaluation.pad_token_id, exam.evaluation.batch_size).share


def _relearned(exam: AnswerExamination, rate: float, watched: Sequence[Row]) -> tuple[list[float], nn.Module]:
    """What a model knows of `watched` while a copy is trained on the given answers, and the copy."""
    model = deepcopy(exam.evaluation.model).float().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    device = next(model.parameters()).device
    batch = AnswerCollator(exam.evaluation.pad_token_id)(exam.given()[0])
    inputs = {name: value.to(device) for name, value in batch.items()}
    labels, curve = inputs.pop("labels"), list[float]()
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            curve.append(exam.known(model, watched))
        if step < STEPS:
            optimizer.zero_grad()
            with evaluation_mode(model, gradients=True):  # without dropout every model is attacked alike
                flat = read_answers(model(**inputs).logits, labels)
                nn.functional.cross_entropy(flat.logits.float(), flat.labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return curve, model
