"""The pass over the data: activation rows stream by class, and are summed on the model's device."""

from __future__ import annotations

import logging
import mmap
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..errors import UNSCError
from ..models.hooks import NOT_INPUTS, capture_inputs, row_mask, trace_layers
from ..models.layers import ProtectedLayer
from ..utils.distributed import is_sharded, process
from ..utils.sizes import format_size
from .memory import MemoryPlan, plan_memory
from .moments import Moment, SecondMoment, rows_at_once
from .sketch import MomentSketch, RowSample

logger = logging.getLogger(__name__)


_GOLDEN = 0.6180339887498949


_FILLED = 0.9  # share of a sample's room that is used


_ROW_STRIDE = 7919  # a prime: consecutive samples start at unrelated places of the golden sequence


def _kept_rows(first: int, samples: int, rows_per_sample: int, share: float, device: torch.device) -> Tensor:
    """Which rows of a batch are used, bool of shape (samples * rows_per_sample,).

    Row r of a class is kept when the fractional part of r times the golden ratio falls below `share`: evenly spread
    over samples and positions, without randomness, and the same for every batch size.
    """
    sample = torch.arange(first, first + samples, dtype=torch.float64, device=device)
    row = torch.arange(rows_per_sample, dtype=torch.float64, device=device)
    return ((sample[:, None] * _ROW_STRIDE + row) * _GOLDEN).frac().reshape(-1) < share


def _row_parts(layer: ProtectedLayer, x: Tensor, patches: int) -> Iterator[Tensor]:
    """Rows of one input, shape (groups, n, width): at once where they are a view of it, else sample by sample as many as are
    multiplied at once, so that the patches of a convolution are never all there."""
    if layer.geometry.kind == "linear":
        yield layer.rows(x)
        return
    at_once = rows_at_once(layer.geometry.groups * layer.geometry.width)
    for part in torch.split(x, max(1, at_once // max(patches, 1))):
        yield layer.rows(part)


@dataclass
class Shares:
    """Which share of a layer's rows is used.

    Attributes:
        budget: under `max_rows_per_class`; 1 uses all.
        sample: of those, the share that fits where rows themselves are kept.
    """

    budget: float
    sample: float = 1.0


class _Recorder:
    """Sums of one group while it streams by, on the model's device."""

    def __init__(self, moments: dict[str, Moment], dtype: torch.dtype, device: torch.device) -> None:
        self.moments, self.dtype, self.device = moments, dtype, device
        self.shares: Mapping[str, Shares] = {}
        self.samples = 0
        self._next = 0
        self._mask: Tensor | None = None

    def enter(self, shares: Mapping[str, Shares], first_sample: int) -> None:
        """Announce a class: shares by layer name, and the position in the class of the first sample that is read."""
        self.shares, self._next = shares, first_sample

    def begin(self, samples: int, mask: Tensor | None) -> None:
        """Announce the next batch."""
        self.position, self.samples = self._next, samples
        self._next += samples
        self._mask = None if mask is None else mask.to(self.device)

    def add(self, layer: ProtectedLayer, x: Tensor) -> None:
        """Add the rows of one layer's input, without padding and within the budget."""
        x, linear = x.detach(), layer.geometry.kind == "linear"
        if not linear and x.dim() == 3:
            x = x.unsqueeze(0)
        moment, shares, width = self.moments[layer.name], self.shares[layer.name], layer.geometry.width
        patches = 1 if linear else layer.rows(x[:1]).shape[1]
        count = x.numel() // width if linear else len(x) * patches
        keep = row_mask(x, self._mask)
        spread = shares.budget < 1.0 and count % self.samples == 0
        if spread:
            keep = self._spread(count, shares.budget, keep)
        if isinstance(moment, RowSample) and shares.sample < 1.0 and count % self.samples == 0:
            offered = count if keep is None else int(keep.sum())
            keep = self._spread(count, shares.budget * shares.sample, keep)
            moment.stand_for(offered - int(keep.sum()))
        first, at_once = 0, rows_at_once(layer.geometry.groups * width)
        for rows in _row_parts(layer, x, patches):
            last = first + rows.shape[1]
            if keep is None:
                moment.update(rows, self.dtype)
            else:
                for part in torch.split(keep[first:last].nonzero()[:, 0], at_once):
                    moment.update(rows[:, part], self.dtype)
            first = last

    def _spread(self, count: int, share: float, among: Tensor | None) -> Tensor:
        """An evenly spread share of a batch's rows, of those `among` them."""
        spread = _kept_rows(self.position, self.samples, count // self.samples, share, self.device)
        return spread if among is None else spread & among

    def finish(self, distributed: bool, aside: bool) -> dict[str, Moment]:
        """The sums over all processes, on the CPU, or set aside in files; the recorder is empty then.

        Raises:
            UNSCError: NaN or infinite activations.
        """
        found: dict[str, Moment] = {}
        for name in list(self.moments):
            moment = self.moments.pop(name)
            if distributed:
                moment.all_reduce()
            if not moment.is_finite():
                raise UNSCError(
                    f"model: NaN or infinite activations enter layer {name!r}; check the weights and the data."
                )
            found[name] = _set_aside(moment) if aside else moment.to("cpu")
        return found


@dataclass(frozen=True)
class Pass:
    """What a pass over the data needs besides model and data; see `ActivationStatistics.collect`.

    Attributes:
        batch_size, max_rows, dtype, num_workers, progress, pool_as: as there.
        limit: bytes that what is summed may take, or None.
        sketch_size, layout: see `memory.plan_memory`.
        wide_rows: keep a sample of rows where a moment does not fit, not a sketch.
    """

    batch_size: int = 128
    max_rows: int | None = None
    dtype: torch.dtype = torch.float64
    num_workers: int = 0
    progress: bool = True
    pool_as: str | None = None
    limit: int | None = None
    sketch_size: int | None = None
    layout: Mapping[str, int] | None = None
    wide_rows: bool = False


def stream(
    model: nn.Module,
    dataset: Any,
    members: Mapping[str, np.ndarray],
    layers: Sequence[ProtectedLayer],
    collate_fn: Callable[[list[dict[str, Any]]], dict[str, Any]],
    options: Pass,
) -> tuple[dict[str, dict[str, Moment]], dict[str, str]]:
    """Read `members[group]` rows of each group: moments by group and key, and the key of each module.

    Under a memory limit that does not hold all layers at once, the data are read several times, for some layers each time; the
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
    layout = (
        None if options.layout is None else {keys[name]: size for name, size in options.layout.items() if name in keys}
    )
    plan = plan_memory(leaders, options.limit, options.sketch_size, layout, options.dtype)
    outcomes = 1 if options.pool_as is not None else len(members)
    aside = (
        options.limit is not None and device.type == "cpu" and plan.results * outcomes + plan.scratch > options.limit
    )
    _announce(plan, options, leaders)

    rank, world = process()
    mine = {group: np.array_split(np.arange(len(rows)), world)[rank] for group, rows in members.items()}
    batches = {
        group: [members[group][part].tolist() for part in _pieces(own, options.batch_size)]
        for group, own in mine.items()
    }
    # A sharded model runs on all processes or on none: whoever has fewer batches runs on as many as the others.
    sharded = any(is_sharded(parameter) for parameter in model.parameters())
    longest = {group: -(-len(np.array_split(rows, world)[0]) // options.batch_size) for group, rows in members.items()}
    idle = {group: longest[group] - len(batches[group]) if sharded else 0 for group in members}
    read = {
        name: rows * sum(len(chosen) for chosen in members.values()) for name, rows in trace.rows_per_sample.items()
    }
    total = len(plan.passes) * sum(len(rows) for rows in members.values())
    bar = tqdm(total=total, desc="Activation statistics", unit=" rows", disable=not options.progress or rank > 0)
    found: dict[str, dict[str, Moment]] = {}
    for part in plan.passes:
        loader = iter(
            DataLoader(
                dataset,
                batch_sampler=[batch for group in members for batch in batches[group]],
                collate_fn=collate_fn,
                num_workers=options.num_workers,
                generator=torch.Generator(),  # leaves the global random state alone
            )
        )
        recorder: _Recorder | None = None
        for group, chosen in members.items():
            if recorder is None or options.pool_as is None:
                recorder = _Recorder(_empty(part, plan.columns, options.wide_rows, device), options.dtype, device)
            shares = {}
            for layer in part:
                rows = trace.rows_per_sample[layer.name]
                budget = 1.0 if options.max_rows is None else min(1.0, options.max_rows / (len(chosen) * rows))
                shares[layer.name] = Shares(
                    budget, _sample_share(recorder.moments[layer.name], read[layer.name] * budget)
                )
            recorder.enter(shares, first_sample=int(mine[group][0]) if len(mine[group]) else 0)
            with torch.no_grad(), capture_inputs(part, recorder.add, strict=len(mine[group]) > 0):
                for _ in batches[group]:
                    batch = next(loader)
                    recorder.begin(len(next(iter(batch.values()))), batch.get("attention_mask"))
                    forward(batch)
                    bar.update(recorder.samples * world)
            with torch.no_grad():
                for _ in range(idle[group]):
                    forward(probe)
            if options.pool_as is None:
                found.setdefault(group, {}).update(recorder.finish(world > 1, aside))
        if options.pool_as is not None and recorder is not None:
            found.setdefault(options.pool_as, {}).update(recorder.finish(world > 1, aside))
    bar.close()
    order = [layer.name for layer in leaders]
    return {group: {key: by_key[key] for key in order} for group, by_key in found.items()}, keys


def _pieces(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _empty(
    layers: Sequence[ProtectedLayer], columns: Mapping[str, int], wide_rows: bool, device: torch.device
) -> dict[str, Moment]:
    """Sums of nothing, for each layer of the kind that was planned; a sample of float32 rows takes a sketch's memory."""
    moments: dict[str, Moment] = {}
    for layer in layers:
        size, width = columns.get(layer.name), layer.geometry.width
        if size is None:
            moments[layer.name] = SecondMoment.zeros(layer.geometry.groups, width, device)
        elif wide_rows:
            moments[layer.name] = RowSample.zeros(width, 2 * size, device)
        else:
            moments[layer.name] = MomentSketch.zeros(width, size, device)
    return moments


def _sample_share(moment: Moment, rows: float) -> float:
    """Share of so many rows that a sample has room for, and a little less: an even spread comes out a few rows above or below."""
    return min(1.0, _FILLED * len(moment.sample) / max(rows, 1.0)) if isinstance(moment, RowSample) else 1.0


def _set_aside(moment: Moment) -> Moment:
    """The same sums in temporary files."""
    if isinstance(moment, SecondMoment):
        moment.matrix = _in_file(moment.matrix)
    elif isinstance(moment, MomentSketch):
        moment.products = _in_file(moment.products)
    elif isinstance(moment, RowSample):
        moment.sample = _in_file(moment.sample)
    return moment


def _in_file(tensor: Tensor) -> Tensor:
    """The same numbers in a temporary file without a name, mapped into memory: it goes with the tensor, and the system may drop its
    pages and read them again, which it cannot do with the process's own memory."""
    size = tensor.numel() * tensor.element_size()
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        pages = mmap.mmap(file.fileno(), size)
    mapped = torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape)
    mapped.copy_(tensor)
    pages.flush()
    if sys.platform == "linux":
        pages.madvise(mmap.MADV_DONTNEED)
    return mapped


def _announce(plan: MemoryPlan, options: Pass, leaders: Sequence[ProtectedLayer]) -> None:
    """Tell what a limit does."""
    if options.limit is None:
        return
    logger.info(
        "Statistics of %d layer inputs in %d %s over the data, at most %s of %s each.",
        len(leaders), len(plan.passes), "pass" if len(plan.passes) == 1 else "passes", format_size(plan.peak),
        format_size(options.limit),
    )  # fmt: skip
    widths = {layer.name: layer.geometry.width for layer in leaders}
    for name, size in plan.columns.items():
        if name in widths and options.wide_rows:
            logger.info(
                "%s: of its inputs, %d wide, at most %d rows are kept to measure the leak.",
                name,
                widths[name],
                2 * size,
            )
        elif name in widths:
            logger.warning(
                "%s: its moment, %d wide, does not fit in %s and is sketched with %d columns.",
                name, widths[name], format_size(options.limit), size,
            )  # fmt: skip
