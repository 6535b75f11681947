"""Means and covariances of the features of each retained class: what the forgotten rows' features are held against.

The features are the inputs of the head. Counts, sums and second moments are kept in float64, for they are additive: forgotten
classes are dropped, and means and covariances of the others follow. The artefact lies beside the second moments of
`statistics.py` (`class_statistics.json` and a safetensors file that it vouches for), carries the same kind of
fingerprint, and is refused with another model.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UNSCError, first_line
from ..models.outputs import Outputs
from ..objectives.terms import ANSWERS, FeatureTargets
from ..utils.files import write_beside, write_text
from ..utils.fingerprint import Fingerprint, file_hash
from .closed_form import ridged

_FORMAT = "unsc_hf.class_statistics.v1"


_META = "class_statistics.json"


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassMoment:
    """Sums over the feature rows of one class.

    Attributes:
        rows: their number.
        total: sum of the rows, float64, (width,).
        square: sum of x x^T, float64, (width, width).
    """

    rows: int
    total: Tensor
    square: Tensor

    @classmethod
    def of(cls, features: Tensor) -> ClassMoment:
        """Of features (rows, width)."""
        x = features.double()
        return cls(len(x), x.sum(0), x.T @ x)

    def __add__(self, other: ClassMoment) -> ClassMoment:
        return ClassMoment(self.rows + other.rows, self.total + other.total, self.square + other.square)

    @property
    def mean(self) -> Tensor:
        """(width,)."""
        return self.total / max(self.rows, 1)

    @property
    def covariance(self) -> Tensor:
        """Of the population, (width, width); zero for a single row."""
        found = self.square / max(self.rows, 1) - torch.outer(self.mean, self.mean)
        return (found + found.T) / 2


@dataclass(frozen=True)
class ClassStatistics:
    """Moments of the head's inputs by class id.

    Attributes:
        classes: moment of each retained class.
        fingerprint: what they were collected from.
    """

    classes: dict[int, ClassMoment]
    fingerprint: Fingerprint = field(default_factory=lambda: Fingerprint("", ""))

    @classmethod
    def of(cls, parts: Iterable[Outputs], fingerprint: Fingerprint | None = None) -> ClassStatistics:
        """From a model's outputs with features, batch by batch.

        Raises:
            UNSCError: features that are not finite.
        """
        classes: dict[int, ClassMoment] = {}
        for part in parts:
            features = part.need_features()
            if not bool(torch.isfinite(features).all()):
                raise UNSCError("model: NaN or infinite features enter its head; check the weights and the data.")
            for label in torch.unique(part.labels).tolist():
                found = ClassMoment.of(features[part.labels == label])
                classes[label] = classes[label] + found if label in classes else found
        return cls(dict(sorted(classes.items())), fingerprint or Fingerprint("", ""))

    @property
    def width(self) -> int:
        """Of the features."""
        return len(next(iter(self.classes.values())).total)

    def short_of_rows(self) -> list[int]:
        """Classes with no more rows than features: their covariance has no inverse but for the ridge."""
        return [label for label, moment in self.classes.items() if moment.rows <= self.width]

    def within(self) -> Tensor:
        """Pooled covariance within the classes, (width, width)."""
        rows = sum(moment.rows for moment in self.classes.values())
        parts = [moment.covariance * (moment.rows / rows) for moment in self.classes.values()]
        return torch.stack(parts).sum(0)

    def without(self, labels: Iterable[int], digests: Iterable[str] = ()) -> ClassStatistics:
        """The same statistics without whole classes; `digests` are the hashes of their rows.

        Raises:
            UNSCError: nothing would be left.
        """
        gone = set(labels)
        left = {label: moment for label, moment in self.classes.items() if label not in gone}
        if not left:
            raise UNSCError(f"exclude: all {len(self.classes)} classes are excluded; keep at least one.")
        fingerprint = replace(self.fingerprint, removed=(*self.fingerprint.removed, *digests))
        return ClassStatistics(left, fingerprint)

    def check_same_model(self, weights: str) -> None:
        """Refuse statistics of another model.

        Raises:
            UNSCError: naming both weight hashes.
        """
        if self.fingerprint.weights != weights:
            raise UNSCError(
                f"class_statistics: collected from weights {self.fingerprint.weights[:12]} ({self.fingerprint.model}), "
                f"but the model's are {weights[:12]}; collect them again for this model."
            )

    # ---- storage ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `class_statistics-<hash>.safetensors` and then `class_statistics.json`, which names it and vouches for it."""
        target = Path(folder)
        tensors: dict[str, Tensor] = {}
        for label, moment in self.classes.items():
            tensors[f"{label}.total"] = moment.total.cpu().contiguous()
            tensors[f"{label}.square"] = moment.square.cpu().contiguous()
        fresh = target / "class_statistics-new.safetensors"
        write_beside(fresh, lambda scratch: save_file(tensors, scratch, metadata={"format": "pt"}))
        digest = file_hash(fresh)
        meta = {
            "format": _FORMAT,
            "fingerprint": asdict(self.fingerprint),
            "rows": {str(label): moment.rows for label, moment in self.classes.items()},
            "width": self.width,
            "sha256": digest,
            "file": f"class_statistics-{digest[:16]}.safetensors",
        }
        os.replace(fresh, target / str(meta["file"]))
        write_text(target / _META, json.dumps(meta, indent=1, ensure_ascii=False))
        for old in target.glob("class_statistics-*.safetensors"):
            if old.name != meta["file"]:  # it may hold classes that are forgotten by now
                old.unlink(missing_ok=True)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> ClassStatistics:
        """Read what `save_pretrained` wrote.

        Raises:
            UNSCError: missing or damaged files, or another format.
        """
        folder = Path(folder)
        try:
            meta = json.loads((folder / _META).read_text(encoding="utf-8"))
            _check_meta(meta)
            file = folder / meta["file"]
            found = file_hash(file)
            if found != meta["sha256"]:
                raise ValueError(f"{file.name} has SHA-256 {found[:12]}, {_META} expects {meta['sha256'][:12]}")
            tensors, width = load_file(file), meta["width"]
            classes = {
                int(label): ClassMoment(
                    rows,
                    _checked(tensors[f"{label}.total"], (width,)),
                    _checked(tensors[f"{label}.square"], (width, width)),
                )
                for label, rows in meta["rows"].items()
            }
            return cls(classes, Fingerprint(**meta["fingerprint"]))
        except FileNotFoundError as error:
            raise UNSCError(
                f"class_statistics: {folder} holds no {Path(str(error.filename)).name}; collect and save them first."
            ) from error
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
            raise UNSCError(
                f"class_statistics: {folder} is damaged ({first_line(error)}); collect them again."
            ) from error


def remove_stale(folder: str | os.PathLike[str], weights: str) -> None:
    """Remove class statistics that belong to other weights than these: what they hold may be forgotten by now."""
    folder = Path(folder)
    if not (folder / _META).exists():
        return
    try:
        if ClassStatistics.from_pretrained(folder).fingerprint.weights == weights:
            return
    except UNSCError:
        pass
    (folder / _META).unlink()
    for old in folder.glob("class_statistics-*.safetensors"):
        old.unlink()


def feature_targets(statistics: ClassStatistics, device: torch.device | str = "cpu") -> FeatureTargets:
    """Means and whitenings of the classes, with a ridge of 1 % of the mean variance; classes with no more rows than features are
    named in a warning, for there it is the ridge that decides.

    Raises:
        UNSCError: a single class.
    """
    if len(statistics.classes) < 2 and set(statistics.classes) != {ANSWERS}:
        raise UNSCError(
            "retain_dataset: holds a single class; features matched to it would say nothing at all. Use objective 'unsc'."
        )
    short = statistics.short_of_rows()
    if short:
        logger.warning(
            "%d of %d classes have no more rows than the %d features (class %d has %d): their covariances rest on the ridge.",
            len(short), len(statistics.classes), statistics.width, short[0], statistics.classes[short[0]].rows,
        )  # fmt: skip

    def whitening(covariance: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(ridged(covariance))
        return (vectors * values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt()).float().to(device)

    within = whitening(statistics.within())
    return FeatureTargets(
        {label: moment.mean.float().to(device) for label, moment in statistics.classes.items()},
        {label: whitening(moment.covariance) for label, moment in statistics.classes.items()},
        within @ within.T,
    )


def _checked(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.dtype != torch.float64 or tuple(tensor.shape) != shape or not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"a moment has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, or is not finite")
    return tensor


def _check_meta(meta: Any) -> None:
    """Whatever lies on a disk may have been written by anybody: types, names and numbers are what they must be."""

    def expect(holds: bool, name: str) -> None:
        if not holds:
            raise ValueError(f"{name} is not what it must be")

    def count(value: Any, least: int) -> bool:
        return type(value) is int and least <= value < 2**53

    expect(isinstance(meta, dict) and meta.get("format") == _FORMAT, "format")
    named = isinstance(meta["file"], str) and re.fullmatch(r"class_statistics-[0-9a-f]{16}\.safetensors", meta["file"])
    expect(bool(named), "file")
    expect(isinstance(meta["sha256"], str), "sha256")
    expect(count(meta["width"], 1), "width")
    rows = meta["rows"]
    expect(isinstance(rows, dict) and bool(rows), "rows")
    for label, number in rows.items():
        expect(re.fullmatch(r"-1|\d{1,9}", label) is not None and count(number, 1), "rows")
    found = meta["fingerprint"]
    expect(isinstance(found, dict) and set(found) <= set(asdict(Fingerprint("", ""))), "fingerprint")
    for name in ("weights", "data", "model", "revision"):
        expect(isinstance(found[name], str), f"fingerprint.{name}")
    removed = found["removed"]
    expect(isinstance(removed, list) and all(isinstance(digest, str) for digest in removed), "fingerprint.removed")
