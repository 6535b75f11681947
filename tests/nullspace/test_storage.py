"""Large tensors that live in a file while a run goes on."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from unsc_hf import UNSCError
from unsc_hf.nullspace import storage
from unsc_hf.nullspace.moments import SecondMoment
from unsc_hf.nullspace.storage import mapped, mapped_moments


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    for dtype in (torch.float64, torch.float32):
        for tensor in (torch.randn(2, 3, 5, dtype=dtype), torch.randn(7, dtype=dtype), torch.randn(4, 6).to(dtype).mT):
            found = mapped(tensor, folder)
            assert torch.equal(found, tensor)
            found += 1  # a mapped tensor can be written to, like others
            assert torch.equal(found, tensor + 1)
    assert not list(folder.iterdir())  # nothing that a killed run could leave behind


def test_a_mapped_moment_measures_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LEAST_BYTES", 1)
    moment, matrix = SecondMoment.zeros(1, 9).update(torch.randn(1, 40, 9)), torch.randn(1, 4, 9)
    found = mapped_moments({"layer": moment}, tmp_path)["layer"]
    assert found.rows == 40
    assert found.matrix.data_ptr() != moment.matrix.data_ptr()
    assert found.energy(matrix) == moment.energy(matrix)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UNSCError, match=r"output_dir: 8KB .*File too large.*free some space"):
            mapped(torch.zeros(1000, dtype=torch.float64), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
