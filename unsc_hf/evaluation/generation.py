"""Metrics of a language model's answers: ROUGE-L, extraction strength, perplexity, truth ratio."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.dialogues import DialogueTransform
from ..models.hooks import evaluation_mode
from ..models.outputs import Outputs, token_losses


def words(text: str) -> list[str]:
    """Lower-cased words of letters and digits, as ROUGE counts them."""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L recall: the longest common subsequence of words, as a share of the reference (arXiv 2401.06121).

    For an empty reference it is 1 if the prediction is empty too.
    """
    a, b = words(prediction), words(reference)
    if not b:
        return float(not a)
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1] / len(b)


def extraction_strength(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """Share of an answer that the model recites, given the true tokens before (Carlini et al., arXiv 2012.07805).

    The recited part is the longest ending in which every token is the model's most likely next one. 1 means that the
    whole answer is recited, 0 that its last token is wrong.

    Args:
        predicted: most likely token ids of an answer, each after the true tokens before it.
        labels: its true token ids.
    """
    wrong = [i for i, (ours, true) in enumerate(zip(predicted, labels, strict=True)) if ours != true]
    return 1.0 - (wrong[-1] + 1) / len(labels) if wrong else 1.0


def perplexity(mean_loss: float) -> float:
    """exp of the mean loss of a token; infinite when that overflows."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


def truth_ratio(paraphrased: Sequence[float], perturbed: Sequence[Sequence[float]]) -> float:
    """Mean over questions of p(wrong answers) / p(right answer), bounded by min(r, 1 / r) (TOFU, section 2.2.2).

    Args:
        paraphrased: log-likelihood per token of a paraphrase of the right answer, for each question.
        perturbed: the same of wrong answers to it; their geometric mean is taken.
    """
    ratios = [math.exp(float(np.mean(wrong)) - right) for right, wrong in zip(paraphrased, perturbed, strict=True)]
    return float(np.mean([min(ratio, 1 / ratio) if ratio > 0 else 0.0 for ratio in ratios]))


def token_metrics(outputs: Iterable[Outputs]) -> dict[str, float]:
    """Loss, perplexity, next-token accuracy and extraction strength from outputs on answer tokens."""
    loss = right = total = 0.0
    strengths: list[float] = []
    for part in outputs:
        if part.samples is None:
            raise TypeError("outputs: they have one label for each sample; collect them with read_answers.")
        loss += float(token_losses(part).sum())
        predicted, labels, samples = part.logits.argmax(-1).cpu(), part.labels.cpu(), part.samples.cpu()
        right += int((predicted == labels).sum())
        total += len(labels)
        for sample in torch.unique(samples).tolist():
            mine = samples == sample
            strengths.append(extraction_strength(predicted[mine].tolist(), labels[mine].tolist()))
    mean = loss / total
    return {
        "loss": mean,
        "perplexity": perplexity(mean),
        "token_accuracy": right / total,
        "extraction_strength": float(np.mean(strengths)),
    }


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 64,
    progress: bool = False,
) -> list[str]:
    """Greedy answers to `prompts`, each up to its end-of-text token; prompts are padded on the left."""
    transform = DialogueTransform(tokenizer, True)
    encoded = [transform.encode_prompt(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))  # prompts of like length need little padding
    answers = [""] * len(prompts)
    pad = tokenizer.pad_token_id
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for start in tqdm(range(0, len(order), batch_size), desc="Answers", disable=not progress, leave=False):
            chosen = order[start : start + batch_size]
            longest = max(len(encoded[i]) for i in chosen)
            ids = torch.tensor([[pad] * (longest - len(encoded[i])) + encoded[i] for i in chosen], device=device)
            mask = torch.tensor(
                [[0] * (longest - len(encoded[i])) + [1] * len(encoded[i]) for i in chosen], device=device
            )
            options: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": pad}
            out: Tensor = model.generate(
                input_ids=ids, attention_mask=mask, eos_token_id=tokenizer.eos_token_id, use_cache=True, **options
            )
            for i, text in zip(chosen, tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True), strict=True):
                answers[i] = text.strip()
    return answers
