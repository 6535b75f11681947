"""Second moments of activation rows, per class: the sufficient statistics of null-space calibration.

The moments are uncentred and summed in float64 (a centred covariance hides the mean direction, a float32 sum hides the
small eigenvalues the null space is made of). They are additive, so statistics merge over workers by one sum and serve
any deletion request by subtraction: C_retain = C_all - sum of C_c over the forgotten classes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from .errors import UNSCError, closest, first_line
from .files import write_beside, write_text
from .fingerprint import Fingerprint, data_fingerprint, file_hash, weight_hash
from .layers import NOT_INPUTS, ProtectedLayer, capture_inputs, evaluation_mode, find_layers, row_mask, trace_layers
from .sharding import is_sharded, process

_FORMAT = "unsc_hf.activation_statistics.v1"
_META = "statistics.json"
_PENDING = "statistics.pending.json"
_GOLDEN = 0.6180339887498949
_ROW_STRIDE = 7919  # a prime: consecutive samples start at unrelated places of the golden sequence


@dataclass
class SecondMoment:
    """Sum of x x^T over activation rows x.

    Attributes:
        matrix: float64, shape (groups, width, width); groups is 1 except for grouped convolutions.
        rows: number of rows summed (per group).
    """

    matrix: Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, groups: int, width: int, device: torch.device | str = "cpu") -> SecondMoment:
        return cls(torch.zeros(groups, width, width, dtype=torch.float64, device=device))

    def update(self, rows: Tensor, dtype: torch.dtype = torch.float64) -> SecondMoment:
        """Add rows of shape (groups, n, width), multiplied in `dtype` and summed in float64; returns self."""
        x = rows.to(dtype)
        self.matrix += (x.mT @ x).double()
        self.rows += rows.shape[1]
        return self

    def __add__(self, other: SecondMoment) -> SecondMoment:
        return SecondMoment(self.matrix + other.matrix, self.rows + other.rows)

    def __sub__(self, other: SecondMoment) -> SecondMoment:
        return SecondMoment(self.matrix - other.matrix, self.rows - other.rows)


def total_moment(moments: Iterable[SecondMoment]) -> SecondMoment:
    """Sum of several moments (at least one), without touching them."""
    items = list(moments)
    if not items:
        raise UNSCError("moments: nothing to sum; keep at least one class.")
    matrix = items[0].matrix.clone()
    for item in items[1:]:
        matrix += item.matrix
    return SecondMoment(matrix, sum(item.rows for item in items))


@dataclass
class ActivationStatistics:
    """Second moments of every protectable layer's input, kept apart by group (usually the class).

    Attributes:
        moments: `moments[group][key]`; groups are label ids as text, keys name a layer whose input is shared.
        module_keys: key by module name; modules fed by the same tensor (q, k, v) share one key.
        fingerprint: what the statistics belong to.
        group_names: readable name of each group (class name), for messages and `exclude`.
        requests: what was served from these statistics so far, oldest first; see `requests.serve_request`.
    """

    moments: dict[str, dict[str, SecondMoment]]
    module_keys: dict[str, str]
    fingerprint: Fingerprint
    group_names: dict[str, str] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)

    # ---- collecting -------------------------------------------------------------------------------------------------

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
        max_rows_per_class: int | None = None,
        max_samples_per_class: int | None = None,
        dtype: torch.dtype = torch.float64,
        num_workers: int = 0,
        weights: str | None = None,
        progress: bool = True,
    ) -> ActivationStatistics:
        """One streaming pass over `dataset` with forward hooks on `model`, in eval mode and without gradients.

        Rows are read class by class, so every batch belongs to one class and only that class's moments are on the
        model's device: memory there is one (width, width) float64 matrix per distinct layer input, however long the data.

        Args:
            model: the model whose activations are recorded; its mode is restored afterwards.
            dataset: a `datasets.Dataset`, raw (then `processing_class` prepares it) or ready for the model.
            label_column: column that names the group of each row; found by itself when None.
            groups: a group for each row, instead of a column.
            pool_as: sum all classes into one group of this name; budgets still hold for each class. Saves memory when
                classes need not be told apart later.
            target_modules: see `layers.find_layers`.
            layers: the layers themselves, when they are already known.
            processing_class: image processor or tokenizer for raw rows.
            prepare: makes raw rows ready for the model, instead of `processing_class`.
            collate_fn: makes a batch of samples; transformers' default when None.
            batch_size: samples per forward pass; does not change the result.
            max_rows_per_class: row budget per class and layer. When a class has more activation rows than this, an
                evenly spread share of its tokens is used, the same one whatever the batch size. None uses every row.
            max_samples_per_class: at most this many data set rows of each class, evenly spaced, are read at all.
            dtype: torch.float64, or torch.float32 to multiply faster where float64 is slow; sums are float64 anyway.
            num_workers: processes that read data.
            weights: `weight_hash(model)`, when already known.
            progress: show a progress bar.

        Under `torch.distributed` each process reads its share and the sums are all-reduced.

        Raises:
            UNSCError: no rows, a layer that never runs, or NaN or infinite activations (the layer is named).
        """
        from .data import default_collator, group_labels, prepare_dataset

        if dtype not in (torch.float32, torch.float64):
            raise UNSCError(f"dtype: {dtype} cannot hold second moments; use torch.float64 or torch.float32.")
        if len(dataset) == 0:
            raise UNSCError("dataset: has no rows; statistics need at least one.")
        if groups is None:
            labels, names = group_labels(dataset, label_column)
        else:
            labels, names = np.asarray(groups).astype(str), {}
        if len(labels) != len(dataset):
            raise UNSCError(f"groups: {len(labels)} values for {len(dataset)} rows; give one for each row.")

        prepared = prepare(dataset) if prepare else prepare_dataset(dataset, processing_class, model, label_column)
        collate_fn = collate_fn or default_collator(processing_class)
        if layers is None:
            layers = find_layers(model, target_modules).layers

        members = {
            group: _evenly_spaced(np.flatnonzero(labels == group), max_samples_per_class)
            for group in sorted(set(labels.tolist()), key=lambda group: (len(group), group))
        }
        with evaluation_mode(model):
            moments, keys = _stream(
                model,
                prepared,
                members,
                layers,
                collate_fn,
                batch_size,
                max_rows_per_class,
                dtype,
                num_workers,
                progress,
                pool_as,
            )
        config = getattr(model, "config", None)
        fingerprint = Fingerprint(
            weights=weights or weight_hash(model),
            data=data_fingerprint(dataset),
            model=Path(str(getattr(config, "_name_or_path", "") or type(model).__name__)).name,
            revision=str(getattr(config, "_commit_hash", None) or ""),
            dtype=str(dtype).removeprefix("torch."),
            max_rows_per_class=max_rows_per_class,
            max_samples_per_class=max_samples_per_class,
            samples=sum(len(rows) for rows in members.values()),
        )
        return cls(moments, keys, fingerprint, {group: names.get(group, group) for group in moments})

    # ---- algebra ----------------------------------------------------------------------------------------------------

    def groups(self, exclude: Iterable[Any] = ()) -> list[str]:
        """Group ids left after `exclude`, which takes ids or names.

        Raises:
            UNSCError: for an unknown group (the closest names are listed), or when none is left.
        """
        dropped = {self._group(item) for item in exclude}
        left = [group for group in self.moments if group not in dropped]
        if not left:
            raise UNSCError(f"exclude: all {len(self.moments)} classes are excluded; keep at least one.")
        return left

    def _group(self, item: Any) -> str:
        by_name = {name: group for group, name in self.group_names.items()}
        key = by_name.get(str(item), str(item))
        if key not in self.moments:
            raise UNSCError(
                f"exclude: no class {item!r} in these statistics; closest: {closest(str(item), self.group_names.values())}."
            )
        return key

    def pooled(self, groups: Iterable[str] | None = None) -> dict[str, SecondMoment]:
        """Moment of each key summed over `groups` (all when None)."""
        chosen = list(self.moments) if groups is None else list(groups)
        return {key: total_moment(self.moments[group][key] for group in chosen) for key in self.keys}

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
            UNSCError: another model, rows taken out before, or statistics collected with a budget (whether a row was read
                cannot be told then).
        """
        budget = self.fingerprint.max_rows_per_class or self.fingerprint.max_samples_per_class
        names = set(self.module_keys)
        layers = [layer for layer in find_layers(model).layers if layer.name in names]
        digests = self.fingerprint.refuse_removed(dataset)
        theirs = type(self).collect(
            model,
            dataset,
            layers=layers,
            dtype=getattr(torch, self.fingerprint.dtype),
            max_rows_per_class=self.fingerprint.max_rows_per_class,
            max_samples_per_class=self.fingerprint.max_samples_per_class,
            **collecting,
        )
        whole = all(
            group in self.moments and all(m.rows == self.moments[group][key].rows for key, m in by_key.items())
            for group, by_key in theirs.moments.items()
        )
        if budget and not whole:
            raise UNSCError(
                "statistics: were collected with a budget, so whether a row is in them cannot be told; collect them with "
                "max_rows_per_class=None and max_samples_per_class=None to serve requests of single rows."
            )
        left = self - theirs
        fingerprint = replace(left.fingerprint, removed=(*self.fingerprint.removed, *digests))
        return replace(left, fingerprint=fingerprint, requests=list(self.requests))

    def without_groups(self, groups: Iterable[str], digests: Iterable[str] = ()) -> ActivationStatistics:
        """The same statistics without whole groups; `digests` are the hashes of their rows.

        Raises:
            UNSCError: an unknown group, or nothing would be left.
        """
        kept = self.groups(exclude=groups)
        data = hashlib.sha256(f"{self.fingerprint.data}|{'|'.join(kept)}".encode()).hexdigest()
        fingerprint = replace(self.fingerprint, data=data, removed=(*self.fingerprint.removed, *digests))
        moments = {group: self.moments[group] for group in kept}
        return replace(self, moments=moments, fingerprint=fingerprint, requests=list(self.requests))

    def bound_to(self, weights: str, requests: list[dict[str, Any]]) -> ActivationStatistics:
        """The same moments for the weights that a request has left, with its log."""
        return replace(self, fingerprint=replace(self.fingerprint, weights=weights), requests=requests)

    def _combine(self, other: ActivationStatistics, sign: int) -> ActivationStatistics:
        self.check_same_model(other.fingerprint.weights, other.module_keys)
        for option in ("dtype", "max_rows_per_class", "max_samples_per_class"):
            ours, theirs = getattr(self.fingerprint, option), getattr(other.fingerprint, option)
            if ours != theirs:
                raise UNSCError(f"other: collected with {option}={theirs!r}, these with {ours!r}; collect both alike.")
        budget = self.fingerprint.max_rows_per_class or self.fingerprint.max_samples_per_class
        moments = {group: dict(by_key) for group, by_key in self.moments.items()}
        for group, by_key in other.moments.items():
            if group not in moments:
                if sign < 0:
                    raise UNSCError(f"other: class {group!r} is not in these statistics, so it cannot be taken out.")
                moments[group] = dict(by_key)
                continue
            mine = moments[group]
            if sign < 0 and budget and any(by_key[key].rows != mine[key].rows for key in by_key):
                raise UNSCError(
                    f"other: only a part of class {group!r}, but a budget chose which rows were read; "
                    "take out whole classes, or collect without max_rows_per_class and max_samples_per_class."
                )
            if sign < 0 and any(by_key[key].rows > mine[key].rows for key in by_key):
                raise UNSCError(f"other: class {group!r} has more rows to take out than these statistics hold.")
            moments[group] = {key: mine[key] + by_key[key] if sign > 0 else mine[key] - by_key[key] for key in mine}
            if all(moment.rows == 0 for moment in moments[group].values()):
                del moments[group]
        both = hashlib.sha256(f"{self.fingerprint.data}{sign:+d}{other.fingerprint.data}".encode()).hexdigest()
        fingerprint = replace(
            self.fingerprint, data=both, samples=self.fingerprint.samples + sign * other.fingerprint.samples
        )
        return ActivationStatistics(moments, self.module_keys, fingerprint, {**other.group_names, **self.group_names})

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
        rank: int | None = None,
        ratio: float | None = None,
        merge: str = "sum",
    ) -> Any:
        """Subspace of the rows that are kept: see `subspace.build_subspace`; `exclude` names the forgotten classes."""
        from .subspace import build_subspace

        kept = self.groups(exclude)
        forgotten = [group for group in self.moments if group not in kept]
        return build_subspace(
            {group: self.moments[group] for group in kept},
            self.module_keys,
            rule=rule,
            energy=energy,
            rank=rank,
            ratio=ratio,
            merge=merge,
            forget=self.pooled(forgotten) if forgotten else None,
        )

    # ---- storage ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike[str], pending: bool = False) -> None:
        """Write `statistics-<hash>.safetensors` and then `statistics.json`, which names it and vouches for it.

        With `pending` they wait beside those that are there, until `settle` sees that the model they belong to was saved.

        Renaming the JSON replaces earlier statistics as a whole: a run killed at any moment leaves the old ones or the new.
        Other files in the folder are left alone. Moments are symmetric: only their upper triangles are stored.
        """
        target = Path(folder)
        tensors: dict[str, Tensor] = {}
        rows: dict[str, dict[str, int]] = {}
        for g, (group, by_key) in enumerate(self.moments.items()):
            for k, key in enumerate(self.keys):
                upper = torch.triu_indices(*by_key[key].matrix.shape[1:])
                tensors[f"{g}.{k}"] = by_key[key].matrix[:, upper[0], upper[1]].contiguous().cpu()
            rows[group] = {key: by_key[key].rows for key in self.keys}
        widths = {key: list(moment.matrix.shape[:2]) for key, moment in next(iter(self.moments.values())).items()}
        meta: dict[str, Any] = {
            "format": _FORMAT,
            "fingerprint": asdict(self.fingerprint),
            "module_keys": self.module_keys,
            "group_names": self.group_names,
            "keys": self.keys,
            "shapes": widths,
            "rows": rows,
            "requests": self.requests,
        }
        fresh = target / "statistics-new.safetensors"
        write_beside(fresh, lambda scratch: save_file(tensors, scratch, metadata={"format": "pt"}))
        meta["sha256"] = file_hash(fresh)
        meta["file"] = f"statistics-{meta['sha256'][:16]}.safetensors"
        os.replace(fresh, target / meta["file"])
        write_text(target / (_PENDING if pending else _META), json.dumps(meta, indent=1, ensure_ascii=False))
        if not pending:
            (target / _PENDING).unlink(missing_ok=True)
            _sweep(target)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], model: nn.Module | None = None) -> ActivationStatistics:
        """Read what `save_pretrained` wrote; with `model`, refuse statistics of another model.

        Raises:
            UNSCError: missing or damaged files, another format, or another model (both hashes are named).
        """
        folder = Path(folder)
        try:
            meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UNSCError(f"statistics: {folder} holds no {_META}; collect and save them first.") from error
        except (OSError, ValueError, RecursionError) as error:
            raise UNSCError(f"statistics: {folder} is damaged ({first_line(error)}); collect them again.") from error
        if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
            kind = str(meta.get("format"))[:40] if isinstance(meta, dict) else type(meta).__name__
            raise UNSCError(f"statistics: {folder} has format {kind!r}, this version reads {_FORMAT!r}.")
        try:
            _check_meta(meta)
            file = folder / meta["file"]
            found = file_hash(file)
            if meta["sha256"] != found:
                raise ValueError(
                    f"{file.name} has SHA-256 {found[:12]}, {_META} expects {meta['sha256'][:12]}: one of them was replaced"
                )
            tensors, rows = load_file(file), meta["rows"]
            moments = {
                group: {
                    key: SecondMoment(_unpack(tensors[f"{g}.{k}"], *meta["shapes"][key]), rows[group][key])
                    for k, key in enumerate(meta["keys"])
                }
                for g, group in enumerate(rows)
            }
            fingerprint = Fingerprint(**meta["fingerprint"])
        except FileNotFoundError as error:
            raise UNSCError(f"statistics: {folder} holds no {file.name}; collect and save them again.") from error
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UNSCError(f"statistics: {folder} is damaged ({first_line(error)}); collect them again.") from error
        statistics = cls(moments, meta["module_keys"], fingerprint, meta["group_names"], meta["requests"])
        if model is not None:
            statistics.check_same_model(weight_hash(model))
        return statistics


def settle(folder: str | os.PathLike[str], weights: str) -> None:
    """Statistics that wait in a folder take the place of the others if they belong to these weights; if the others do, they go.

    So a run killed between the two files it must leave, a model and its statistics, leaves a pair that fits.

    Args:
        folder: of the statistics.
        weights: hash of the model that is there now, as `weight_hash` gives it.
    """
    folder = Path(folder)
    if _bound_weights(folder / _PENDING) == weights:
        os.replace(folder / _PENDING, folder / _META)
    elif _bound_weights(folder / _META) == weights:
        (folder / _PENDING).unlink(missing_ok=True)
    else:
        return  # another model: reading the statistics will say so
    _sweep(folder)


def _bound_weights(file: Path) -> str | None:
    """Hash of the model that an artefact's JSON belongs to; None without a readable one."""
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["fingerprint"]["weights"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _sweep(folder: Path) -> None:
    """Remove moments that the artefact's JSON does not name, and what a killed run was writing."""
    named = json.loads((folder / _META).read_text(encoding="utf-8")).get("file")
    for old in (*folder.glob("statistics-*.safetensors"), *folder.glob(".statistics*")):
        if old.name != named:
            old.unlink(missing_ok=True)


def _check_meta(meta: dict[str, Any]) -> None:
    """Whatever lies on a disk may have been written by anybody: types, names and numbers are what they must be.

    Raises:
        ValueError, KeyError, TypeError: naming the first thing that is not.
    """

    def expect(holds: bool, name: str) -> None:
        if not holds:
            raise ValueError(f"{name} is not what it must be")

    def texts(value: Any) -> bool:
        return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())

    def count(value: Any, least: int) -> bool:
        return type(value) is int and least <= value < 2**53

    keys, shapes, rows, fingerprint = meta["keys"], meta["shapes"], meta["rows"], meta["fingerprint"]
    expect(
        isinstance(meta["file"], str)
        and re.fullmatch(r"statistics-[0-9a-f]{16}\.safetensors", meta["file"]) is not None,
        "file",
    )
    expect(isinstance(meta["sha256"], str), "sha256")
    expect(isinstance(keys, list) and bool(keys) and all(isinstance(key, str) for key in keys), "keys")
    expect(texts(meta["module_keys"]) and set(meta["module_keys"].values()) == set(keys), "module_keys")
    expect(texts(meta["group_names"]), "group_names")
    expect(isinstance(shapes, dict), "shapes")
    for key in keys:
        expect(
            isinstance(shapes[key], list) and len(shapes[key]) == 2 and all(count(n, 1) for n in shapes[key]), "shapes"
        )
    expect(isinstance(rows, dict) and bool(rows), "rows")
    for by_key in rows.values():
        expect(
            isinstance(by_key, dict) and set(by_key) == set(keys) and all(count(n, 0) for n in by_key.values()), "rows"
        )
    expect(
        isinstance(meta["requests"], list) and all(isinstance(entry, dict) for entry in meta["requests"]), "requests"
    )
    for entry in meta["requests"]:
        leak = entry["leak"]
        expect(type(leak) in (int, float) and math.isfinite(leak) and leak >= 0 and count(entry["rows"], 0), "requests")
        expect(all(isinstance(entry[name], str) for name in ("time", "digest", "salt")), "requests")
    expect(isinstance(fingerprint, dict), "fingerprint")
    for name in ("weights", "data", "model", "revision"):
        expect(isinstance(fingerprint[name], str), f"fingerprint.{name}")
    for name in ("max_rows_per_class", "max_samples_per_class"):
        expect(fingerprint[name] is None or count(fingerprint[name], 1), f"fingerprint.{name}")
    expect(count(fingerprint["samples"], 0), "fingerprint.samples")
    expect(fingerprint["dtype"] in ("float32", "float64"), "fingerprint.dtype")
    removed = fingerprint["removed"]
    expect(isinstance(removed, list) and all(isinstance(digest, str) for digest in removed), "fingerprint.removed")


def _unpack(upper: Tensor, groups: int, width: int) -> Tensor:
    """Symmetric matrices (groups, width, width) from their upper triangles."""
    if upper.dtype != torch.float64 or tuple(upper.shape) != (groups, width * (width + 1) // 2):
        raise ValueError(f"a moment has shape {tuple(upper.shape)} and dtype {upper.dtype}")
    if not bool(torch.isfinite(upper).all()):
        raise ValueError("a moment is not finite")
    matrix = torch.zeros(groups, width, width, dtype=torch.float64)
    rows, columns = torch.triu_indices(width, width)
    matrix[:, rows, columns] = upper
    matrix[:, columns, rows] = upper
    return matrix


def _evenly_spaced(rows: np.ndarray, limit: int | None) -> np.ndarray:
    """At most `limit` of the rows, evenly spaced."""
    if limit is None or len(rows) <= limit:
        return rows
    return rows[np.linspace(0, len(rows) - 1, limit).astype(np.int64)]


def _kept_rows(first: int, samples: int, rows_per_sample: int, share: float, device: torch.device) -> Tensor:
    """Which rows of a batch are used, bool of shape (samples * rows_per_sample,).

    Row r of a class is kept when the fractional part of r times the golden ratio falls below `share`: evenly spread
    over samples and positions, without randomness, and the same for every batch size.
    """
    sample = torch.arange(first, first + samples, dtype=torch.float64, device=device)
    row = torch.arange(rows_per_sample, dtype=torch.float64, device=device)
    return ((sample[:, None] * _ROW_STRIDE + row) * _GOLDEN).frac().reshape(-1) < share


class _Recorder:
    """Moments of one group while it streams by, on the model's device."""

    def __init__(
        self,
        layers: Sequence[ProtectedLayer],
        shares: Mapping[str, float],
        dtype: torch.dtype,
        device: torch.device,
        first_sample: int,
    ) -> None:
        """`shares`: share of rows used, by layer name; `first_sample`: position in the group of the first sample read."""
        self.moments = {
            layer.name: SecondMoment.zeros(layer.geometry.groups, layer.geometry.width, device) for layer in layers
        }
        self.shares, self.dtype, self.device = shares, dtype, device
        self.samples = 0
        self._next = first_sample
        self._mask: Tensor | None = None

    def begin(self, samples: int, mask: Tensor | None) -> None:
        """Announce the next batch."""
        self.position, self.samples = self._next, samples
        self._next += samples
        self._mask = None if mask is None else mask.to(self.device)

    def add(self, layer: ProtectedLayer, x: Tensor) -> None:
        """Add the rows of one layer's input, without padding and within the budget."""
        rows = layer.rows(x.detach())
        keep = row_mask(x, self._mask)
        share = self.shares[layer.name]
        if share < 1.0 and rows.shape[1] % self.samples == 0:
            spread = _kept_rows(self.position, self.samples, rows.shape[1] // self.samples, share, self.device)
            keep = spread if keep is None else spread & keep
        self.moments[layer.name].update(rows if keep is None else rows[:, keep], self.dtype)

    def all_reduce(self) -> None:
        """Sum over processes."""
        for moment in self.moments.values():
            dist.all_reduce(moment.matrix)
            count = torch.tensor(moment.rows, device=self.device)
            dist.all_reduce(count)
            moment.rows = int(count)

    def finish(self) -> dict[str, SecondMoment]:
        """The moments, on the CPU.

        Raises:
            UNSCError: NaN or infinite activations; a square that is not finite shows on the diagonal.
        """
        for name, moment in self.moments.items():
            if not bool(torch.isfinite(moment.matrix.diagonal(dim1=-2, dim2=-1)).all()):
                raise UNSCError(
                    f"model: NaN or infinite activations enter layer {name!r}; check the weights and the data."
                )
            moment.matrix = moment.matrix.cpu()
        return self.moments


def _stream(
    model: nn.Module,
    dataset: Any,
    members: Mapping[str, np.ndarray],
    layers: Sequence[ProtectedLayer],
    collate_fn: Callable[[list[dict[str, Any]]], dict[str, Any]],
    batch_size: int,
    max_rows: int | None,
    dtype: torch.dtype,
    num_workers: int,
    progress: bool,
    pool_as: str | None,
) -> tuple[dict[str, dict[str, SecondMoment]], dict[str, str]]:
    """The pass itself, over `members[group]` rows of each group: moments by group and key, and the key of each module."""
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
    leaders = [layer for layer in layers if trace.leaders[layer.name] == layer.name]

    rank, world = process()
    moments: dict[str, dict[str, SecondMoment]] = {}
    total = sum(len(rows) for rows in members.values())
    bar = tqdm(total=total, desc="Activation statistics", unit=" rows", disable=not progress or rank > 0)
    for group, chosen in members.items():
        mine = np.array_split(np.arange(len(chosen)), world)[rank]
        shares = {
            name: 1.0 if max_rows is None else max_rows / (len(chosen) * rows)
            for name, rows in trace.rows_per_sample.items()
        }
        recorder = _Recorder(leaders, shares, dtype, device, first_sample=int(mine[0]) if len(mine) else 0)
        loader = DataLoader(
            Subset(dataset, chosen[mine].tolist()),
            batch_size=batch_size,
            collate_fn=collate_fn,
            num_workers=num_workers,
            generator=torch.Generator(),  # leaves the global random state alone
        )
        with torch.no_grad(), capture_inputs(leaders, recorder.add, strict=len(mine) > 0):
            for batch in loader:
                recorder.begin(len(next(iter(batch.values()))), batch.get("attention_mask"))
                forward(batch)
                bar.update(recorder.samples * world)
        # A sharded model runs on all processes or on none: whoever has fewer batches runs on as many as the others.
        batches = [-(-len(part) // batch_size) for part in np.array_split(np.arange(len(chosen)), world)]
        if any(is_sharded(parameter) for parameter in model.parameters()):
            with torch.no_grad():
                for _ in range(max(batches) - batches[rank]):
                    forward(probe)
        if world > 1:
            recorder.all_reduce()
        current = recorder.finish()
        if pool_as is None:
            moments[group] = current
        elif pool_as not in moments:
            moments[pool_as] = current
        else:
            moments[pool_as] = {key: moments[pool_as][key] + moment for key, moment in current.items()}
    bar.close()
    return moments, {layer.name: trace.leaders[layer.name] for layer in layers}
