"""Run by `test_two_processes.py` under torchrun: the same statistics and the same unlearned weights on every rank."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import make_vit, tensor_dataset
from safetensors.torch import save_file

from unsc_hf import ActivationStatistics, UNSCConfig, UNSCTrainer, split_dataset
from unsc_hf.fingerprint import weight_hash
from unsc_hf.sketch import MomentSketch, RowSample


def main(folder: Path) -> None:
    torch.manual_seed(0)
    double = make_vit().double()
    data = tensor_dataset(torch.randn(61, 3, 8, 8), [i % 3 for i in range(61)])
    model = make_vit()
    config = UNSCConfig(
        output_dir=str(folder / "out"), use_cpu=True, disable_tqdm=True, report_to="none", energy=0.9, max_steps=3,
        per_device_train_batch_size=4, optim="sgd", learning_rate=1e-2, check_steps=100, max_leak=None,
    )  # fmt: skip
    trainer = UNSCTrainer(
        model=model,
        args=config,
        forget_dataset=split_dataset(data, [2]).forget,
        retain_dataset=split_dataset(data, [2]).retain,
    )
    statistics = ActivationStatistics.collect(
        double, data.with_format("torch", dtype=torch.float64), max_rows_per_class=40, progress=False
    )
    moments = {f"{group}.{key}": m.matrix for group, by_key in statistics.moments.items() for key, m in by_key.items()}
    for wide_rows in (False, True):  # inputs that do not fit, in several passes
        part = ActivationStatistics.collect(
            double, data.with_format("torch", dtype=torch.float64), max_memory="1.22MB", sketch_size=20, wide_rows=wide_rows,
            pool_as="all", progress=False,
        )  # fmt: skip
        for key, moment in part.moments["all"].items():
            if isinstance(moment, MomentSketch):
                moments |= {f"sketch.{key}": moment.products, f"trace.{key}": moment.trace}
            elif isinstance(moment, RowSample):
                moments[f"sample.{key}"] = moment.filled.contiguous()
                moments[f"stands for.{key}"] = torch.tensor([float(moment.rows)])
    trainer.train()
    rank = dist.get_rank() if dist.is_initialized() else 0
    save_file(moments, folder / f"moments-{rank}.safetensors")
    (folder / f"hash-{rank}").write_text(weight_hash(trainer.accelerator.unwrap_model(trainer.model)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
