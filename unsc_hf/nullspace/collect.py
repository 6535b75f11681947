"""One pass over the data, or several, that sums the rows of every layer's input on the model's device."""

from __future__ import annotations

import logging
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.inputs import Collator
from ..data.selection import evenly_spaced
from ..errors import UNSCError
from ..models.hooks import capture_inputs, model_inputs, pieces, row_mask, trace_layers
from ..models.layers import ProtectedLayer
from ..utils.distributed import is_sharded, process
from ..utils.sizes import format_size
from .memory import plan_memory, scratch_bytes
from .moments import SecondMoment, rows_at_once
from .storage import mapped

logger = logging.getLogger(__name__)

_PROBED = 32  # rows that show how many activation rows a sample has
_LEAST_SAMPLES = 1_000  # patches of few images look alike, however many they are


class Recorder:
    """Sums the inputs of layers while a model runs; `add` is the callback of `capture_inputs`."""

    def __init__(self, layers: Sequence[ProtectedLayer], dtype: torch.dtype, device: torch.device) -> None:
        """Start from no rows; `dtype` is that of the products, and the sums are on `device`."""
        self._moments = {x.name: SecondMoment.zeros(x.geometry.groups, x.geometry.width, device) for x in layers}
        self._dtype, self._device = dtype, device

    def begin_batch(self, mask: Tensor | None) -> None:
        """Announce a batch, with its attention mask if it has one."""
        self._mask = None if mask is None else mask.to(self._device)

    def add(self, layer: ProtectedLayer, x: Tensor) -> None:
        """Add the rows of one layer's input, without padding.

        Rows of a linear layer are a view of the input. Patches of a convolution are copies, so they are cut out for as
        many samples as are multiplied at once.
        """
        x, linear = x.detach(), layer.geometry.kind == "linear"
        if not linear and x.dim() == 3:
            x = x.unsqueeze(0)
        moment, width = self._moments[layer.name], layer.geometry.width
        patches = 1 if linear else layer.rows(x[:1]).shape[1]
        keep = row_mask(x, self._mask)
        first, at_once = 0, rows_at_once(layer.geometry.groups * width)
        for samples in (x,) if linear else torch.split(x, max(1, at_once // max(patches, 1))):
            rows = layer.rows(samples)
            last = first + rows.shape[1]
            if keep is None:
                moment.update(rows, self._dtype)
            else:
                for part in torch.split(keep[first:last].nonzero()[:, 0], at_once):
                    moment.update(rows[:, part], self._dtype)
            first = last

    def finish(self, on_disk: bool = False) -> dict[str, SecondMoment]:
        """Hand over the sums over all processes, on the CPU or in temporary files; the recorder is empty then.

        Raises:
            UNSCError: NaN or infinite activations.
        """
        results: dict[str, SecondMoment] = {}
        for name in list(self._moments):
            moment = self._moments.pop(name)  # one after another, so that memory on the device is freed
            if process()[1] > 1:
                moment.all_reduce()
            if not moment.is_finite():
                raise UNSCError(
                    f"model: NaN or infinite activations enter layer {name!r}; check the weights and the data."
                )
            matrix = mapped(moment.matrix, tempfile.gettempdir()) if on_disk else moment.matrix.cpu()
            results[name] = SecondMoment(matrix, moment.rows)
        return results


def stream(
    model: nn.Module,
    dataset: Any,
    members: Mapping[str, np.ndarray],
    layers: Sequence[ProtectedLayer],
    collate_fn: Collator,
    *,
    batch_size: int,
    rows_per_direction: int | None,
    dtype: torch.dtype,
    num_workers: int,
    progress: bool,
    pool_as: str | None,
    limit: int | None,
) -> tuple[dict[str, dict[str, SecondMoment]], dict[str, str], int]:
    """Read `members[group]` rows of each group: moments by group and key, the key of each module, samples read.

    If a memory limit (in bytes) does not hold all layers at once, the data are read several times, for some layers each
    time. The sums are the same numbers. Of the other arguments see `ActivationStatistics.collect`.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        some = evenly_spaced(np.arange(len(dataset)), _PROBED)
        probe = model_inputs(collate_fn([dataset[int(i)] for i in some]), device)
        trace = trace_layers(layers, partial(model, **probe), len(some))
    if trace.silent:
        raise UNSCError(
            f"target_modules: {len(trace.silent)} layers never ran on the data, the first is {trace.silent[0]!r}."
        )
    leaders = [layer for layer in layers if trace.leaders[layer.name] == layer.name]
    if rows_per_direction is not None:
        wanted = _samples_wanted(leaders, trace.rows_per_sample, probe.get("attention_mask"), rows_per_direction)
        members = _dealt(members, wanted) if pool_as else {g: evenly_spaced(r, wanted) for g, r in members.items()}
    if pool_as is not None:
        members = {pool_as: np.sort(np.concatenate(list(members.values())))}
    plan, on_disk = plan_memory(leaders, limit, dtype), False
    if limit is not None:
        held = plan.results * len(members)
        scratch = max(scratch_bytes(layer, dtype) for layer in leaders)
        on_disk = device.type == "cpu" and held + scratch > limit
        passes = f"{len(plan.passes)} {'pass' if len(plan.passes) == 1 else 'passes'}"
        need = f"at most {format_size(plan.peak)} of {format_size(limit)}"
        logger.info("Statistics of %d layer inputs in %s over the data, %s each.", len(leaders), passes, need)

    parts, world = _split(model, members, batch_size), process()[1]
    moments: defaultdict[str, dict[str, SecondMoment]] = defaultdict(dict)
    total = len(plan.passes) * sum(len(rows) for rows in members.values())
    hidden = not progress or process()[0] > 0
    with torch.no_grad(), tqdm(total=total, desc="Activation statistics", unit=" rows", disable=hidden) as bar:
        for chosen in plan.passes:
            loader = DataLoader(
                dataset,
                batch_sampler=[batch for batches, _ in parts.values() for batch in batches],
                collate_fn=collate_fn,
                num_workers=num_workers,
                generator=torch.Generator(),  # leaves the global random state alone
            )
            loaded = iter(loader)
            for group, (batches, idle) in parts.items():
                recorder = Recorder(chosen, dtype, device)
                with capture_inputs(chosen, recorder.add, strict=len(batches) > 0):
                    for _ in batches:
                        batch = next(loaded)
                        for _, piece in pieces(model_inputs(batch, device)):
                            recorder.begin_batch(piece.get("attention_mask"))
                            model(**piece)
                        bar.update(len(next(iter(batch.values()))) * world)
                for _ in range(idle):
                    model(**probe)
                moments[group].update(recorder.finish(on_disk))
    order = [layer.name for layer in leaders]
    keys = {layer.name: trace.leaders[layer.name] for layer in layers}
    samples = sum(len(rows) for rows in members.values())
    return {group: {key: by_key[key] for key in order} for group, by_key in moments.items()}, keys, samples


def _samples_wanted(
    layers: Sequence[ProtectedLayer], rows_per_sample: Mapping[str, float], mask: Tensor | None, rows_per_direction: int
) -> int:
    """Samples that give the neediest layer its rows for each direction; `mask` says how much of a sample is padding."""
    real = 1.0 if mask is None else float(mask.float().mean())
    counts = [rows_per_sample[layer.name] for layer in layers]  # an expert may have got none
    needs = [x.geometry.width / max(1.0, n * real) for x, n in zip(layers, counts, strict=True) if n > 0]
    return max(_LEAST_SAMPLES, math.ceil(max(needs, default=0) * rows_per_direction))


def _dealt(members: Mapping[str, np.ndarray], wanted: int) -> dict[str, np.ndarray]:
    """About `wanted` rows of all groups together: equally many of each, and what small groups lack from the others."""
    dealt: dict[str, np.ndarray] = {}
    for i, group in enumerate(sorted(members, key=lambda group: len(members[group]))):
        dealt[group] = evenly_spaced(members[group], max(1, math.ceil(wanted / (len(members) - i))))
        wanted -= len(dealt[group])
    return {group: dealt[group] for group in members}


def read_batches(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], layers: Sequence[ProtectedLayer], progress: bool = False
) -> tuple[dict[str, SecondMoment], dict[str, str]]:
    """Read batches of a model's arguments once: moments by key, and the key of each module that runs on the first.

    Raises:
        UNSCError: no batches, a batch that is no dict, or no layer that runs.
    """
    device = next(model.parameters()).device
    recorder, keys, leaders = Recorder([], torch.float64, device), dict[str, str](), list[ProtectedLayer]()
    for i, batch in enumerate(tqdm(batches, desc="Null space", unit=" batches", disable=not progress)):
        if not isinstance(batch, Mapping):
            raise UNSCError(f"batches: item {i} is a {type(batch).__name__}; give dicts of the model's arguments.")
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        with torch.no_grad():
            if i == 0:
                keys = trace_layers(layers, partial(model, **inputs), 1).leaders
                leaders = [layer for layer in layers if keys.get(layer.name) == layer.name]
                recorder = Recorder(leaders, torch.float64, device)
            recorder.begin_batch(inputs.get("attention_mask"))
            with capture_inputs(leaders, recorder.add, strict=False):
                model(**inputs)
    if not keys:
        raise UNSCError(
            f"batches: none of the {len(layers)} layers ran on them; give at least one batch that reaches them."
        )
    return recorder.finish(), keys


def _split(
    model: nn.Module, members: Mapping[str, np.ndarray], batch_size: int
) -> dict[str, tuple[list[list[int]], int]]:
    """What this process reads of each group.

    Row numbers of each batch, and the number of forward passes without rows: a sharded model runs on all processes or
    on none, so a process with fewer batches runs as often as the others.
    """
    rank, world = process()
    sharded = any(is_sharded(parameter) for parameter in model.parameters())
    parts = {}
    for group, rows in members.items():
        mine = np.array_split(np.arange(len(rows)), world)[rank]
        batches = [rows[mine[i : i + batch_size]].tolist() for i in range(0, len(mine), batch_size)]
        longest = -(-len(np.array_split(rows, world)[0]) // batch_size)
        parts[group] = batches, longest - len(batches) if sharded else 0
    return parts
