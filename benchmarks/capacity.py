"""What well-known models would need, by arithmetic from rates measured now on this machine.

    python benchmarks/capacity.py --threads 1

Bytes and operations hold on any machine; seconds are those of this one. Writes JSON and a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unsc_hf.nullspace.moments import SecondMoment
from unsc_hf.nullspace.rules import descending_eigh

OUTPUT = Path(__file__).parent / "results" / "speed" / "capacity"
ROWS = 1_000_000  # activation rows that enter the statistics
TOKENS = 8_000  # a step
KEPT = 0.5  # share of directions kept: the dearest projector


@dataclass(frozen=True)
class Shape:
    """Layers of one block: (width of the input, widths of the outputs that share it), and the number of blocks."""

    blocks: int
    inputs: tuple[tuple[int, tuple[int, ...]], ...]


def _vit(blocks: int, width: int) -> Shape:
    return Shape(blocks, ((width, (width,) * 3), (width, (width,)), (width, (4 * width,)), (4 * width, (width,))))


def _llama(blocks: int, width: int, keys: int, inner: int) -> Shape:
    return Shape(
        blocks,
        ((width, (width, keys, keys)), (width, (width,)), (width, (inner, inner)), (inner, (width,))),
    )


MODELS = {
    "ViT-B/16": _vit(12, 768),
    "ViT-L/16": _vit(24, 1024),
    "Llama-3-8B": _llama(32, 4096, 1024, 14336),
    "Llama-3-70B": _llama(80, 8192, 1024, 28672),
}


def operations(shape: Shape) -> dict[str, float]:
    """Bytes and floating-point operations; a multiply-add counts two."""
    widths = [d for d, _ in shape.inputs]
    weights = sum(d * sum(out) for d, out in shape.inputs)
    kept = {d: min(KEPT, 1 - KEPT) * d for d in widths}
    return {
        "trained_weights": shape.blocks * weights,
        "moment_bytes": shape.blocks * sum(8 * d * d for d in widths),
        "largest_moment_bytes": 8 * max(widths) ** 2,
        "start_and_projector_bytes": shape.blocks * (4 * weights + sum(4 * d * kept[d] for d in widths)),
        "adapter_projector_bytes": shape.blocks * sum(4 * d * kept[d] for d in widths),
        "forward_operations": 2.0 * shape.blocks * weights * ROWS,
        "moment_operations": 2.0 * shape.blocks * sum(d * d for d in widths) * ROWS,
        "decomposition_cubes": float(shape.blocks * sum(d**3 for d in widths)),
        "step_operations": 6.0 * shape.blocks * weights * TOKENS,
        "projection_operations": shape.blocks * sum(4.0 * d * kept[d] * sum(out) for d, out in shape.inputs),
    }


def rates() -> dict[str, float]:
    """Operations a second in float32 products and in moments, and seconds of an eigendecomposition by width cubed."""

    def median(run: Callable[[], Tensor | SecondMoment], repeats: int = 5) -> float:
        run()
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    a, b = torch.randn(4096, 768), torch.randn(768, 3072)
    rows, moment = torch.randn(1, 8192, 1024), SecondMoment.zeros(1, 1024)
    matrix = SecondMoment.zeros(1, 1024).update(torch.randn(1, 2048, 1024)).matrix
    return {
        "float32_operations_per_second": 2 * 4096 * 768 * 3072 / median(lambda: a @ b),
        "moment_operations_per_second": 2 * 8192 * 1024**2 / median(lambda: moment.update(rows)),
        "eigh_seconds_per_cube": median(lambda: descending_eigh(matrix)[1], 3) / 1024**3,
    }


def seconds(needed: dict[str, float], rate: dict[str, float]) -> dict[str, float]:
    """What the operations take at these rates."""
    flops, moments = rate["float32_operations_per_second"], rate["moment_operations_per_second"]
    return {
        "forward": needed["forward_operations"] / flops,
        "statistics": needed["forward_operations"] / flops + needed["moment_operations"] / moments,
        "decomposition": needed["decomposition_cubes"] * rate["eigh_seconds_per_cube"],
        "step": needed["step_operations"] / flops,
        "projection": needed["projection_operations"] / flops,
    }


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown."""
    lines = [
        "| model | trained weights | moments, float64 | of these the largest | start and projectors "
        "| adapters: projectors | "
        f"statistics of {ROWS:,} rows | decomposition | step of {TOKENS:,} tokens | projection of displacements |",
        "|" + "---|" * 10,
    ]
    for name, part in found.items():
        n, s = part["needed"], part["seconds"]
        sizes = [
            f"{n[key] / 1e9:.2f} GB"
            for key in ("moment_bytes", "largest_moment_bytes", "start_and_projector_bytes", "adapter_projector_bytes")
        ]
        times = [f"{s['statistics'] / 3600:.1f} h ({s['statistics'] / s['forward']:.2f} x the forward pass)"]
        times += [
            f"{s['decomposition'] / 60:.0f} min",
            f"{s['step']:.0f} s",
            f"{100 * s['projection'] / s['step']:.1f} %",
        ]
        lines.append(f"| {name} | {n['trained_weights'] / 1e6:,.0f} M | {' | '.join([*sizes, *times])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file without ending")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rate = rates()
    needed = {name: operations(shape) for name, shape in MODELS.items()}
    found = {name: {"needed": n, "seconds": seconds(n, rate)} for name, n in needed.items()}
    machine = {"cores": os.cpu_count(), "architecture": platform.machine(), "torch": torch.__version__}
    record = {
        "command": f"python benchmarks/capacity.py --threads {options.threads}",
        "machine": machine,
        "rates": rate,
        "models": found,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(table(found) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
