"""Moments on disk: statistics that are saved and loaded, and tensors that live in a file while a run goes on."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UNSCError, first_line
from ..utils.files import write_beside, write_text
from ..utils.fingerprint import Fingerprint, file_hash
from ..utils.sizes import format_size
from .moments import SecondMoment

if TYPE_CHECKING:
    from .statistics import ActivationStatistics

LEAST_BYTES = 2**22  # Of a tensor that is worth a file.
_FORMAT = "unsc_hf.activation_statistics.v1"
_META = "statistics.json"
_PENDING = "statistics.pending.json"


def mapped(tensor: Tensor, folder: str | os.PathLike[str]) -> Tensor:
    """The same numbers on the CPU, mapped from a nameless file in `folder`.

    The system reads pages of the file when they are used and may drop them again. The file goes with the tensor, and
    with the process if that is killed. What is written into the tensor stays in memory.

    Raises:
        UNSCError: the folder's disk is full.
    """
    values = tensor.detach().cpu().contiguous()
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(values.numpy().data)
            file.flush()
            return torch.from_file(file.name, size=values.numel(), dtype=values.dtype).view(values.shape)
    except OSError as error:
        raise UNSCError(
            f"output_dir: {format_size(values.nbytes)} of a run's moments cannot be written to {folder} "
            f"({error.strerror}); free some space on its disk, or choose another folder."
        ) from error


def mapped_if_large(tensor: Tensor, folder: str | os.PathLike[str]) -> Tensor:
    """A tensor of 4 MiB or more as `mapped` gives it; a smaller one as it is."""
    return mapped(tensor, folder) if tensor.nbytes >= LEAST_BYTES else tensor


def mapped_moments(moments: Mapping[str, SecondMoment], folder: str | os.PathLike[str]) -> dict[str, SecondMoment]:
    """The same moments, the large ones mapped from files in `folder`."""
    return {key: SecondMoment(mapped_if_large(m.matrix, folder), m.rows) for key, m in moments.items()}


def save_statistics(statistics: ActivationStatistics, folder: Path, pending: bool = False) -> None:
    """Write `statistics-<hash>.safetensors`, then `statistics.json`, which names it.

    Renaming the JSON replaces earlier statistics as a whole: a run killed at any moment leaves the old ones or the new.
    Other files in the folder are left alone. Moments are symmetric, so only their upper triangles are stored.

    With `pending` they wait beside the statistics that are there until `settle` is called.
    """
    keys = statistics.keys
    tensors = {
        f"{g}.{k}": _upper_triangles(by_key[key].matrix.cpu())
        for g, by_key in enumerate(statistics.moments.values())
        for k, key in enumerate(keys)
    }
    sample = next(iter(statistics.moments.values()))
    meta: dict[str, Any] = {
        "format": _FORMAT,
        "fingerprint": asdict(statistics.fingerprint),
        "module_keys": statistics.module_keys,
        "group_names": statistics.group_names,
        "keys": keys,
        "shapes": {key: list(sample[key].matrix.shape[:2]) for key in keys},
        "rows": {group: {key: by_key[key].rows for key in keys} for group, by_key in statistics.moments.items()},
        "requests": statistics.requests,
    }
    fresh = folder / "statistics-new.safetensors"
    write_beside(fresh, lambda scratch: save_file(tensors, scratch, metadata={"format": "pt"}))
    meta["file"] = f"statistics-{file_hash(fresh)[:16]}.safetensors"
    os.replace(fresh, folder / meta["file"])
    write_text(folder / (_PENDING if pending else _META), json.dumps(meta, indent=1, ensure_ascii=False))
    if not pending:
        (folder / _PENDING).unlink(missing_ok=True)
        _sweep(folder)


def load_statistics(folder: Path) -> dict[str, Any]:
    """Read what `save_statistics` wrote: the fields of `ActivationStatistics`.

    Raises:
        UNSCError: missing or damaged files, or another format.
    """
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        if meta["format"] != _FORMAT:
            raise UNSCError(
                f"statistics: {folder} has format {meta['format']!r}, but this version reads {_FORMAT!r}; "
                "collect them again."
            )
        tensors = load_file(folder / meta["file"])
        moments = {
            group: {
                key: SecondMoment(_symmetric(tensors[f"{g}.{k}"], *meta["shapes"][key]), rows[key])
                for k, key in enumerate(meta["keys"])
            }
            for g, (group, rows) in enumerate(meta["rows"].items())
        }
        fingerprint = Fingerprint(**{**meta["fingerprint"], "removed": tuple(meta["fingerprint"]["removed"])})
        rest = {name: meta[name] for name in ("module_keys", "group_names", "requests")}
        return {"moments": moments, "fingerprint": fingerprint, **rest}
    except UNSCError:
        raise
    except FileNotFoundError as error:
        raise UNSCError(
            f"statistics: {folder} holds no {_META}, or not the file that it names; collect and save them first."
        ) from error
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UNSCError(f"statistics: {folder} is damaged ({first_line(error)}); collect them again.") from error


def settle(folder: str | os.PathLike[str], weights: str) -> None:
    """Keep those statistics in a folder, pending or not, that belong to the weights of this hash; remove the others.

    A run must leave two things, a model and its statistics. If it is killed between the two, this finds the pair that
    fits. With statistics of neither kind for these weights nothing is changed; reading them will report it.

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
        return
    _sweep(folder)


def _bound_weights(file: Path) -> str | None:
    """Hash of the model that statistics belong to, from their JSON; None without a readable one."""
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["fingerprint"]["weights"])
    except (OSError, ValueError, TypeError, LookupError):
        return None


def _sweep(folder: Path) -> None:
    """Remove moments that the JSON does not name, and what a killed run was writing."""
    named = json.loads((folder / _META).read_text(encoding="utf-8")).get("file")
    for old in (*folder.glob("statistics-*.safetensors"), *folder.glob(".statistics*")):
        if old.name != named:
            old.unlink(missing_ok=True)


def _upper_triangles(matrix: Tensor) -> Tensor:
    """Upper triangles of matrices (groups, width, width), row by row, shape (groups, width * (width + 1) / 2).

    Row by row, because an index of all elements would take as much memory as the moment.
    """
    return torch.cat([matrix[:, row, row:] for row in range(matrix.shape[-1])], dim=1)


def _symmetric(upper: Tensor, groups: int, width: int) -> Tensor:
    """Symmetric matrices (groups, width, width) from their upper triangles.

    Raises:
        ValueError: another shape or dtype, or numbers that are not finite.
    """
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
