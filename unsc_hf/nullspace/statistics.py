"""Second moments of activation rows, per class: the sufficient statistics of null-space calibration.

The moments are uncentred and summed in float64. (A centred covariance hides the mean direction, and a float32 sum hides
the small eigenvalues that the null space is made of.) They are additive: statistics merge over workers by one sum, and
serve any deletion request by subtraction, C_retain = C_all - sum of C_c over the forgotten classes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import UNSCError, closest
from ..models.hooks import evaluation_mode
from ..models.layers import ProtectedLayer, find_layers
from ..utils.fingerprint import Fingerprint, data_fingerprint, weight_hash
from ..utils.sizes import size_in_bytes
from .collect import stream
from .moments import SecondMoment, total_moment
from .rules import build_subspace
from .storage import load_statistics, save_statistics
from .subspace import Subspace


@dataclass
class ActivationStatistics:
    """Second moments of every protectable layer's input, kept apart by group (usually the class).

    Attributes:
        moments: `moments[group][key]`; groups are label ids as text, keys name a layer whose input is shared.
        module_keys: key by module name; modules fed by the same tensor (q, k, v) share one key.
        fingerprint: what the statistics belong to.
        group_names: readable name of each group (class name), for messages and `exclude`.
        requests: what was served from these statistics so far, oldest first; see `trainer.sequence.serve_request`.
    """

    moments: dict[str, dict[str, SecondMoment]]
    module_keys: dict[str, str]
    fingerprint: Fingerprint
    group_names: dict[str, str] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def collect(
        cls,
        model: nn.Module,
        dataset: Any,
        *,
        label_column: str | None = None,
        groups: Sequence[Any] | np.ndarray | None = None,
        pool_as: str | None = None,
        target_modules: str | Sequence[str] | None = None,
        layers: Sequence[ProtectedLayer] | None = None,
        processing_class: Any = None,
        prepare: Callable[[Any], Any] | None = None,
        collate_fn: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        batch_size: int = 128,
        rows_per_direction: int | None = None,
        dtype: torch.dtype = torch.float64,
        num_workers: int = 0,
        weights: str | None = None,
        progress: bool = True,
        max_memory: str | int | None = None,
    ) -> ActivationStatistics:
        """One streaming pass over `dataset` with forward hooks on `model`, in eval mode and without gradients.

        Rows are read class by class, so only one class's moments are on the model's device: one (width, width) float64
        matrix per distinct layer input, however long the data. Finished classes' moments are kept in the CPU's memory.
        Under `torch.distributed` each process reads its share, and the sums are all-reduced.

        Args:
            model: the model whose activations are recorded; its mode is restored afterwards.
            dataset: a `datasets.Dataset`, raw (then `processing_class` prepares it) or ready for the model.
            label_column: column that names the group of each row; found by itself when None.
            groups: a group for each row, instead of a column.
            pool_as: sum all classes into one group of this name, which saves memory and, with a budget, time.
            target_modules, layers: see `models.layers.find_layers`, or the layers themselves.
            processing_class, prepare: image processor or tokenizer for raw rows, or what makes them ready instead.
            collate_fn: makes a batch of samples; transformers' default when None.
            batch_size: samples per forward pass; does not change the result.
            rows_per_direction: how many activation rows each group reads for each direction of a layer's input. The
                widest need decides how many samples are read, evenly spread over classes and at least 1,000. None
                reads all.
            dtype: torch.float64, or torch.float32 to multiply faster where float64 is slow; sums are float64 anyway.
            num_workers: processes that read data.
            weights: `weight_hash(model)`, when already known.
            progress: show a progress bar.
            max_memory: limit on the extra memory of the pass on the model's device, in each process, as bytes or a
                size such as "2GB"; the forward pass comes on top. Layers that do not fit together are read in several
                passes over the data, with the same result to the bit. On a CPU, finished moments that do not fit are
                kept in temporary files. None sums everything in one pass.

        Raises:
            UNSCError: no rows, a layer that never runs, NaN or infinite activations (the layer is named), or a limit
                below what one layer needs.
        """
        from ..data.inputs import default_collator, prepare_dataset

        if dtype not in (torch.float32, torch.float64):
            raise UNSCError(f"dtype: {dtype} cannot hold second moments; use torch.float64 or torch.float32.")
        labels, names = _groups(dataset, label_column, groups)
        ordered = sorted(set(labels.tolist()), key=lambda group: (len(group), group))
        members = {group: np.flatnonzero(labels == group) for group in ordered}
        prepared = prepare(dataset) if prepare else prepare_dataset(dataset, processing_class, model, label_column)
        collate_fn = collate_fn or default_collator(processing_class)
        layers = find_layers(model, target_modules).layers if layers is None else layers
        limit = size_in_bytes(max_memory, "max_memory")
        with evaluation_mode(model):
            moments, keys, samples = stream(
                model, prepared, members, layers, collate_fn, batch_size=batch_size, dtype=dtype, limit=limit,
                rows_per_direction=rows_per_direction, num_workers=num_workers, progress=progress, pool_as=pool_as,
            )  # fmt: skip
        fingerprint = replace(
            model_fingerprint(model, weights),
            data=data_fingerprint(dataset),
            dtype=str(dtype).removeprefix("torch."),
            rows_per_direction=rows_per_direction,
            samples=samples,
        )
        return cls(moments, keys, fingerprint, {group: names.get(group, group) for group in moments})

    def groups(self, exclude: Iterable[Any] = ()) -> list[str]:
        """Group ids left after `exclude`, which takes ids or names.

        Raises:
            UNSCError: for an unknown group (the closest names are listed), or when none is left.
        """
        by_name = {name: group for group, name in self.group_names.items()}
        dropped = {by_name.get(str(item), str(item)): item for item in exclude}
        for group, item in dropped.items():
            if group not in self.moments:
                names = closest(str(item), self.group_names.values())
                raise UNSCError(f"exclude: no class {item!r} in these statistics; closest: {names}.")
        left = [group for group in self.moments if group not in dropped]
        if not left:
            raise UNSCError(f"exclude: all {len(self.moments)} classes are excluded; keep at least one.")
        return left

    def pooled(self, groups: Iterable[str] | None = None) -> dict[str, SecondMoment]:
        """Moment of each key summed over `groups` (all when None)."""
        chosen = list(self.moments) if groups is None else list(groups)
        return {key: total_moment(self.moments[group][key] for group in chosen) for key in self.keys}

    def excluded(self, exclude: Iterable[Any]) -> dict[str, SecondMoment] | None:
        """Moments of the groups in `exclude`, summed; None without any."""
        kept = self.groups(exclude)
        groups = [group for group in self.moments if group not in kept]
        return self.pooled(groups) if groups else None

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(self.module_keys.values()))

    def __add__(self, other: ActivationStatistics) -> ActivationStatistics:
        """Merge statistics of the same model from other rows; equal groups are summed."""
        return self._combine(other, 1)

    def __sub__(self, other: ActivationStatistics) -> ActivationStatistics:
        """Take rows out again: `stats_all - stats_forgotten`. Groups left without rows are dropped."""
        return self._combine(other, -1)

    def without_rows(self, model: nn.Module, dataset: Any, **collecting: Any) -> ActivationStatistics:
        """The same statistics without single rows: their moments are collected on `model` and subtracted.

        Args:
            model: the model these statistics belong to, before it unlearns the rows.
            dataset: the rows, of groups these statistics hold.
            collecting: as for `collect` (`processing_class`, `label_column`, `groups`, `collate_fn`, ...).

        Raises:
            UNSCError: another model, rows taken out before, or statistics collected with a budget, which do not tell
                whether a row was read.
        """
        layers = [layer for layer in find_layers(model).layers if layer.name in self.module_keys]
        digests = self.fingerprint.refuse_removed(dataset)
        theirs = type(self).collect(
            model,
            dataset,
            layers=layers,
            dtype=getattr(torch, self.fingerprint.dtype),
            rows_per_direction=self.fingerprint.rows_per_direction,
            **collecting,
        )
        return (self - theirs)._without_digests(digests)

    def without_groups(self, groups: Iterable[str], digests: Iterable[str] = ()) -> ActivationStatistics:
        """The same statistics without whole groups; `digests` are the hashes of their rows.

        Raises:
            UNSCError: an unknown group, or nothing would be left.
        """
        kept = self.groups(exclude=groups)
        data = hashlib.sha256(f"{self.fingerprint.data}|{'|'.join(kept)}".encode()).hexdigest()
        moments = {group: self.moments[group] for group in kept}
        left = replace(self, moments=moments, fingerprint=replace(self.fingerprint, data=data))
        return left._without_digests(digests)

    def _without_digests(self, digests: Iterable[str]) -> ActivationStatistics:
        """Note the hashes of rows that were taken out."""
        removed = (*self.fingerprint.removed, *digests)
        return replace(self, fingerprint=replace(self.fingerprint, removed=removed), requests=list(self.requests))

    def bound_to(self, weights: str, requests: list[dict[str, Any]]) -> ActivationStatistics:
        """The same moments for the weights that a request has left, with its log."""
        return replace(self, fingerprint=replace(self.fingerprint, weights=weights), requests=requests)

    def _combine(self, other: ActivationStatistics, sign: int) -> ActivationStatistics:
        self.check_same_model(other.fingerprint.weights, other.module_keys)
        for option in ("dtype", "rows_per_direction"):
            ours, theirs = getattr(self.fingerprint, option), getattr(other.fingerprint, option)
            if ours != theirs:
                raise UNSCError(f"other: collected with {option}={theirs!r}, these with {ours!r}; collect both alike.")
        budget = self.fingerprint.rows_per_direction
        moments = {group: dict(by_key) for group, by_key in self.moments.items()}
        for group, by_key in other.moments.items():
            if group not in moments:
                if sign < 0:
                    raise UNSCError(f"other: class {group!r} is not in these statistics, so it cannot be taken out.")
                moments[group] = dict(by_key)
                continue
            mine = moments[group]
            if sign < 0 and budget and not all(by_key[key].same_as(mine[key]) for key in by_key):
                raise UNSCError(
                    "statistics: were collected with a budget, so whether they hold single rows of class "
                    f"{group!r} is unknown; take out whole classes, or collect with "
                    "rows_per_direction=None."
                )
            if sign < 0 and any(by_key[key].rows > mine[key].rows for key in by_key):
                raise UNSCError(f"other: class {group!r} has more rows to take out than these statistics hold.")
            moments[group] = {key: mine[key].clone().add_(by_key[key], sign) for key in mine}
            if all(moment.rows == 0 for moment in moments[group].values()):
                del moments[group]
        both = hashlib.sha256(f"{self.fingerprint.data}{sign:+d}{other.fingerprint.data}".encode()).hexdigest()
        samples = self.fingerprint.samples + sign * other.fingerprint.samples
        fingerprint = replace(self.fingerprint, data=both, samples=samples)
        names = {**other.group_names, **self.group_names}
        return ActivationStatistics(moments, self.module_keys, fingerprint, names, list(self.requests))

    def check_same_model(self, weights: str, module_keys: Mapping[str, str] | None = None) -> None:
        """Refuse statistics that belong to another model.

        Raises:
            UNSCError: naming both weight hashes, or the first module that only one side has.
        """
        if self.fingerprint.weights != weights:
            raise UNSCError(
                f"statistics: collected from weights {self.fingerprint.weights[:12]} ({self.fingerprint.model}), "
                f"but the model's are {weights[:12]}; collect them again for this model."
            )
        different = sorted(set(self.module_keys.items()) ^ set((module_keys or self.module_keys).items()))
        if different:
            raise UNSCError(
                f"statistics: cover {len(self.module_keys)} modules, asked for {len(module_keys or ())}; "
                f"the first that only one has is {different[0][0]!r}."
            )

    def subspace(
        self,
        exclude: Iterable[Any] = (),
        rule: str = "energy",
        energy: float = 0.95,
        *,
        size: float | None = None,
        device: torch.device | str | None = None,
    ) -> Subspace:
        """Subspace of the rows that are kept: see `rules.build_subspace`; `exclude` names the forgotten classes."""
        exclude = list(exclude)
        return build_subspace(
            {group: self.moments[group] for group in self.groups(exclude)},
            self.module_keys,
            rule=rule,
            energy=energy,
            size=size,
            forget=self.excluded(exclude),
            device=device,
        )

    def save_pretrained(self, folder: str | os.PathLike[str], pending: bool = False) -> None:
        """Write the moments (safetensors) and `statistics.json`; a killed run leaves the old statistics or the new.

        With `pending` they wait beside those that are there, until `storage.settle` sees that the model they belong to
        was saved.
        """
        save_statistics(self, Path(folder), pending)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], model: nn.Module | None = None) -> ActivationStatistics:
        """Read what `save_pretrained` wrote; with `model`, refuse statistics of another model.

        Raises:
            UNSCError: missing or damaged files, another format, or another model (both hashes are named).
        """
        statistics = cls(**load_statistics(Path(folder)))
        if model is not None:
            statistics.check_same_model(weight_hash(model))
        return statistics


def model_fingerprint(model: nn.Module, weights: str | None = None) -> Fingerprint:
    """The part of a fingerprint that tells the model; `weights` is its hash, when already known."""
    config = getattr(model, "config", None)
    return Fingerprint(
        weights=weights or weight_hash(model),
        data="",
        model=Path(str(getattr(config, "_name_or_path", "") or type(model).__name__)).name,
        revision=str(getattr(config, "_commit_hash", None) or ""),
    )


def _groups(
    dataset: Any, label_column: str | None, groups: Sequence[Any] | np.ndarray | None
) -> tuple[np.ndarray, dict[str, str]]:
    """Group of each row as text, and readable names of groups.

    Raises:
        UNSCError: no rows, or not one group for each row.
    """
    from ..data.columns import group_labels

    if len(dataset) == 0:
        raise UNSCError("dataset: has no rows; statistics need at least one.")
    if groups is None:
        labels, names = group_labels(dataset, label_column)
    else:
        labels, names = np.asarray(groups).astype(str), {}
    if len(labels) != len(dataset):
        raise UNSCError(f"groups: {len(labels)} values for {len(dataset)} rows; give one for each row.")
    return labels, names
