"""Retained rows are rehearsed with dropout where that is asked for: they alone, within the promise, or an error says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_vit
from test_architectures import build
from test_trainer import Data, assert_promise, drift, make_trainer
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from unsc_hf import UNSCError
from unsc_hf.rehearsal import dropout_mode, has_dropout


def test_rehearsed_rows_alone_are_read_with_dropout(
    low_rank_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forget rows, checks and statistics never are; batch norm stays on its running statistics either way."""
    config = ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=3)
    model = ResNetForImageClassification(config)
    model.classifier.insert(1, nn.Dropout(0.5))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    seen: list[tuple[bool, bool]] = []
    logits = type(make_trainer(make_vit(), low_rank_data, tmp_path).task).logits

    def read(task: Any, network: nn.Module, inputs: Any) -> Any:
        modes = {type(m).__name__: m.training for m in network.modules()}
        seen.append((modes["Dropout"], modes["BatchNorm2d"]))
        return logits(task, network, inputs)

    trainer = make_trainer(
        model,
        low_rank_data,
        tmp_path,
        energy=0.9,
        objective="unsc_retain",
        retain_dropout=True,
        max_steps=3,
        check_steps=100,
    )
    monkeypatch.setattr(type(trainer.task), "logits", read)
    trainer.train()
    training = [modes for modes in seen if modes[0]]
    assert seen.count((True, False)) == 3 == len(training)  # once a step
    assert not any(norms for _, norms in seen)
    assert seen[seen.index((True, False)) - 1] == (False, False)  # the step's forget rows
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_rehearsal_with_dropout_keeps_the_promise(exact_data: Data, tmp_path: Path) -> None:
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    model = make_vit(labels=10, **rates)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"objective": "unsc_retain", "learning_rate": 2e-4}
    assert_promise(drift(model, exact_data, tmp_path, retain_dropout=True, **options))
    dropped = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(start)
    drift(model, exact_data, tmp_path, **options)
    assert any(not torch.equal(tensor, dropped[name]) for name, tensor in model.state_dict().items())


def test_dropout_that_could_do_nothing_is_refused_or_named(
    low_rank_data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"objective": "unsc_retain", "retain_dropout": True}
    for model, more, said in (
        (make_vit(), {}, r"^retain_dropout: ViTForImageClassification has no dropout, all its rates are 0"),
        (make_vit(hidden_dropout_prob=0.1), {"activation_checkpointing": True}, r"^retain_dropout: not supported with activation"),
    ):  # fmt: skip
        with pytest.raises(UNSCError, match=said):
            make_trainer(model, low_rank_data, tmp_path, **options, **more)
    assert "retain_dropout" not in caplog.text
    make_trainer(make_vit(), low_rank_data, tmp_path, **{**options, "objective": "unsc"})
    assert "retain_dropout: objective 'unsc' rehearses no retained rows, so it changes nothing." in caplog.text


@pytest.mark.parametrize("name", ["bert", "clip", "llama"])
def test_dropout_is_found_in_modules_and_configurations(name: str) -> None:
    """Attention of decoders and of CLIP's vision tower has a rate without a module, the latter's in a part of the configuration."""
    model = build(name)
    settings = getattr(model.config, "vision_config", model.config)
    rates = [key for key, value in vars(settings).items() if "drop" in key and isinstance(value, float)]
    assert rates
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for key in rates:
        setattr(settings, key, 0.0)
    assert not has_dropout(model)
    setattr(settings, rates[-1], 0.1)
    assert has_dropout(model)


def test_every_mode_is_restored_after_dropout() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4)).eval()
    model[2].train()
    before = [module.training for module in model.modules()]
    with dropout_mode(model):
        assert [module.training for module in model.modules()] == [True, False, True, True]
    assert [module.training for module in model.modules()] == before

    def fails() -> None:
        with dropout_mode(model):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert [module.training for module in model.modules()] == before
