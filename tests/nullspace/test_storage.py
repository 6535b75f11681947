"""Large tensors that live in a file while a run goes on."""

from __future__ import annotations

import copy
import resource
from pathlib import Path

import pytest
import torch
from helpers.models import make_vit
from helpers.rows import Data
from helpers.training import unlearned
from peft import LoraConfig

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


@pytest.mark.parametrize("adapters", [False, True])
def test_a_run_ends_where_it_would_without(
    adapters: bool, low_rank_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"peft_config": LoraConfig(r=4)} if adapters else {}
    model, ends, written = make_vit(labels=3), [], []
    monkeypatch.setattr(storage, "mapped", lambda tensor, folder: written.append(folder) or mapped(tensor, folder))
    for least in (storage.LEAST_BYTES, 1):
        monkeypatch.setattr(storage, "LEAST_BYTES", least)
        torch.manual_seed(0)
        trainer = unlearned(
            copy.deepcopy(model), low_rank_data, tmp_path / str(least), check_steps=2, learning_rate=1e-3, **options
        )
        assert set(written) == ({str(tmp_path / "1")} if least == 1 else set())
        ends.append((trainer.certify(), trainer.plan.projection.snapshot()))
    (one, weights), (other, same) = ends
    assert other.leak_per_layer == one.leak_per_layer
    assert all(torch.equal(same[name], weight) for name, weight in weights.items())
