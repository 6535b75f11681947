"""Trainers for tests, and what they promise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback

from helpers.models import exact_logits, logits, relative
from helpers.rows import Data
from unsc_hf import Split, UNSCConfig, UNSCTrainer

# What is given to the trainer itself, not to its configuration.
_PARTS = {"eval_dataset", "statistics", "callbacks", "peft_config", "unseen_dataset", "processing_class"}


class Known(NamedTuple):
    """A model, the rows that it has learned, and the same rows with class "frog" apart."""

    model: PreTrainedModel
    train: Dataset
    data: Split


def quiet_config(folder: Path, **options: Any) -> UNSCConfig:
    """Options of a run that says nothing, on a CPU unless told otherwise."""
    quiet: dict[str, Any] = {"use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    return UNSCConfig(str(folder), **{**quiet, **options})


def make_trainer(
    model: PreTrainedModel | str, data: Data, folder: Path, trainer_kwargs: Any = None, **options: Any
) -> UNSCTrainer:
    """A trainer of a few steps; options are those of `UNSCConfig`, or parts of the trainer such as `callbacks`."""
    parts = {name: options.pop(name) for name in _PARTS & options.keys()}
    settings: dict[str, Any] = {
        "energy": 1.0, "max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 16,
        "rows_per_direction": None, "max_leak": None, "max_flips": None, "target_forget_accuracy": 0.0, **options,
    }  # fmt: skip
    return UNSCTrainer(model, quiet_config(folder, **settings), data[0], data[1], **parts, **(trainer_kwargs or {}))


def unlearned(model: PreTrainedModel | str, data: Data, folder: Path, **options: Any) -> UNSCTrainer:
    """A trainer that has come to its end."""
    trainer = make_trainer(model, data, folder, **options)
    trainer.train()
    return trainer


def network_of(trainer: UNSCTrainer) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def assert_resumed_run_ends_as_a_whole_one(
    model: PreTrainedModel,
    data: Data,
    folder: Path,
    stop: int,
    prepare: Callable[[UNSCTrainer], object] = lambda trainer: None,
    **options: Any,
) -> UNSCTrainer:
    """One run goes through, another is stopped after some step and resumed; returns the resumed one."""

    def run(place: str, resume: bool = False, **more: Any) -> UNSCTrainer:
        trainer = make_trainer(copy.deepcopy(model), data, folder / place, **options, **more)
        prepare(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    assert run("parts", callbacks=[Stop(stop)]).state.global_step == stop
    rest = run("parts", resume=True)
    assert whole.state.global_step == rest.state.global_step > stop
    expected = whole.model.state_dict()
    for name, tensor in rest.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), (name, float((tensor - expected[name]).abs().max()))
    return rest


@dataclass
class Drift:
    """Relative changes of logits: of retained rows and of forget rows."""

    retain: float
    forget: float


def drift(model: PreTrainedModel, data: Data, folder: Path, double: bool = False, **options: Any) -> Drift:
    """Train for real, with no check that could stop it, and compare the logits before and after."""
    forget, retain = data
    read = exact_logits if double else logits
    before, before_forget = read(model, retain), read(model, forget)
    network = network_of(unlearned(model, data, folder, check_steps=100, **options))
    return Drift(relative(read(network, retain), before), relative(read(network, forget), before_forget))


def assert_promise(measured: Drift) -> None:
    """Retained outputs stay, to 1e-6 in plain float32; forgotten ones move."""
    assert measured.retain <= 1e-6
    assert measured.forget > 0.02


# Traces and differentiates; no C++ compiler is needed.
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
EXACT = {
    "sgd": {"optim": "sgd", "learning_rate": 1e-2},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 4e-3},
    "adamw with decay": {"optim": "adamw_torch", "weight_decay": 0.1},
    "fused adamw with decay": {"optim": "adamw_torch_fused", "weight_decay": 0.1},
    "adafactor": {"optim": "adafactor", "weight_decay": 0.1},
    "clipping": {"optim": "adamw_torch", "max_grad_norm": 1e-3},
    "accumulation": {"optim": "adamw_torch", "gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
    "activation checkpointing": {"optim": "adamw_torch", "activation_checkpointing": True},
    "joined bases": {"optim": "adamw_torch", "subspace_rule": "class_energy"},
    "bfloat16 autocast": {"bf16": True},
    "compiled": COMPILED,
}


class Stop(TrainerCallback):
    """Ends the run after some step, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


GOOD = {
    "fsdp_version": 2, "cpu_ram_efficient_loading": False, "activation_checkpointing": False,
    "state_dict_type": "FULL_STATE_DICT", "mixed_precision_policy": None,
}  # fmt: skip
