"""Statistics of a layer whose input is 14,336 wide, under a memory limit: extra memory, seconds, error bound and rank.

    python benchmarks/wide_layer.py --rows 16384 --max_statistics_memory 2GB 1GB --threads 1 --output_file benchmarks/results/wide_layer.json

A random feed-forward block of a Llama (gate and up read 4,096 wide rows, down reads 14,336 wide ones) is run over random rows whose
energies fall like 1 / i^2 by direction. Each limit, and the same forward pass without statistics, has a process of its own;
extra memory is the difference of their peaks (resident set), the decomposition's told apart. Seconds are the processor's, of all
threads. Under a limit that holds the whole moment the bound is 0 and nothing is decomposed (that takes about 9 width^3
operations); below, the moment is sketched.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from unsc_hf.models.hooks import evaluation_mode
from unsc_hf.models.layers import find_layers
from unsc_hf.nullspace.collect import Pass, stream
from unsc_hf.nullspace.moments import Moment
from unsc_hf.nullspace.sketch import MomentSketch, RandomTransform
from unsc_hf.nullspace.subspace import build_subspace
from unsc_hf.reporting.model_card import versions
from unsc_hf.utils.files import write_text
from unsc_hf.utils.sizes import format_size, parse_size

TOKENS = 128  # rows of one sample


class Block(nn.Module):
    """The feed-forward block of a Llama with random weights."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=intermediate))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(hidden)


class Rows:
    """Samples (TOKENS, hidden) made when they are read: direction i has a standard deviation of 1 / i, then all are turned."""

    def __init__(self, rows: int, hidden: int) -> None:
        self.samples, self.hidden = rows // TOKENS, hidden
        self.scale = torch.arange(1, hidden + 1, dtype=torch.float64).reciprocal()
        self.turn = RandomTransform.make(hidden, hidden, 1)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        rows = torch.randn(TOKENS, self.hidden, generator=generator, dtype=torch.float64) * self.scale
        return {"hidden": (self.hidden**0.5 * self.turn(rows)).float()}


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {"hidden": torch.stack([sample["hidden"] for sample in samples])}


def collect(model: Block, rows: Rows, limit: int | None, batch_size: int) -> tuple[dict[str, Moment], dict[str, str]]:
    """Moments (or sketches) of all inputs by key, and the key of each module."""
    options = Pass(batch_size=batch_size, limit=limit, progress=False)
    members = {"all": np.arange(len(rows))}
    with evaluation_mode(model):
        moments, keys = stream(model, rows, members, find_layers(model).layers, collate, options)
    return moments["all"], keys


def peak() -> int:
    """Largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One process's part: the forward pass alone, or with statistics under a limit."""
    model, rows = Block(options.hidden, options.intermediate), Rows(options.rows, options.hidden)
    started = time.process_time()
    if options.part == "forward":
        with torch.no_grad():
            for first in range(0, len(rows), options.batch_size):
                model(**collate([rows[i] for i in range(first, min(first + options.batch_size, len(rows)))]))
        return {"seconds": time.process_time() - started, "peak": peak()}
    moments, keys = collect(model, rows, parse_size(options.part, "max_statistics_memory"), options.batch_size)
    found: dict[str, Any] = {
        "limit": options.part,
        "seconds": time.process_time() - started,
        "peak": peak(),
        "layers": {},
    }
    for key, moment in moments.items():
        layers = found["layers"][key] = {
            "read_by": [name for name, of in keys.items() if of == key],
            "rows": moment.rows,
        }
        if not isinstance(moment, MomentSketch):
            layers.update(kind="moment", error_bound=0.0)
            continue
        started = time.process_time()
        space = build_subspace({"all": {key: moment}}, {key: key}, energy=options.energy)[key]
        layers.update(
            kind="sketch", columns=moment.size, width=moment.width, error_bound=space.error_bound, energy=options.energy,
            rank=space.ranks[0], energy_held=1 - space.null_energy, decomposition_seconds=time.process_time() - started,
        )  # fmt: skip
    found["peak_with_decomposition"] = peak()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_statistics_memory", nargs="+", default=["2GB", "1GB"])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--batch_size", type=int, default=8, help=f"samples of {TOKENS} rows")
    parser.add_argument("--energy", type=float, default=0.95)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output_file", default="benchmarks/results/wide_layer.json")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.part is not None:
        print(json.dumps(measure(options)))
        return
    parts = []
    for part in ("forward", *options.max_statistics_memory):
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--part", part], stdout=subprocess.PIPE, text=True, check=True
        )
        parts.append(json.loads(done.stdout.splitlines()[-1]))
    forward, *limited = parts
    for found in limited:
        found["extra"] = found["peak"] - forward["peak"]
        found["extra_with_decomposition"] = found["peak_with_decomposition"] - forward["peak"]
        found["within"] = found["extra"] <= (parse_size(found["limit"], "max_statistics_memory") or 0)
        print(
            f"limit {found['limit']}: {format_size(max(found['extra'], 0))} extra memory, {found['seconds']:.0f} s "
            f"({found['seconds'] / forward['seconds']:.2f} of the forward pass alone)"
        )
        for key, layer in found["layers"].items():
            print(
                f"  {key}: {layer['kind']}, {layer['rows']} rows, error bound {layer['error_bound']:.3g} of the trace"
            )
            if layer["kind"] == "sketch":
                print(
                    f"    {layer['columns']} columns; energy {layer['energy']:g} asked for: rank {layer['rank']} of {layer['width']} holds "
                    f"{layer['energy_held']:.4f} for certain; decomposed in {layer['decomposition_seconds']:.0f} s"
                )
    result = {
        "hidden": options.hidden, "intermediate": options.intermediate, "rows": options.rows, "threads": options.threads,
        "forward": forward, "limits": limited, "versions": versions(),
    }  # fmt: skip
    write_text(Path(options.output_file), json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
