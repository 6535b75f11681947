"""Large tensors that wait in a file between checks."""

from __future__ import annotations

import copy
import errno
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers.models import make_vit
from helpers.training import make_trainer
from peft import LoraConfig

from unsc_hf import UNSCError
from unsc_hf.nullspace import storage as offload
from unsc_hf.nullspace.moments import SecondMoment
from unsc_hf.nullspace.storage import Shelf, ShelvedMoment


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "new")
    tensors = [
        torch.randn(*shape, dtype=dtype) for dtype in (torch.float64, torch.float32) for shape in ((2, 3, 5), (7,))
    ]
    readers = [shelf.put(tensor.mT if tensor.dim() > 1 else tensor) for tensor in tensors]
    for tensor, read in zip(tensors, readers, strict=True):
        found = read()
        found += 0  # it can be written to, and what lies on the shelf stays
        assert torch.equal(read(), tensor.mT if tensor.dim() > 1 else tensor)
    assert not list((tmp_path / "new").iterdir())  # nothing that a killed run could leave behind


def test_a_shelved_moment_measures_the_same(tmp_path: Path) -> None:
    moment = SecondMoment.zeros(1, 9).update(torch.randn(1, 40, 9))
    shelved, matrix = ShelvedMoment(moment, Shelf(tmp_path)), torch.randn(1, 4, 9)
    assert shelved.rows == 40
    assert shelved.energy(matrix) == moment.energy(matrix)


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def seek(self, *place: int) -> int:
            return 0

        def write(self, data: memoryview) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(offload.tempfile, "TemporaryFile", lambda dir: Full())
    with pytest.raises(UNSCError, match=r"output_dir: 8KB .*No space left on device.*make room"):
        Shelf(tmp_path).put(torch.zeros(1000, dtype=torch.float64))


@pytest.mark.parametrize("adapters", [False, True])
def test_a_run_ends_where_it_would_without(
    adapters: bool, low_rank_data: tuple[Dataset, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"peft_config": LoraConfig(r=4)} if adapters else {}
    model, ends = make_vit(labels=3), []
    for least in (offload._LEAST_BYTES, 1):
        monkeypatch.setattr(offload, "_LEAST_BYTES", least)
        torch.manual_seed(0)
        trainer = make_trainer(
            copy.deepcopy(model), low_rank_data, tmp_path / str(least), check_steps=2, trainer_kwargs=dict(options)
        )
        trainer.train()
        assert trainer.plan is not None
        assert {isinstance(moment, ShelvedMoment) for moment in trainer.plan.held_out.values()} == {least == 1}
        ends.append((trainer.certify(), trainer.plan.projection.snapshot()))
    (one, weights), (other, same) = ends
    assert other.leak_per_layer == one.leak_per_layer
    assert all(torch.equal(same[name], weight) for name, weight in weights.items())
