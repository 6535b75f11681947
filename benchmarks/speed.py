"""What unlearning costs, one question a command.

Ratios are measured side by side in one run, and their medians are kept.

    python benchmarks/speed.py statistics   # the statistics pass against a plain forward pass
    python benchmarks/speed.py step         # a projected step against a plain Trainer step, full weights and adapters
    python benchmarks/speed.py memory       # peak memory against plain fine-tuning, full weights and adapters
    python benchmarks/speed.py growth       # seconds against rows, width, depth, classes and requests, with a picture
    python benchmarks/speed.py processes    # one process against two
    python benchmarks/speed.py algebra      # eigh of moments against SVD of rows; streaming against a loop over patches
    python benchmarks/speed.py whole RUN... # unlearning against retraining, from output folders of the recipes

`--threads` sets torch's threads, `--output` where the JSON goes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from PIL import Image as PILImage
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from unsc_hf import ActivationStatistics, UNSCConfig, UNSCTrainer
from unsc_hf.data.inputs import default_collator, prepare_dataset
from unsc_hf.models.layers import ProtectedLayer, find_layers, row_geometry
from unsc_hf.nullspace.lora import LoraProjection
from unsc_hf.nullspace.moments import SecondMoment
from unsc_hf.nullspace.projection import NullSpaceProjection
from unsc_hf.nullspace.rules import build_subspace, descending_eigh
from unsc_hf.nullspace.subspace import LayerSubspace, Subspace
from unsc_hf.reporting.plots import BLUE, save

RESULTS = Path(__file__).parent / "results" / "speed"
VIT_B_TOKENS = 197
Seconds = dict[str, list[float]]


# ---- measuring -----------------------------------------------------------------------------------------------------


def side_by_side(variants: dict[str, Callable[[], Any]], repeats: int) -> Seconds:
    """Processor seconds of each variant, in turn (A B A B ...).

    What else the machine does counts for little, and falls on all alike.
    """
    seconds: Seconds = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    return seconds


def ratios(seconds: Seconds, base: str) -> dict[str, float]:
    """Median over rounds of each variant's time by the base's in the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(values, seconds[base], strict=True))
        for name, values in seconds.items()
    }


def peak_bytes() -> int:
    """Largest resident size this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak


# ---- models and rows -------------------------------------------------------------------------------------------------


def vit_b(labels: int = 10) -> ViTForImageClassification:
    """ViT-B/16 at 224 pixels, random weights: 197 tokens of width 768 an image."""
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(num_labels=labels)).eval()


def vit(
    width: int = 128, depth: int = 4, labels: int = 10, image: int = 28, patch: int = 7, biased_to: int | None = None
) -> ViTForImageClassification:
    """A smaller one; `biased_to` makes it take everything for one class, so that there is something to forget."""
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=4 * width,
            image_size=image,
            patch_size=patch, num_channels=3, num_labels=labels,
        )
    ).eval()  # fmt: skip
    if biased_to is not None:
        with torch.no_grad():
            model.classifier.bias[biased_to] += 10
    return model


def noise(rows: int, side: int, classes: int, first: int = 0) -> Dataset:
    """Images of noise, `rows` over the classes in turn, from class `first` on."""
    rng = np.random.default_rng(rows)
    pixels = rng.integers(0, 256, (rows, side, side, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[f"class {c}" for c in range(first + classes)])})
    labels = [first + i % classes for i in range(rows)]
    return Dataset.from_dict({"image": [PILImage.fromarray(p) for p in pixels], "label": labels}, features=features)


def processor(side: int) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": side, "width": side})


def random_subspace(layers: Sequence[ProtectedLayer], share: float) -> Subspace:
    """Subspaces that keep this share of every layer's directions; layers of one width share a random basis."""
    bases: dict[int, LayerSubspace] = {}
    for layer in layers:
        width = layer.geometry.width
        if width not in bases:
            basis, _ = torch.linalg.qr(torch.randn(1, width, width, dtype=torch.float64))
            bases[width] = LayerSubspace(basis, (round(share * width),), 0.0, None, 1.0)
    keys = {layer.name: str(layer.geometry.width) for layer in layers}
    return Subspace({str(width): space for width, space in bases.items()}, keys)


# ---- a) statistics ---------------------------------------------------------------------------------------------------


def ask_statistics(options: argparse.Namespace) -> dict[str, Any]:
    """`--images` images of one class through ViT-B/16, with the default budget of rows."""
    model, reader = vit_b(), processor(224)
    rows = noise(options.images, 224, 1)
    prepared, collate = prepare_dataset(rows, reader, model, "label"), default_collator(reader)
    budget = UNSCConfig.rows_per_direction

    def plain() -> None:
        with torch.no_grad():
            for batch in DataLoader(prepared, batch_size=options.batch, collate_fn=collate):
                model(pixel_values=batch["pixel_values"])

    def collect() -> None:
        ActivationStatistics.collect(
            model, rows, label_column="label", processing_class=reader, batch_size=options.batch, progress=False,
            dtype=UNSCConfig(output_dir="unused").product_dtype, rows_per_direction=budget,
        )  # fmt: skip

    seconds = side_by_side({"forward": plain, "statistics": collect}, options.repeats)
    found = {"seconds": seconds, "ratios": ratios(seconds, "forward")}
    return {**found, "images": options.images, "rows_per_direction": budget}


# ---- b) one step -----------------------------------------------------------------------------------------------------


class _Clock(TrainerCallback):
    """Processor seconds of each optimiser step, and of the two projections in it."""

    def __init__(self, projection: NullSpaceProjection) -> None:
        self.projection = projection
        self.seconds: Seconds = {"step": [], "gradients": [], "displacement": []}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.process_time()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.measure("displacement", self.projection.project_displacements)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds["step"].append(time.process_time() - self._started)

    def measure(self, name: str, run: Callable[[], None]) -> None:
        started = time.process_time()
        run()
        self.seconds[name].append(time.process_time() - started)


class _ProjectedTrainer(Trainer):
    """The real Trainer, with the gradient projection where `UNSCTrainer` has it."""

    clock: _Clock

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.clock.measure("gradients", self.clock.projection.project_gradients)
        return loss


def _step_ratios(seconds: Seconds) -> dict[str, float]:
    """Of a step with one projection, the other, or both against the same step without them; medians over steps."""
    rows = list(zip(seconds["step"], seconds["gradients"], seconds["displacement"], strict=True))
    plain = [step - gradients - displacement for step, gradients, displacement in rows]
    return {
        "gradients": statistics.median(1 + row[1] / base for row, base in zip(rows, plain, strict=True)),
        "displacement": statistics.median(1 + row[2] / base for row, base in zip(rows, plain, strict=True)),
        "both": statistics.median(row[0] / base for row, base in zip(rows, plain, strict=True)),
    }


def _plain_arguments(folder: str, batch: int, steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder, use_cpu=True, max_steps=steps, per_device_train_batch_size=batch, save_strategy="no",
        report_to="none", disable_tqdm=True, remove_unused_columns=False, learning_rate=1e-4, optim="adamw_torch",
        logging_strategy="no",
    )  # fmt: skip


def ask_step(options: argparse.Namespace) -> dict[str, Any]:
    """ViT-B/16, `--images` a step (41 are 8,077 tokens), AdamW, half of all directions kept, the dearest case."""
    rows = noise(options.images, 224, 10)
    found: dict[str, Any] = {
        "images": options.images,
        "tokens": options.images * VIT_B_TOKENS,
        "share_kept": options.kept,
    }
    for kind in ("full weights", "adapters"):
        model: nn.Module = vit_b()
        if kind == "adapters":
            model = get_peft_model(vit_b(), LoraConfig(r=8, target_modules="all-linear"))
        layers = find_layers(model).layers
        trained = {layer.weight_name for layer in layers}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained or ".lora_B." in name)
        subspace = random_subspace(layers, options.kept)
        if kind == "adapters":
            moments = {key: SecondMoment(torch.eye(int(key), dtype=torch.float64)[None], 1) for key in subspace.layers}
            projection: NullSpaceProjection = LoraProjection(model, layers, subspace, moments)
        else:
            projection = NullSpaceProjection(layers, subspace)
        clock = _Clock(projection)
        reader = processor(224)
        with tempfile.TemporaryDirectory() as folder:
            trainer = _ProjectedTrainer(
                model=model,
                args=_plain_arguments(folder, options.images, options.repeats + 1),
                train_dataset=prepare_dataset(rows, reader, vit_b(), "label"),
                data_collator=default_collator(reader),
                callbacks=[clock],
            )
            trainer.clock = clock
            trainer.train()
        seconds = {name: values[1:] for name, values in clock.seconds.items()}  # the first step warms up
        found[kind] = {"seconds": seconds, "ratios": _step_ratios(seconds)}
    return found


# ---- d) memory -------------------------------------------------------------------------------------------------------


def ask_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak resident size of a child process, without what it had before the model; ViT-B/16, `--images` a step."""
    found: dict[str, Any] = {"images": options.images, "tokens": options.images * VIT_B_TOKENS}
    for kind in ("full weights", "adapters"):
        peaks = {}
        for what in ("fine-tuning", "unlearning"):
            words = [
                "_memory",
                "--images",
                options.images,
                "--threads",
                options.threads,
                "--what",
                what,
                "--kind",
                kind,
            ]
            done = subprocess.run(
                [sys.executable, __file__, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True
            )
            peaks[what] = json.loads(done.stdout.splitlines()[-1])["peak"]
        found[kind] = {"bytes": peaks, "ratio": peaks["unlearning"] / peaks["fine-tuning"]}
    return found


def child_memory(options: argparse.Namespace) -> None:
    """One run, and what it took."""
    reader, rows = processor(224), noise(2 * options.images, 224, 1)
    before = peak_bytes()
    model, adapters = vit_b(), LoraConfig(r=8, target_modules="all-linear") if options.kind == "adapters" else None
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "fine-tuning":
            prepared = prepare_dataset(rows, reader, model, "label")
            tuned: Any = model if adapters is None else get_peft_model(model, adapters)
            Trainer(
                model=tuned, args=_plain_arguments(folder, options.images, 2), train_dataset=prepared,
                data_collator=default_collator(reader),
            ).train()  # fmt: skip
        else:
            config = UNSCConfig(
                output_dir=folder, use_cpu=True, max_steps=2, check_steps=2, per_device_train_batch_size=options.images,
                disable_tqdm=True, report_to="none", max_leak=None, per_device_eval_batch_size=16,
                target_forget_accuracy=0.0, validation_fraction=0.2,
            )  # fmt: skip
            retain = noise(32, 224, 2, first=1)
            UNSCTrainer(
                model, config, rows.cast_column("label", retain.features["label"]), retain, processing_class=reader,
                peft_config=adapters,
            ).train()  # fmt: skip
    print(json.dumps({"peak": peak_bytes() - before}))


# ---- e) growth -------------------------------------------------------------------------------------------------------


def _seconds(run: Callable[[], Any], repeats: int) -> float:
    run()
    return statistics.median(side_by_side({"": run}, repeats)[""])


def _growth_in_rows(repeats: int) -> Iterator[tuple[int, float]]:
    model, reader = vit(), processor(28)
    for rows in (500, 1000, 2000, 4000):
        data = noise(rows, 28, 10)
        yield rows, _seconds(lambda data=data: _collect(model, data, reader), repeats)


def _growth_in_classes(repeats: int) -> Iterator[tuple[int, float]]:
    reader = processor(28)
    for classes in (5, 10, 20, 40, 80):
        data, model = noise(2000, 28, classes), vit(labels=classes)
        yield classes, _seconds(lambda d=data, m=model: _collect(m, d, reader), repeats)


def _collect(model: Any, data: Dataset, reader: Any) -> ActivationStatistics:
    return ActivationStatistics.collect(model, data, label_column="label", processing_class=reader, progress=False)


def _growth_in_width(repeats: int) -> Iterator[tuple[int, float]]:
    for width in (256, 512, 1024, 2048):
        moment = SecondMoment.zeros(1, width).update(torch.randn(1, 2 * width, width, dtype=torch.float64))
        yield width, _seconds(lambda m=moment: build_subspace({"a": {"k": m}}, {"k": "k"}, energy=0.99), repeats)


def _growth_in_depth(repeats: int) -> Iterator[tuple[int, float]]:
    for depth in (2, 4, 8, 16):
        layers = find_layers(vit(depth=depth)).layers
        projection = NullSpaceProjection(layers, random_subspace(layers, 0.5))
        yield depth, _seconds(projection.project_displacements, 5 * repeats)


def _growth_in_requests(repeats: int) -> Iterator[tuple[int, float]]:
    """Requests of one class each, served one after another from statistics that were collected once."""
    stored = _collect(vit(labels=40), noise(1600, 28, 40), processor(28))

    def serve(requests: int) -> None:
        left = stored
        for group in list(stored.moments)[:requests]:
            left = left.without_groups([group])
            left.subspace(energy=0.99)

    for requests in (1, 2, 4, 8, 16):
        yield requests, _seconds(lambda n=requests: serve(n), repeats)


GROWTH = {
    "rows": (_growth_in_rows, 1, "statistics pass"),
    "classes": (_growth_in_classes, 1, "statistics pass, as many rows in more classes"),
    "width": (_growth_in_width, 3, "decomposition of one layer"),
    "depth": (_growth_in_depth, 1, "projection after a step"),
    "requests": (_growth_in_requests, 1, "subtraction and decomposition"),
}


def ask_growth(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds against each size, and the exponent of the straight line through their logarithms."""
    found: dict[str, Any] = {}
    for name, (measure, limit, what) in GROWTH.items():
        points = list(measure(options.repeats))
        sizes, seconds = np.log([p[0] for p in points]), np.log([p[1] for p in points])
        found[name] = {
            "what": what, "points": points, "exponent": float(np.polyfit(sizes, seconds, 1)[0]),
            "expected_at_most": limit,
        }  # fmt: skip
        print(f"{name}: exponent {found[name]['exponent']:.2f}, expected at most {limit}", flush=True)
    _plot_growth(found, options.output / "growth.png")
    return found


def _plot_growth(found: dict[str, Any], file: Path) -> None:
    canvas = Figure(figsize=(3.1 * len(found), 3.0), layout="constrained")
    axes = canvas.subplots(1, len(found))
    for axis, (name, part) in zip(axes, found.items(), strict=True):
        sizes, seconds = zip(*part["points"], strict=True)
        axis.loglog(sizes, seconds, "o-", color=BLUE)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_yticks([seconds[0], seconds[-1]], [f"{seconds[0]:.3g}", f"{seconds[-1]:.3g}"])
        axis.set_xlabel(name)
        axis.set_title(f"{part['what']}\nexponent {part['exponent']:.2f}", fontsize=8)
    axes[0].set_ylabel("seconds")
    save(canvas, file)


# ---- f) processes ----------------------------------------------------------------------------------------------------


def ask_processes(options: argparse.Namespace) -> dict[str, Any]:
    """The same request in one process and in two, one thread each; seconds inside the run, without imports."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for _ in range(options.repeats):
        for world in (1, 2):
            words = [__file__, "_process", "--threads", "1"]
            if world > 1:
                words = ["-m", "torch.distributed.run", "--nproc_per_node", str(world), "--standalone", *words]
            done = subprocess.run(
                [sys.executable, *words], check=True, stdout=subprocess.PIPE, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            line = next(line for line in done.stdout.splitlines() if line.startswith('{"statistics"'))
            for phase, value in json.loads(line).items():
                seconds.setdefault(phase, {}).setdefault(str(world), []).append(value)
    speed = {
        phase: statistics.median(a / b for a, b in zip(v["1"], v["2"], strict=True)) for phase, v in seconds.items()
    }
    return {"seconds": seconds, "speed_of_two": speed}


def child_process(options: argparse.Namespace) -> None:
    """Statistics, labels, 10 steps of 128 rows and evaluation: 6 layers of width 256, 65 tokens an image."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    reader, names = processor(64), 10
    retain, forget = noise(1800, 64, names - 1), noise(600, 64, 1, first=names - 1)
    retain = retain.cast_column("label", forget.features["label"])
    with tempfile.TemporaryDirectory() as folder:
        config = UNSCConfig(
            output_dir=folder, use_cpu=True, disable_tqdm=True, report_to="none", max_steps=10, check_steps=5,
            max_leak=None, per_device_train_batch_size=128 // world, per_device_eval_batch_size=128 // world,
            lr_doubling_steps=None, learning_rate=1e-6,
        )  # fmt: skip
        trainer = UNSCTrainer(
            vit(256, 6, names, image=64, patch=8, biased_to=names - 1),
            config,
            forget,
            retain,
            {"forget": forget, "retain": retain},
            processing_class=reader,
        )
        trainer.accelerator.wait_for_everyone()
        marks = [time.perf_counter()]
        plan = trainer.prepare_unlearning()
        marks.append(time.perf_counter())
        trainer.train()
        marks.append(time.perf_counter())
        trainer.evaluate()
        trainer.certify()
        trainer.accelerator.wait_for_everyone()
        marks.append(time.perf_counter())
        if trainer.is_world_process_zero():
            phases = dict(zip(("preparation", "unlearning", "evaluation"), np.diff(marks).tolist(), strict=True))
            print(
                "\n" + json.dumps({"statistics": plan.seconds["statistics"], **phases, "whole": marks[-1] - marks[0]}),
                flush=True,
            )


# ---- g) algebra ------------------------------------------------------------------------------------------------------


def looped_patches(x: Tensor, width: int) -> Tensor:
    """Patches of a 3 x 3 kernel by a plain loop over images and positions, as released code for this method has it."""
    padded, side = nn.functional.pad(x, (1, 1, 1, 1)).numpy(), x.shape[-1]
    columns = np.zeros((width, len(x) * side * side))
    at = 0
    for image in range(len(x)):
        for i in range(side):
            for j in range(side):
                columns[:, at] = padded[image, :, i : i + 3, j : j + 3].reshape(-1)
                at += 1
    return torch.from_numpy(columns)


def ask_algebra(options: argparse.Namespace) -> dict[str, Any]:
    """The same null space two ways, and the same rows of a convolution two ways."""
    torch.manual_seed(0)
    rows = torch.randn(10_000, 768, dtype=torch.float64) * torch.logspace(0, -3, 768, dtype=torch.float64)

    def by_moment() -> Tensor:
        return descending_eigh(SecondMoment.zeros(1, 768).update(rows[None]).matrix)[1]

    def by_svd() -> Tensor:
        return torch.linalg.svd(rows.T, full_matrices=False)[0]

    bases = side_by_side({"eigh of the moment": by_moment, "svd of the rows": by_svd}, options.repeats)

    patches = {}
    for channels, side in ((3, 32), (64, 16), (128, 8)):
        conv = nn.Conv2d(channels, 128, 3, padding=1).double()
        geometry = row_geometry(conv)
        assert geometry is not None
        layer, x = ProtectedLayer("conv", conv, geometry), torch.randn(32, channels, side, side, dtype=torch.float64)
        seconds = side_by_side(
            {"unfolded": partial(layer.rows, x), "loop over positions": partial(looped_patches, x, geometry.width)},
            options.repeats + 1,
        )
        found = {name: values[1:] for name, values in seconds.items()}  # the first round warms up
        patches[f"{channels} channels of {side} x {side}"] = {
            "seconds": found, "loop_by_unfold": ratios(found, "unfolded")["loop over positions"],
        }  # fmt: skip
    return {
        "bases": {
            "seconds": bases, "svd_by_eigh": ratios(bases, "eigh of the moment")["svd of the rows"],
            "shape": list(rows.shape),
        },
        "patches": patches,
    }  # fmt: skip


# ---- c) the whole ----------------------------------------------------------------------------------------------------


def ask_whole(options: argparse.Namespace) -> dict[str, Any]:
    """From finished runs of the recipes that trained their reference on the same machine (`--train_retrained`)."""
    found = {}
    for folder in options.runs:
        results = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
        seconds = results["seconds"]
        retraining = results["retrained_references"][0]["seconds"]
        found[Path(folder).name] = {
            "retraining": retraining,
            "unlearning": seconds,
            "times_faster": retraining / sum(seconds.values()),
            "steps": results["steps"],
        }
    return found


QUESTIONS = {
    "statistics": ask_statistics,
    "step": ask_step,
    "whole": ask_whole,
    "memory": ask_memory,
    "growth": ask_growth,
    "processes": ask_processes,
    "algebra": ask_algebra,
}
CHILDREN = {"_memory": child_memory, "_process": child_process}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=[*QUESTIONS, *CHILDREN])
    parser.add_argument("runs", nargs="*", help="finished output folders, for 'whole'")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that are counted")
    parser.add_argument(
        "--images", type=int, default=None, help="images: 200 of one class for 'statistics', 41 a step otherwise"
    )
    parser.add_argument("--batch", type=int, default=32, help="images a forward pass")
    parser.add_argument("--kept", type=float, default=0.5, help="share of directions kept, for 'step'")
    parser.add_argument("--what", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.images = options.images or (200 if options.question == "statistics" else 41)
    torch.set_num_threads(options.threads)
    if options.question in CHILDREN:
        CHILDREN[options.question](options)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    found = QUESTIONS[options.question](options)
    shown = [Path(word).name for word in options.runs]
    words = [options.question, *shown, "--threads", str(options.threads), "--repeats", str(options.repeats)]
    command = f"python benchmarks/speed.py {' '.join(words)}"
    machine = {"cores": os.cpu_count(), "architecture": platform.machine(), "torch": torch.__version__}
    record = {"command": command, "threads": options.threads, "machine": machine, **found}
    (options.output / f"{options.question}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
