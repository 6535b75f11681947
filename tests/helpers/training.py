"""Trainers for tests, and what they promise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback

from helpers.models import exact_logits, logits, relative
from unsc_hf import UNSCConfig, UNSCTrainer

Data = tuple[Dataset, Dataset]


def make_trainer(
    model: PreTrainedModel | str,
    data: Data,
    folder: Path,
    eval_dataset: Any = None,
    statistics: Any = None,
    callbacks: Any = None,
    trainer_kwargs: Any = None,
    **options: Any,
) -> UNSCTrainer:
    settings: dict[str, Any] = {
        "energy": 1.0,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 16,
        "max_rows_per_class": None,
        "max_leak": None,
        "target_forget_accuracy": 0.0,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **options,
    }
    return UNSCTrainer(
        model=model,
        args=UNSCConfig(output_dir=str(folder), **settings),
        forget_dataset=data[0],
        retain_dataset=data[1],
        eval_dataset=eval_dataset,
        statistics=statistics,
        callbacks=callbacks,
        **(trainer_kwargs or {}),
    )


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
    trainer = make_trainer(model, data, folder, check_steps=100, **options)
    trainer.train()
    network = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    return Drift(relative(read(network, retain), before), relative(read(network, forget), before_forget))


def assert_promise(measured: Drift) -> None:
    """Retained outputs stay, to 1e-6 in plain float32; forgotten ones move."""
    assert measured.retain <= 1e-6
    assert measured.forget > 0.02


EXACT = {
    "sgd": {"optim": "sgd", "learning_rate": 1e-2},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 4e-3},
    "adamw with decay": {"optim": "adamw_torch", "weight_decay": 0.1},
    "fused adamw with decay": {"optim": "adamw_torch_fused", "weight_decay": 0.1},
    "adafactor": {"optim": "adafactor", "weight_decay": 0.1},
    "clipping": {"optim": "adamw_torch", "max_grad_norm": 1e-3},
    "accumulation": {"optim": "adamw_torch", "gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
    "activation checkpointing": {"optim": "adamw_torch", "activation_checkpointing": True},
    "concatenated bases": {"optim": "adamw_torch", "subspace_rule": "class_energy"},
}


class Stop(TrainerCallback):
    """Ends the run after some step, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


COMPILED = {
    "torch_compile": True,
    "torch_compile_backend": "aot_eager",
}  # traces and differentiates; no C++ compiler is needed


GOOD = {
    "fsdp_version": 2, "cpu_ram_efficient_loading": False, "activation_checkpointing": False,
    "state_dict_type": "FULL_STATE_DICT", "mixed_precision_policy": None,
}  # fmt: skip
