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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..data.selection import evenly_spaced
from ..errors import UNSCError, closest, first_line
from ..models.hooks import evaluation_mode
from ..models.layers import ProtectedLayer, find_layers
from ..utils.files import write_beside, write_text
from ..utils.fingerprint import Fingerprint, data_fingerprint, file_hash, weight_hash
from ..utils.sizes import parse_size
from .collect import Pass, stream
from .moments import Moment, SecondMoment, total_moment
from .sketch import MomentSketch

_FORMAT = "unsc_hf.activation_statistics.v1"


_WITH_SKETCHES = "unsc_hf.activation_statistics.v2"  # the same where some moments are sketches


_META = "statistics.json"


_PENDING = "statistics.pending.json"


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

    moments: dict[str, dict[str, Moment]]
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
        max_memory: str | int | None = None,
        sketch_size: int | None = None,
        layout: Mapping[str, int] | None = None,
        wide_rows: bool = False,
    ) -> ActivationStatistics:
        """One streaming pass over `dataset` with forward hooks on `model`, in eval mode and without gradients.

        Rows are read class by class, so every batch belongs to one class and only that class's moments are on the
        model's device: memory there is one (width, width) float64 matrix per distinct layer input, however long the data.
        Finished classes' moments are kept in the CPU's memory.

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
            max_memory: limit on the extra memory of the pass on the model's device, in each process, as bytes or a size such as
                "2GB": sums, and what comes and goes while rows are added to them; the forward pass's own memory comes on top.
                Layers that do not fit together are read in several passes over the data, with the same result to the bit. A layer
                whose moment alone does not fit is sketched (see `sketch.MomentSketch`), with as many columns as
                `memory.sketch_columns` says. Where the model is on the CPU, finished moments share that memory: when they would
                not fit, they are kept in temporary files that the system reads as needed. None sums everything in one pass.
            sketch_size: columns of every sketch, instead.
            layout: which modules are sketched, and with how many columns, as `sketch_sizes` of other statistics says; instead of
                what `max_memory` would choose.
            wide_rows: where a moment does not fit, keep an evenly spread sample of rows (`sketch.RowSample`) for measuring leaks.

        Under `torch.distributed` each process reads its share and the sums are all-reduced.

        Raises:
            UNSCError: no rows, a layer that never runs, NaN or infinite activations (the layer is named), or a limit below what the
                neediest layer needs.
        """
        from ..data.columns import group_labels
        from ..data.inputs import default_collator, prepare_dataset

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
            group: evenly_spaced(np.flatnonzero(labels == group), max_samples_per_class)
            for group in sorted(set(labels.tolist()), key=lambda group: (len(group), group))
        }
        with evaluation_mode(model):
            options = Pass(
                batch_size,
                max_rows_per_class,
                dtype,
                num_workers,
                progress,
                pool_as,
                parse_size(max_memory, "max_memory"),
                sketch_size,
                layout,
                wide_rows,
            )
            moments, keys = stream(model, prepared, members, layers, collate_fn, options)
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

    def pooled(self, groups: Iterable[str] | None = None) -> dict[str, Moment]:
        """Moment of each key summed over `groups` (all when None)."""
        chosen = list(self.moments) if groups is None else list(groups)
        return {key: total_moment(self.moments[group][key] for group in chosen) for key in self.keys}

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(self.module_keys.values()))

    @property
    def sketch_sizes(self) -> dict[str, int]:
        """Columns of the sketch by name of each module whose moments are sketched."""
        kinds = next(iter(self.moments.values()))
        sketched = {key: moment.size for key, moment in kinds.items() if isinstance(moment, MomentSketch)}
        return {name: sketched[key] for name, key in self.module_keys.items() if key in sketched}

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
            layout=self.sketch_sizes,
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
            moments[group] = {key: mine[key].clone().add_(by_key[key], sign) for key in mine}
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
        shapes: dict[str, list[int]] = {}
        sketches: dict[str, dict[str, int]] = {}
        for g, (group, by_key) in enumerate(self.moments.items()):
            for k, key in enumerate(self.keys):
                moment = by_key[key]
                if isinstance(moment, SecondMoment):
                    tensors[f"{g}.{k}"] = _pack(moment.matrix.cpu())
                    shapes[key] = list(moment.matrix.shape[:2])
                elif isinstance(moment, MomentSketch):
                    tensors[f"{g}.{k}"] = moment.products.cpu()
                    tensors[f"{g}.{k}.trace"] = moment.trace.cpu()
                    shapes[key] = [1, moment.width]
                    sketches[key] = {"size": moment.size, "seed": moment.seed}
                else:
                    raise UNSCError(
                        "statistics: samples of activation rows are kept to measure leaks, and never written."
                    )
            rows[group] = {key: by_key[key].rows for key in self.keys}
        meta: dict[str, Any] = {
            "format": _WITH_SKETCHES if sketches else _FORMAT,
            "fingerprint": asdict(self.fingerprint),
            "module_keys": self.module_keys,
            "group_names": self.group_names,
            "keys": self.keys,
            "shapes": shapes,
            "rows": rows,
            "requests": self.requests,
        }
        if sketches:
            meta["sketches"] = sketches
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
        if not isinstance(meta, dict) or meta.get("format") not in (_FORMAT, _WITH_SKETCHES):
            kind = str(meta.get("format"))[:40] if isinstance(meta, dict) else type(meta).__name__
            raise UNSCError(
                f"statistics: {folder} has format {kind!r}, this version reads {_FORMAT!r} and {_WITH_SKETCHES!r}."
            )
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
                    key: _stored_moment(meta, tensors, f"{g}.{k}", group, key) for k, key in enumerate(meta["keys"])
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
    sketches = meta["sketches"] if meta["format"] == _WITH_SKETCHES else {}
    expect(isinstance(sketches, dict) and set(sketches) <= set(keys), "sketches")
    for key, sketch in sketches.items():
        expect(isinstance(sketch, dict) and count(sketch["size"], 1) and count(sketch["seed"], 0), "sketches")
        expect(shapes[key][0] == 1 and sketch["size"] <= shapes[key][1], "sketches")
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


def _stored_moment(meta: dict[str, Any], tensors: dict[str, Tensor], name: str, group: str, key: str) -> Moment:
    """One moment or sketch of an artefact whose JSON has been checked.

    Raises:
        ValueError, KeyError: a tensor that is not what the JSON says.
    """
    (groups, width), rows = meta["shapes"][key], meta["rows"][group][key]
    sketch = meta["sketches"].get(key) if meta["format"] == _WITH_SKETCHES else None
    if sketch is None:
        return SecondMoment(_unpack(tensors[name], groups, width), rows)
    products, trace = tensors[name], tensors[f"{name}.trace"]
    for tensor, shape in ((products, (1, width, sketch["size"])), (trace, (1,))):
        if tensor.dtype != torch.float64 or tuple(tensor.shape) != shape:
            raise ValueError(f"a sketch has shape {tuple(tensor.shape)} and dtype {tensor.dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError("a sketch is not finite")
    return MomentSketch(products, trace, rows, sketch["seed"])


def _pack(matrix: Tensor) -> Tensor:
    """Upper triangles of symmetric matrices (groups, width, width), row by row: no index of the moment's size is made."""
    return torch.cat([matrix[:, row, row:] for row in range(matrix.shape[-1])], dim=1)


def _unpack(upper: Tensor, groups: int, width: int) -> Tensor:
    """Symmetric matrices (groups, width, width) from their upper triangles."""
    if upper.dtype != torch.float64 or tuple(upper.shape) != (groups, width * (width + 1) // 2):
        raise ValueError(f"a moment has shape {tuple(upper.shape)} and dtype {upper.dtype}")
    if not bool(torch.isfinite(upper).all()):
        raise ValueError("a moment is not finite")
    matrix = torch.empty(groups, width, width, dtype=torch.float64)
    first = 0
    for row in range(width):
        part = upper[:, first : first + width - row]
        matrix[:, row, row:] = part
        matrix[:, row:, row] = part
        first += width - row
    return matrix
