"""Hashes of models, data sets and files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import UNSCError
from .distributed import is_sharded, whole

_READERS = 8  # tensors whose bytes are hashed at a time


def weight_hash(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of parameters and buffers, in the order of their names.

    Where weights are sharded, all processes must call this together.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(_tensor_bytes(whole(tensor.detach())))
    return digest.hexdigest()


def weight_digests(model: nn.Module, exclude: Collection[str] = ()) -> dict[str, str]:
    """SHA-256 of the bytes of each parameter and buffer, by name. Several are hashed at the same time.

    Where weights are sharded, all processes must call this together.
    """

    def digest(tensor: torch.Tensor) -> str:
        return hashlib.sha256(_tensor_bytes(tensor)).hexdigest()

    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
        digests: dict[str, str | Future[str]] = {}
        for name, tensor in model.state_dict().items():
            if name in exclude:
                continue
            if is_sharded(tensor):  # gathered by all processes, in the same order
                digests[name] = digest(whole(tensor.detach()))
            else:
                digests[name] = pool.submit(digest, tensor.detach())
        return {name: value if isinstance(value, str) else value.result() for name, value in digests.items()}


def _tensor_bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def data_fingerprint(dataset: Any) -> str:
    """SHA-256 of a `datasets.Dataset`'s rows, in order, the same on every machine.

    Images are hashed by their bytes, whether these are in the table or in a file beside it.
    """
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(batch_size=1024):
        for name in table.column_names:
            digest.update(f"|{name}|{len(table)}|".encode())
            for value in table.column(name).to_pylist():
                digest.update(_value_bytes(value))
    return digest.hexdigest()


def row_digests(dataset: Any) -> list[str]:
    """A hash of each row's content, 16 hexadecimal digits: equal rows have equal hashes."""
    digests: list[str] = []
    for table in dataset.with_format("arrow").iter(batch_size=1024):
        columns = [[_value_bytes(value) for value in table.column(name).to_pylist()] for name in table.column_names]
        digests += [hashlib.sha256(b"|".join(cells)).hexdigest()[:16] for cells in zip(*columns, strict=True)]
    return digests


def _value_bytes(value: Any) -> bytes:
    """Bytes that stand for one cell."""
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        content = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
        return hashlib.sha256(content).digest()
    if isinstance(value, list):
        try:
            return hashlib.sha256(np.asarray(value, dtype=np.float64).tobytes()).digest()
        except (TypeError, ValueError):  # texts, or rows of unequal length
            pass
    return repr(value).encode()


@dataclass(frozen=True)
class Fingerprint:
    """The model and rows that statistics were collected from. Only statistics of the same model may be combined."""

    weights: str  # SHA-256 of the model's weights
    data: str  # SHA-256 of the rows that were read, in order
    model: str = ""  # its name or folder name; not compared
    revision: str = ""  # the commit it was loaded at, when known; not compared
    dtype: str = "float64"  # in which rows were multiplied
    rows_per_direction: int | None = None
    samples: int = 0  # number of data set rows read
    removed: tuple[str, ...] = ()  # hashes of single rows that were subtracted again, see `row_digests`

    def refuse_removed(self, dataset: Any) -> list[str]:
        """Hashes of these rows; UNSCError where one was removed before."""
        digests = row_digests(dataset)
        removed = set(self.removed)
        for row, digest in enumerate(digests):
            if digest in removed:
                raise UNSCError(f"forget_dataset: row {row} was forgotten by an earlier request; leave it out.")
        return digests

    def still_held(self, dataset: Any) -> int:
        """How many different rows among these were not removed."""
        return len(set(row_digests(dataset)) - set(self.removed))


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
