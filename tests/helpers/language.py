"""Tiny language models and their rows."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from helpers.models import randomise
from helpers.rows import Data
from unsc_hf.data.dialogues import IGNORED, AnswerCollator
from unsc_hf.models.outputs import iterate_outputs, read_answers

VOCABULARY = 40


def questions(people: int, start: int = 0) -> Dataset:
    """Invented facts: two questions about each person."""
    towns, jobs = ["Oslo", "Lima", "Bonn", "Kyiv", "Rome"], ["baker", "pilot", "nurse", "poet"]
    rows = []
    for i in range(start, start + people):
        rows.append({"question": f"Where does P{i} live?", "answer": f"P{i} lives in {towns[i % 5]}.", "person": i})
        rows.append({"question": f"What does P{i} do?", "answer": f"P{i} is a {jobs[i % 4]}.", "person": i})
    return Dataset.from_list(rows)


def token_rows(samples: list[tuple[list[int], list[int]]]) -> Dataset:
    """Ready rows of prompt and completion ids."""
    rows = [(p + c, [1] * len(p + c), [IGNORED] * len(p) + c) for p, c in samples]
    return Dataset.from_dict(dict(zip(("input_ids", "attention_mask", "labels"), zip(*rows, strict=True), strict=True)))


def draw_tokens() -> tuple[list[int], list[int]]:
    """A random prompt and completion."""
    lengths = torch.randint(2, 4, (2,)).tolist()
    return tuple(torch.randint(3, VOCABULARY, (n,)).tolist() for n in lengths)  # type: ignore[return-value]


def repeated_tokens() -> Data:
    """Forget rows, and retained rows that repeat two samples: few distinct activations."""
    kept = [draw_tokens(), draw_tokens()]
    return token_rows([draw_tokens() for _ in range(24)]), token_rows(kept * 8)


def make_lm(kind: str = "llama") -> Any:
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 2}
    if kind == "gpt2":
        return randomise(GPT2LMHeadModel(GPT2Config(**common, n_embd=48, n_layer=2, n_head=2, n_positions=32)))
    config = LlamaConfig(
        **common, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    return randomise(LlamaForCausalLM(config))


def answer_logits(model: Any, rows: Dataset) -> torch.Tensor:
    parts = iterate_outputs(model, rows.with_format("torch"), AnswerCollator(1), read=read_answers)
    return torch.cat([part.logits for part in parts])
