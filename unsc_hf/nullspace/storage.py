"""Large tensors that are needed now and then, kept in a file between times."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UNSCError
from ..utils.sizes import format_size
from .moments import Measurable, SecondMoment

_LEAST_BYTES = 2**22  # of a tensor that is worth a file: smaller ones are read faster than they are missed


def is_large(tensor: Tensor) -> bool:
    """Whether a tensor takes so much memory that it should not stay there unused (4 MiB)."""
    return tensor.nbytes >= _LEAST_BYTES


class Shelf:
    """A nameless file in a folder, for tensors that are read back each time they are needed. The system takes the file away with the last
    tensor on it, and also when the process is killed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._file: Any = None

    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Write a tensor; what is returned reads it, to the CPU.

        Raises:
            UNSCError: no room in the folder.
        """
        array = tensor.detach().cpu().contiguous().numpy()
        shape, dtype = array.shape, array.dtype
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed with its last reader
            file = self._file
            place = file.seek(0, os.SEEK_END)
            file.write(array.data)
            file.flush()
        except OSError as error:
            raise UNSCError(
                f"output_dir: {format_size(array.nbytes)} of a run's moments cannot be put into {self._folder} "
                f"({error.strerror}); make room, or choose another folder."
            ) from error
        return lambda: torch.from_numpy(np.array(np.memmap(file, dtype, "r", place, shape)))


class ShelvedMoment:
    """A second moment that is read only to be measured with."""

    def __init__(self, moment: SecondMoment, shelf: Shelf) -> None:
        self.rows = moment.rows
        self._read = shelf.put(moment.matrix)

    def energy(self, matrix: Tensor) -> float:
        """tr(M C M^T), as of the moment itself."""
        return SecondMoment(self._read(), self.rows).energy(matrix)


def shelve_moments(moments: Mapping[str, Measurable], shelf: Shelf) -> dict[str, Measurable]:
    """The same moments, the large ones on the shelf."""
    return {
        key: ShelvedMoment(moment, shelf) if isinstance(moment, SecondMoment) and is_large(moment.matrix) else moment
        for key, moment in moments.items()
    }
