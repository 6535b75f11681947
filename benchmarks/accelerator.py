"""What unlearning costs on a GPU: seconds, memory and certificate of a whole run, beside plain fine-tuning.

    python benchmarks/accelerator.py vit-l                                     # full weights, steps in bf16 autocast
    python benchmarks/accelerator.py llama-1b --adapters                       # float32 weights under adapters
    python benchmarks/accelerator.py llama-8b --adapters --dtype bfloat16      # bfloat16 weights under adapters

Models have the shapes of known ones and random weights, and rows are noise: what is measured does not depend on them.
How well something is forgotten is not measured here. The plain run comes first and trains the same weights on the same
rows; both use the real trainers. Seconds of steps are medians, with the device synchronised; peaks are those of torch's
allocator. The JSON goes to `benchmarks/results/accelerator/`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from speed import noise, processor
from torch.utils.data import DataLoader
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from unsc_hf import UNSCConfig, UNSCTrainer
from unsc_hf.data.dialogues import AnswerCollator, prepare_dialogues
from unsc_hf.data.inputs import default_collator, prepare_dataset
from unsc_hf.evaluation.certificate import Certificate
from unsc_hf.reporting.model_card import versions
from unsc_hf.trainer.checks import Check

RESULTS = Path(__file__).parent / "results" / "accelerator"
VOCABULARY = 128_256
VIT: dict[str, dict[str, int]] = {
    "vit-b": {},
    "vit-l": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
LLAMA: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "tie_word_embeddings": False,
    },
}  # fmt: skip


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def forget_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timed(run: Callable[[], Any]) -> float:
    synchronise()
    started = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - started


class Clock(TrainerCallback):
    """Seconds of each optimiser step, from the first row's forward pass to the weights, projections included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronise()
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronise()
        self.seconds.append(time.perf_counter() - self._started)

    def median(self) -> float:
        return statistics.median(self.seconds[2:])  # the first ones warm up


class Unstopped(UNSCTrainer):
    """Random weights know nothing that could be forgotten: checks say that all is known, so every step is made."""

    def check(self) -> Check:
        return replace(super().check(), forget_accuracy=1.0)


def build(options: argparse.Namespace) -> PreTrainedModel:
    """The same random weights each time, made where they are used."""
    torch.manual_seed(0)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(place):
        torch.set_default_dtype(getattr(torch, options.dtype))
        try:
            if options.model in VIT:
                model: PreTrainedModel = ViTForImageClassification(ViTConfig(num_labels=10, **VIT[options.model]))
            else:
                shape = {**LLAMA[options.model], **({"num_hidden_layers": options.layers} if options.layers else {})}
                model = LlamaForCausalLM(
                    LlamaConfig(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, pad_token_id=2, **shape)
                )
        finally:
            torch.set_default_dtype(torch.float32)
    return model.eval()


def sentences(rows: int, tokens: int, seed: int) -> Dataset:
    """Prompts of a quarter of the tokens, completions of the rest."""
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, (rows, tokens))
    labels = ids.copy()
    labels[:, : tokens // 4] = -100
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist(), "labels": labels.tolist()}
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    vision = options.model in VIT
    model = build(options)
    adapters = None
    if options.adapters:
        adapters = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=options.target_modules)
    if vision:
        reader: Any = processor(224)
        forget = noise(options.forget, 224, 1)
        retain = noise(options.retain, 224, 9, first=1)
        forget = forget.cast_column("label", retain.features["label"])
        rows, collate = prepare_dataset(forget, reader, model, "label"), default_collator(reader)
        kept = prepare_dataset(retain, reader, model, "label")
    else:
        reader, collate = None, AnswerCollator(2)
        forget, retain = (sentences(n, options.tokens, seed) for seed, n in enumerate((options.forget, options.retain)))
        rows, kept = (prepare_dialogues(part, None, True) for part in (forget, retain))
    common: dict[str, Any] = {
        "max_steps": options.steps, "per_device_train_batch_size": options.batch, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False, "learning_rate": 1e-4,
        "optim": "adamw_torch", "bf16": options.autocast, "dataloader_num_workers": options.workers,
    }  # fmt: skip
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        tuned: Any = model if adapters is None else get_peft_model(model, adapters)
        trainer = Trainer(
            model=tuned, args=TrainingArguments(output_dir=folder, logging_strategy="no", **common), train_dataset=rows,
            data_collator=collate, callbacks=[clock],
        )  # fmt: skip
        forget_peak()
        trainer.train()
        found["fine-tuning"] = {"step": clock.median(), "peak": peak(), "steps": clock.seconds}

        loader = DataLoader(kept, batch_size=options.read, collate_fn=collate, num_workers=options.workers)

        def forward(network: Any) -> None:
            with torch.no_grad():
                for batch in loader:
                    network(**{k: v.to(network.device) for k, v in batch.items()})

        forward(tuned.eval())
        found["forward"] = timed(partial(forward, tuned))
        del trainer, tuned, model

        forget_peak()
        model, clock = build(options), Clock()
        config = UNSCConfig(
            output_dir=folder, max_leak=None, check_steps=10 * options.steps, per_device_eval_batch_size=options.read,
            target_forget_accuracy=0.0, **common,
        )  # fmt: skip
        started = time.perf_counter()
        unlearner = Unstopped(
            model, config, forget, retain, processing_class=reader, peft_config=adapters, callbacks=[clock]
        )
        constructing = time.perf_counter() - started
        print(f"constructed in {constructing:.1f} s", flush=True)
        prepared = timed(unlearner.prepare_unlearning)
        preparing = peak()
        print(f"prepared in {prepared:.1f} s", unlearner.plan.seconds, flush=True)
        whole = timed(unlearner.train)
        print(f"trained in {whole:.1f} s", flush=True)
        plan = unlearner.plan
        leak_seconds = timed(unlearner.held_out_leak)
        training = peak()
        certificates: list[Certificate] = []
        certifying = timed(lambda: certificates.append(unlearner.certify()))
        trained = sum(layer.weight.numel() for layer in plan.projection.layers)
        found["unlearning"] = {
            "step": clock.median(), "steps": clock.seconds, "construct": constructing, "prepare": prepared,
            **plan.seconds, "train": whole, "leak": leak_seconds, "certify": certifying,
            "peak while preparing": preparing, "peak": training, "peak while certifying": peak(),
            "layers": len(plan.projection.layers), "inputs": len(plan.subspace.layers), "weights of layers": trained,
            "certificate": {k: v for k, v in certificates[0].to_dict().items() if k != "leak_per_layer"},
        }  # fmt: skip
    found["ratios"] = {
        "statistics to forward": plan.seconds["statistics"] / found["forward"],
        "step": found["unlearning"]["step"] / found["fine-tuning"]["step"],
        "peak": max(preparing, training) / max(found["fine-tuning"]["peak"], 1),
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=[*VIT, *LLAMA])
    parser.add_argument("--adapters", action="store_true", help="train adapters; the weights under them stay")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--target_modules", nargs="+", default="all-linear")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model's weights")
    parser.add_argument("--autocast", action="store_true", help="steps in bf16 autocast")
    parser.add_argument("--forget", type=int, default=128, help="rows to forget")
    parser.add_argument("--retain", type=int, default=512, help="rows to keep")
    parser.add_argument("--tokens", type=int, default=256, help="tokens a row, of language models")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, of language models")
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--read", type=int, default=16, help="rows a forward pass without gradients")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.target_modules != "all-linear" and not options.adapters:
        parser.error("--target_modules goes with --adapters")
    found = measure(options)
    marks = [options.model, "adapters" if options.adapters else "", options.dtype]
    name = "-".join(mark for mark in [*marks, "autocast" if options.autocast else ""] if mark)
    record = {
        "options": {k: v for k, v in vars(options).items() if k != "output"},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
        **found,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    shown = {**found["ratios"], **{k: v for k, v in found["unlearning"].items() if not isinstance(v, list | dict)}}
    print(name, {k: round(v, 4) if isinstance(v, float) else v for k, v in shown.items()})


if __name__ == "__main__":
    main()
