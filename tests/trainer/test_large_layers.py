"""Unlearning under a memory limit: layers are read in several passes, and nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import copied, make_vit
from helpers.rows import Data, tensor_dataset
from helpers.training import Known, make_trainer, quiet_config, unlearned
from peft import LoraConfig

from unsc_hf import UNSCError, serve_request, split_dataset
from unsc_hf.nullspace import storage

WIDE = "vit.layers.0.mlp.fc2"
LIMIT: dict[str, Any] = {"max_statistics_memory": "1.26MB"}


@pytest.mark.parametrize("kept", ["several passes", "files"])
@pytest.mark.parametrize("adapters", [False, True])
def test_a_run_with_little_memory_ends_where_others_do(
    adapters: bool, kept: str, low_rank_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers are read in several passes over the data; large tensors are put into files of the output folder."""
    model, ends, written, mapped = make_vit(), [], list[str](), storage.mapped
    monkeypatch.setattr(storage, "mapped", lambda tensor, folder: written.append(folder) or mapped(tensor, folder))
    lora = {"peft_config": LoraConfig(r=4)} if adapters else {}
    for little in (False, True):
        limit = LIMIT if little and kept == "several passes" else {}
        if little and kept == "files":
            monkeypatch.setattr(storage, "LEAST_BYTES", 1)
        torch.manual_seed(0)
        folder = tmp_path / str(little)
        trainer = unlearned(copy.deepcopy(model), low_rank_data, folder, check_steps=2, **limit, **lora)
        assert set(written) == ({str(folder)} if little and kept == "files" else set())
        ends.append((trainer.held_out_leak(), trainer.plan.projection.snapshot()))
    (leak, weights), (other, same) = ends
    assert other.per_layer == leak.per_layer
    assert all(torch.equal(same[name], weight) for name, weight in weights.items())


def test_only_layers_with_capacity_are_trained_and_only_their_start_is_kept(tmp_path: Path) -> None:
    """Sixteen images have 80 tokens, which fill inputs 48 wide but not 96 wide. The head reads one token of each."""
    retain = tensor_dataset(torch.randn(16, 3, 8, 8), [0, 1] * 8, ["a", "b", "c"])
    forget = tensor_dataset(torch.randn(40, 3, 8, 8), [2] * 40, ["a", "b", "c"])
    model = make_vit()
    start = copied(model.state_dict().items())
    plan = unlearned(model, (forget, retain), tmp_path, validation_fraction=0.01).plan
    free = {name for name in plan.subspace.module_keys if plan.subspace[name].has_capacity}
    assert {WIDE, "vit.layers.1.mlp.fc2", "classifier"} <= free
    assert len(free) < len(plan.subspace.module_keys) - 5
    assert set(plan.projection.snapshot()) == {layer.name for layer in plan.selection.layers} == free
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, start[name]) == (name.removesuffix(".weight") not in free), name


def test_readers_serve_the_statistics(low_rank_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    loader = torch.utils.data.DataLoader

    def recording(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["num_workers"])
        return loader(*args, **kwargs)

    monkeypatch.setattr("unsc_hf.nullspace.collect.DataLoader", recording)
    model = make_vit()
    alone = make_trainer(model, low_rank_data, tmp_path)
    alone.prepare_unlearning()
    read = make_trainer(model, low_rank_data, tmp_path, dataloader_num_workers=1)
    read.prepare_unlearning()
    assert seen == [0, 0, 0, 1, 1, 1]
    for key, moment in alone.spaces.retained.moments["retain"].items():
        assert torch.equal(read.spaces.retained.moments["retain"][key].matrix, moment.matrix)


def test_requests_in_sequence_keep_to_the_limit(known: Known, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "unsc_hf")
    config = quiet_config(tmp_path / "out", energy=0.9, max_steps=3, max_leak=None, max_statistics_memory="1.45MB")
    forget, retain = split_dataset(known.train, forget_classes=["cat"])
    serve_request(known.model, tmp_path / "statistics", config, forget, retain)
    serve_request(known.model, tmp_path / "statistics", config, *split_dataset(retain, forget_classes=["dog"]))
    passes = [message for message in caplog.messages if message.startswith("Statistics of")]
    assert len(passes) == 5  # all rows once, then the rows to forget and the held-out ones of each request
    assert all(" passes over the data" in message for message in passes)


def test_a_limit_that_cannot_hold_one_moment_is_refused(low_rank_data: Data, tmp_path: Path) -> None:
    with pytest.raises(UNSCError, match="max_statistics_memory: 9KB is too small: the moment of layer .* 96 wide"):
        unlearned(make_vit(), low_rank_data, tmp_path, max_statistics_memory="9KB")
