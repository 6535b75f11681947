"""Run by `test_two_processes.py` and `test_gpu.py`, alone and under torchrun: every process writes down its results."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import PreTrainedModel

from helpers.architectures import VOCABULARY, build, text_dataset
from helpers.models import make_vit
from helpers.rows import tensor_dataset
from unsc_hf import ActivationStatistics, UNSCConfig, UNSCTrainer, split_dataset
from unsc_hf.reporting.run_folder import move_model
from unsc_hf.utils.distributed import process
from unsc_hf.utils.fingerprint import weight_hash

ROWS = 61
BATCH = 4  # rows of a step, over all processes
CAREFUL: dict[str, Any] = {
    "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "check_steps": 1000, "lr_doubling_steps": None,
}  # fmt: skip


def images() -> Dataset:
    return tensor_dataset(torch.randn(ROWS, 3, 8, 8), [i % 3 for i in range(ROWS)])


def texts() -> Dataset:
    samples = [torch.randint(3, VOCABULARY, (3 + i % 4,)).tolist() for i in range(ROWS)]
    return text_dataset(samples, [i % 3 for i in range(ROWS)])


def knowing(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, that takes everything for class 2: there is something to forget."""
    with torch.no_grad():
        list(model.parameters())[-1][2] += 2
    return model


@dataclass(frozen=True)
class Case:
    """What is unlearned by one process and by several.

    Attributes:
        forget: arguments of `split_dataset`; single rows come with others that the model never saw.
        kinds: how several processes hold the model.
    """

    model: Callable[[], PreTrainedModel]
    rows: Callable[[], Dataset] = images
    adapters: LoraConfig | None = None
    forget: dict[str, Any] = field(default_factory=lambda: {"forget_classes": [2]})
    options: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("replicated", "sharded")


# Rows of the weights, products of two sharded factors, and weights that are stored transposed.
CASES = {
    "vit": Case(lambda: knowing(make_vit())),
    "adapters": Case(lambda: knowing(make_vit()), adapters=LoraConfig(r=3, lora_alpha=3)),
    "gpt2": Case(lambda: build("gpt2"), texts),
    "rows": Case(
        make_vit,
        forget={"indices": range(2, 7 * 2 * BATCH, 7)},  # whole batches: DDP repeats rows to fill one
        options={"objective": "unsc_retain", "target_forget_accuracy": 0.01},
        kinds=("replicated",),
    ),
}


def unlearn(case: str, folder: Path, sharded: bool = False, resume: bool = False, **options: Any) -> UNSCTrainer:
    """Unlearn class 2, and write what the process ended with into `folder`."""
    given = CASES[case]
    torch.manual_seed(0)
    data, model = given.rows(), given.model()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if sharded:
        options |= {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    config = UNSCConfig(
        output_dir=str(folder), disable_tqdm=True, report_to="none", energy=0.9, seed=1,
        per_device_train_batch_size=BATCH // world, per_device_eval_batch_size=8, learning_rate=3e-3, weight_decay=0.1,
        adam_epsilon=1e-5,  # else Adam blows the rounding of a gradient that is nearly zero up to a whole step
        **{
            "use_cpu": True, "max_steps": 4, "check_steps": 2, "max_leak": None, "rows_per_direction": 10,
            **given.options, **options,
        },
    )  # fmt: skip
    pretending = sharded and config.use_cpu
    if pretending:
        # Accelerate shards where it sees several GPUs; told so, it runs the same code on CPUs.
        assert config.device.type == "cpu"
        AcceleratorState._reset_state()
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    parts = split_dataset(data, **given.forget)
    unseen = given.rows() if "indices" in given.forget else None
    trainer = UNSCTrainer(
        model, config, *parts, eval_dataset=parts._asdict(), unseen_dataset=unseen, peft_config=given.adapters
    )
    trainer.train(resume_from_checkpoint=resume or None)
    write(trainer, folder, process()[0])
    if pretending:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
        AcceleratorState._reset_state()
    return trainer


def write(trainer: UNSCTrainer, folder: Path, rank: int) -> None:
    certificate = trainer.certify()
    metrics = {k: v for k, v in trainer.evaluate().items() if k.endswith(("accuracy", "loss"))}
    move_model(trainer, folder / "model")
    found = {
        "class": type(trainer.model).__name__,
        "hash": weight_hash(trainer.model),
        "metrics": metrics,
        "leak": certificate.leak,
        "drift": certificate.drift.relative,
        "change": certificate.relative_change,
    }
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    save_file({"labels": trainer.plan.pseudo_labels}, folder / f"labels-{rank}.safetensors")


def statistics(folder: Path, dtype: torch.dtype = torch.float64) -> None:
    """Moments of a model in float64, where nothing but the order of the sums can differ."""
    torch.manual_seed(0)
    collect = partial(ActivationStatistics.collect, make_vit().to(dtype), progress=False)
    found = collect(images().with_format("torch", dtype=dtype), rows_per_direction=1, batch_size=4)
    moments = {f"{group}.{key}": m.matrix for group, by_key in found.moments.items() for key, m in by_key.items()}
    part = collect(images().with_format("torch", dtype=dtype), max_memory="1.26MB", pool_as="all")  # in several passes
    moments |= {f"passes.{key}": moment.matrix for key, moment in part.moments["all"].items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(moments, folder / f"moments-{process()[0]}.safetensors")


def main(what: str, folder: Path) -> None:
    if what == "endless":  # saves checkpoints and does not end by itself
        unlearn("vit", folder, max_steps=100_000, **CAREFUL)
        return
    gpu: dict[str, Any] = {"use_cpu": False} if what == "gpu" else {}
    for kind in ("replicated", "sharded"):
        for name, case in CASES.items():
            if kind in case.kinds:
                unlearn(name, folder / kind / name, kind == "sharded", **gpu)
    if not gpu:
        statistics(folder / "statistics")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
