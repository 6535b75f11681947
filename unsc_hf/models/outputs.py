"""A model's head, and its outputs on rows: logits, the features its head reads, and the true labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.inputs import Collator
from ..errors import UNSCError
from ..utils.distributed import gathered, process, whole
from .hooks import capture_inputs, evaluation_mode, model_inputs, pieces
from .layers import ADAPTER, ProtectedLayer, RowGeometry

Reader = Callable[[Tensor, Tensor], "Outputs"]  # of a batch's logits and labels

_LOGITS_AT_ONCE = 2**26  # logits that are converted to float64 at a time


@dataclass(frozen=True)
class Outputs:
    """Outputs of a model on some rows, on the CPU.

    Outputs of answer tokens are as wide as a vocabulary, so they stay on the model's device until they are kept.
    """

    logits: Tensor  # float32, (rows, labels)
    features: Tensor | None  # float32 inputs of the head, (rows, width), or None when not asked for
    labels: Tensor  # int64, (rows,)
    samples: Tensor | None = None  # of the batch, which each row belongs to where a sample has several (answer tokens)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Outputs:
        parts = (self.logits, self.features, self.labels, self.samples)
        return Outputs(*(None if part is None else change(part) for part in parts))  # type: ignore[arg-type]

    def cpu(self) -> Outputs:
        """The same on the CPU."""
        return self._each(lambda part: part.cpu())

    def need_features(self) -> Tensor:
        """The features; TypeError when the outputs were collected without them."""
        if self.features is None:
            raise TypeError("outputs were collected without features; pass features=True.")
        return self.features

    def need_samples(self) -> Tensor:
        """The sample of each row; TypeError where every row is a sample."""
        if self.samples is None:
            raise TypeError("these outputs have one row for each sample.")
        return self.samples

    def first(self, max_elements: int | None) -> Outputs:
        """The first rows, at least one, that have at most `max_elements` logits together; all when None."""
        rows = len(self.logits) if max_elements is None else max(1, max_elements // self.logits.shape[1])
        return self._each(lambda part: part[:rows])


@dataclass(frozen=True)
class RowOutputs:
    """Outputs on training rows to forget, on training rows to keep, and on test rows."""

    forget: Outputs
    retain: Outputs
    test: Outputs


def find_head(model: nn.Module, num_labels: int) -> tuple[str, nn.Linear]:
    """Name and module of the linear layer that gives the logits: the last with `num_labels` outputs; UNSCError
    without."""
    heads = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == num_labels and ".lora_" not in name
    ]
    if not heads:
        raise UNSCError(f"model: {type(model).__name__} has no linear head with {num_labels} outputs.")
    return heads[-1]


def classify(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (batch, labels) of samples with one label each, and the order in which they ran, which hooks need,
    (batch,).

    Texts of a batch are padded to the longest, which on a CPU may double the work. There the batch runs in pieces of
    similar length, each cut after its own last token. Masked tokens have no influence, so the logits agree up to
    rounding. Several processes must run the same number of passes, so their batches are not split.
    """
    order, logits = zip(*((rows, model(**piece).logits) for rows, piece in pieces(inputs)), strict=True)
    if len(order) == 1:
        return logits[0], order[0]
    ran = torch.cat(order)
    return torch.cat(logits)[ran.argsort()], ran


def head_weights(model: nn.Module, num_labels: int) -> tuple[Tensor, Tensor | None]:
    """Weight (labels, width) and bias of the head, with the change that an adapter on it makes."""
    name, head = find_head(model, num_labels)
    weight = whole(head.weight.detach())
    owner = dict(model.named_modules()).get(name.removesuffix(".base_layer"))
    if isinstance(owner, LoraLayer):
        weight = weight + whole(owner.get_delta_weight(ADAPTER).detach())
    return weight, None if head.bias is None else whole(head.bias.detach())


def one_per_sample(logits: Tensor, labels: Tensor) -> Outputs:
    """One row per sample of a classifier's batch."""
    if logits.dim() != 2:
        raise UNSCError(f"model: logits have shape {tuple(logits.shape)}, expected (batch, labels).")
    return Outputs(logits, None, labels)


def iterate_outputs(
    model: nn.Module,
    dataset: Any,
    collate_fn: Collator,
    *,
    features: bool = False,
    batch_size: int = 256,
    progress: bool = False,
    description: str = "Evaluating",
    read: Reader = one_per_sample,
) -> Iterator[Outputs]:
    """Run a model, whose output has `logits`, in eval mode over all rows of a prepared data set, batch by batch.

    The model is in eval mode only while a batch is computed. Several processes take a batch each and all get every
    batch, in order, so all of them must iterate to the same point.

    Args:
        collate_fn: makes a batch; it must contain `labels`.
        features: also keep the inputs of the head, for classifiers.
        batch_size: rows of a batch in one process.
        progress: show a progress bar with this `description`.
        read: makes rows of a batch's logits and labels; one row per sample by default.

    Raises:
        UNSCError: rows without labels, or outputs of another shape than (batch, labels).
    """
    device = next(model.parameters()).device
    rank, world = process()
    # Each turn is split evenly. In the last one some processes may have no rows. They repeat another's, because a
    # sharded model must run on all processes.
    step, count = batch_size * world, len(dataset)
    turns = [np.array_split(np.arange(start, min(start + step, count)), world) for start in range(0, count, step)]
    loader = DataLoader(
        dataset,
        batch_sampler=[(parts[rank] if len(parts[rank]) else parts[0]).tolist() for parts in turns],
        collate_fn=collate_fn,
        generator=torch.Generator(),  # leaves the global random state alone
    )
    heads: list[ProtectedLayer] = []
    if features:
        name, module = find_head(model, int(model.config.num_labels))  # type: ignore[union-attr, arg-type]
        heads = [ProtectedLayer(name, module, RowGeometry("linear", 1, module.in_features))]
    bar = tqdm(loader, desc=description, disable=not progress or rank > 0, leave=False)
    for turn, batch in zip(turns, bar, strict=True):
        if "labels" not in batch:
            raise UNSCError("label_column: the rows carry no labels; name the column that holds them.")
        rows = _run(model, batch, device, heads, read)
        if rows.samples is None or world > 1:
            rows = rows.cpu()
        yield from gathered(rows, device)[: sum(len(part) > 0 for part in turn)]


def _run(
    model: nn.Module, batch: dict[str, Any], device: torch.device, heads: Sequence[ProtectedLayer], read: Reader
) -> Outputs:
    """Outputs of one batch, with the inputs of `heads` as features."""
    inputs: list[Tensor] = []

    def keep(layer: ProtectedLayer, x: Tensor) -> None:
        inputs.append(layer.rows(x.detach())[0].float().cpu())

    ready = model_inputs(batch, device)
    with evaluation_mode(model), capture_inputs(heads, keep, strict=False):
        if batch["labels"].dim() == 1:
            logits, order = classify(model, ready)
        else:  # a label for each token
            logits, order = model(**ready).logits, torch.arange(len(batch["labels"]))
    rows = read(logits.detach(), batch["labels"].to(logits.device))
    rows = replace(rows, logits=rows.logits.float())
    if not heads:
        return rows
    features = torch.cat(inputs)
    return replace(rows, features=features[order.argsort()] if len(features) == len(order) else features)


def collect_outputs(
    model: nn.Module, dataset: Any, collate_fn: Collator, max_elements: int | None = None, **options: Any
) -> Outputs:
    """Outputs on all rows, see `iterate_outputs`; with `max_elements` on the first rows, up to that many logits."""
    parts: list[Outputs] = []
    elements = 0
    for part in iterate_outputs(model, dataset, collate_fn, **options):
        parts.append(part.first(None if max_elements is None else max_elements - elements).cpu())
        elements += part.logits.numel()
        if max_elements is not None and elements >= max_elements:
            break
    return join_outputs(parts).first(max_elements)


def join_outputs(parts: Sequence[Outputs]) -> Outputs:
    """Rows of several batches. `samples`, which are numbered within a batch, are numbered on."""
    samples, first = list[Tensor](), 0
    for part in parts:
        if part.samples is not None:
            samples.append(part.samples + first)
            first = int(samples[-1].max()) + 1 if len(part.samples) else first
    return Outputs(
        torch.cat([part.logits for part in parts]),
        None if parts[0].features is None else torch.cat([part.need_features() for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat(samples) if samples else None,
    )


def read_answers(logits: Tensor, labels: Tensor) -> Outputs:
    """One row per labelled token of (batch, tokens) labels: the logits that predict it, and its sample."""
    if logits.dim() != 3:
        raise UNSCError(f"model: logits have shape {tuple(logits.shape)}, expected (batch, tokens, vocabulary).")
    following = labels[:, 1:]
    chosen = following != -100
    samples = torch.arange(len(labels), device=labels.device)[:, None].expand_as(following)
    return Outputs(logits[:, :-1][chosen], None, following[chosen], samples[chosen])


def token_losses(rows: Outputs) -> Tensor:
    """Cross-entropy of each position, float64 of shape (rows,), computed in blocks because a vocabulary is wide."""
    count = max(1, -(-rows.logits.numel() // _LOGITS_AT_ONCE))
    parts = zip(rows.logits.tensor_split(count), rows.labels.tensor_split(count), strict=True)
    return torch.cat([F.cross_entropy(logits.double(), labels, reduction="none") for logits, labels in parts])
