"""One pass over the data, or several, that sums the rows of every layer's input on the model's device."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..errors import UNSCError
from ..models.hooks import NOT_INPUTS, Trace, capture_inputs, row_mask, trace_layers
from ..models.layers import ProtectedLayer
from ..utils.distributed import is_sharded, process
from ..utils.sizes import format_size
from .memory import MemoryPlan, plan_memory
from .moments import SecondMoment, rows_at_once
from .storage import mapped

logger = logging.getLogger(__name__)

_GOLDEN = 0.6180339887498949
_ROW_STRIDE = 7919  # A prime: consecutive samples start at unrelated places of the golden sequence.

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


def _within_budget(first: int, samples: int, rows_per_sample: int, share: float, device: torch.device) -> Tensor:
    """Which rows of a batch are used, bool of shape (samples * rows_per_sample,).

    Row r of a class is used when the fractional part of r times the golden ratio is below `share`. Such rows are evenly
    spread over samples and positions, without randomness, and the same for every batch size.
    """
    sample = torch.arange(first, first + samples, dtype=torch.float64, device=device)
    row = torch.arange(rows_per_sample, dtype=torch.float64, device=device)
    return ((sample[:, None] * _ROW_STRIDE + row) * _GOLDEN).frac().reshape(-1) < share


def _row_parts(layer: ProtectedLayer, x: Tensor, patches: int) -> Iterator[Tensor]:
    """Rows of one input, shape (groups, n, width).

    Rows of a linear layer are a view of the input and come at once. Patches of a convolution are copies, so they come
    for as many samples as are multiplied at once.
    """
    if layer.geometry.kind == "linear":
        yield layer.rows(x)
        return
    at_once = rows_at_once(layer.geometry.groups * layer.geometry.width)
    for part in torch.split(x, max(1, at_once // max(patches, 1))):
        yield layer.rows(part)


class Recorder:
    """Sums the inputs of layers while a model runs; `add` is the callback of `capture_inputs`."""

    def __init__(self, layers: Sequence[ProtectedLayer], dtype: torch.dtype, device: torch.device) -> None:
        """Start from no rows; `dtype` is that of the products, and the sums are on `device`."""
        self._moments = {x.name: SecondMoment.zeros(x.geometry.groups, x.geometry.width, device) for x in layers}
        self._dtype, self._device = dtype, device
        self._shares: Mapping[str, float] = {}
        self._samples = self._position = self._next = 0
        self._mask: Tensor | None = None

    def begin_class(self, shares: Mapping[str, float], first_sample: int) -> None:
        """Announce a class: the share of rows to use by layer name, and the place in the class of the first sample."""
        self._shares, self._next = shares, first_sample

    def begin_batch(self, samples: int, mask: Tensor | None) -> None:
        """Announce a batch, with its attention mask if it has one."""
        self._position, self._samples = self._next, samples
        self._next += samples
        self._mask = None if mask is None else mask.to(self._device)

    def add(self, layer: ProtectedLayer, x: Tensor) -> None:
        """Add the rows of one layer's input, without padding and within the budget."""
        x, linear = x.detach(), layer.geometry.kind == "linear"
        if not linear and x.dim() == 3:
            x = x.unsqueeze(0)
        moment, width = self._moments[layer.name], layer.geometry.width
        patches = 1 if linear else layer.rows(x[:1]).shape[1]
        keep = self._kept(layer.name, x, x.numel() // width if linear else len(x) * patches)
        first, at_once = 0, rows_at_once(layer.geometry.groups * width)
        for rows in _row_parts(layer, x, patches):
            last = first + rows.shape[1]
            if keep is None:
                moment.update(rows, self._dtype)
            else:
                for part in torch.split(keep[first:last].nonzero()[:, 0], at_once):
                    moment.update(rows[:, part], self._dtype)
            first = last

    def _kept(self, name: str, x: Tensor, count: int) -> Tensor | None:
        """Which of an input's `count` rows are used, bool of shape (count,); None for all."""
        real, share = row_mask(x, self._mask), self._shares.get(name, 1.0)
        if share >= 1.0 or count % self._samples:
            return real
        within = _within_budget(self._position, self._samples, count // self._samples, share, self._device)
        return within if real is None else within & real

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
            results[name] = (
                SecondMoment(mapped(moment.matrix, tempfile.gettempdir()), moment.rows) if on_disk else moment.to("cpu")
            )
        return results


@dataclass(frozen=True)
class PassOptions:
    """How the data are read; see `ActivationStatistics.collect`, where `limit` is `max_memory` in bytes."""

    batch_size: int = 128
    max_rows: int | None = None
    dtype: torch.dtype = torch.float64
    num_workers: int = 0
    progress: bool = True
    pool_as: str | None = None
    limit: int | None = None


def stream(
    model: nn.Module,
    dataset: Any,
    members: Mapping[str, np.ndarray],
    layers: Sequence[ProtectedLayer],
    collate_fn: Collate,
    options: PassOptions,
) -> tuple[dict[str, dict[str, SecondMoment]], dict[str, str]]:
    """Read `members[group]` rows of each group: moments by group and key, and the key of each module.

    If a memory limit does not hold all layers at once, the data are read several times, for some layers each time. The
    sums are the same numbers.
    """
    device = next(model.parameters()).device

    def forward(batch: Mapping[str, Any]) -> None:
        model(**{name: value.to(device) for name, value in batch.items() if name not in NOT_INPUTS})

    with torch.no_grad():
        probe = collate_fn([dataset[i] for i in range(min(2, len(dataset)))])
        trace = trace_layers(layers, lambda: forward(probe), min(2, len(dataset)))
    if trace.silent:
        raise UNSCError(
            f"target_modules: {len(trace.silent)} layers never ran on the data, the first is {trace.silent[0]!r}."
        )
    keys = {layer.name: trace.leaders[layer.name] for layer in layers}
    leaders = [layer for layer in layers if keys[layer.name] == layer.name]
    plan = plan_memory(leaders, options.limit, options.dtype)
    _announce(plan, options, leaders)
    results_bytes = plan.results * (1 if options.pool_as is not None else len(members))
    on_disk = options.limit is not None and device.type == "cpu" and results_bytes + plan.scratch > options.limit

    total = len(plan.passes) * sum(len(rows) for rows in members.values())
    hidden = not options.progress or process()[0] > 0
    moments: dict[str, dict[str, SecondMoment]] = {}
    with tqdm(total=total, desc="Activation statistics", unit=" rows", disable=hidden) as bar:
        reader = _Reader(
            dataset, collate_fn, forward, probe, members, _split(model, members, options.batch_size), trace, options,
            device, on_disk, bar,
        )  # fmt: skip
        for part in plan.passes:
            for group, by_key in reader.read(part):
                moments.setdefault(group, {}).update(by_key)
    order = [layer.name for layer in leaders]
    return {group: {key: by_key[key] for key in order} for group, by_key in moments.items()}, keys


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
            recorder.begin_batch(1, inputs.get("attention_mask"))
            with capture_inputs(leaders, recorder.add, strict=False):
                model(**inputs)
    if not keys:
        raise UNSCError(
            f"batches: none of the {len(layers)} layers ran on them; give at least one batch that reaches them."
        )
    return recorder.finish(), keys


def _announce(plan: MemoryPlan, options: PassOptions, leaders: Sequence[ProtectedLayer]) -> None:
    """Log what a limit leads to."""
    if options.limit is None:
        return
    passes = f"{len(plan.passes)} {'pass' if len(plan.passes) == 1 else 'passes'}"
    logger.info(
        "Statistics of %d layer inputs in %s over the data, at most %s of %s each.",
        len(leaders), passes, format_size(plan.peak), format_size(options.limit),
    )  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """What this process reads of a group.

    Attributes:
        batches: row numbers in the data set.
        first: place in the group of the first of these rows.
        idle: forward passes without rows. A sharded model runs on all processes or on none, so a process with fewer
            batches runs as often as the others.
    """

    batches: list[list[int]]
    first: int
    idle: int


def _split(model: nn.Module, members: Mapping[str, np.ndarray], batch_size: int) -> dict[str, _Part]:
    """This process's part of each group."""
    rank, world = process()
    sharded = any(is_sharded(parameter) for parameter in model.parameters())
    parts = {}
    for group, rows in members.items():
        mine = np.array_split(np.arange(len(rows)), world)[rank]
        batches = [rows[mine[i : i + batch_size]].tolist() for i in range(0, len(mine), batch_size)]
        longest = -(-len(np.array_split(rows, world)[0]) // batch_size)
        parts[group] = _Part(batches, int(mine[0]) if len(mine) else 0, longest - len(batches) if sharded else 0)
    return parts


@dataclass(frozen=True)
class _Reader:
    """Everything a pass over the data needs except the layers; see `stream`."""

    dataset: Any
    collate_fn: Collate
    forward: Callable[[Mapping[str, Any]], None]
    probe: Mapping[str, Any]
    members: Mapping[str, np.ndarray]
    parts: Mapping[str, _Part]
    trace: Trace
    options: PassOptions
    device: torch.device
    on_disk: bool
    bar: Any

    def read(self, layers: Sequence[ProtectedLayer]) -> Iterator[tuple[str, dict[str, SecondMoment]]]:
        """One pass over the data: each group with the moments of these layers' inputs."""
        loader = DataLoader(
            self.dataset,
            batch_sampler=[batch for group in self.members for batch in self.parts[group].batches],
            collate_fn=self.collate_fn,
            num_workers=self.options.num_workers,
            generator=torch.Generator(),  # leaves the global random state alone
        )
        batches, pool, last = iter(loader), self.options.pool_as, list(self.members)[-1]
        recorder: Recorder | None = None
        for group in self.members:
            recorder = recorder or Recorder(layers, self.options.dtype, self.device)
            self._read_group(group, layers, recorder, batches)
            if pool is None or group == last:
                yield (group if pool is None else pool), recorder.finish(self.on_disk)
                recorder = None

    def _read_group(
        self, group: str, layers: Sequence[ProtectedLayer], recorder: Recorder, batches: Iterator[dict[str, Any]]
    ) -> None:
        part, most, chosen = self.parts[group], self.options.max_rows, len(self.members[group])
        rows = {layer.name: chosen * self.trace.rows_per_sample[layer.name] for layer in layers}
        recorder.begin_class({} if most is None else {name: most / count for name, count in rows.items()}, part.first)
        with torch.no_grad(), capture_inputs(layers, recorder.add, strict=len(part.batches) > 0):
            for _ in part.batches:
                batch = next(batches)
                samples = len(next(iter(batch.values())))
                recorder.begin_batch(samples, batch.get("attention_mask"))
                self.forward(batch)
                self.bar.update(samples * process()[1])
        with torch.no_grad():
            for _ in range(part.idle):
                self.forward(self.probe)
