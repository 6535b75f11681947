"""Every architecture that is named as supported: statistics, unlearning, certificate, exactness, saving and loading."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architectures import MODELS, build, reader, rows_for
from helpers.models import copied, logits, relative
from helpers.training import network_of, unlearned
from peft import LoraConfig, PeftModel

from unsc_hf.models.layers import find_layers


@pytest.mark.parametrize("adapters", [False, True], ids=["full weights", "adapters"])
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(name: str, adapters: bool, tmp_path: Path) -> None:
    model, look = build(name), reader(name)
    start, buffers = copy.deepcopy(model), copied(model.named_buffers())
    data = forget, retain = rows_for(model, name)
    before, before_forget = look(model, retain), logits(model, forget)
    options: dict[str, Any] = {"max_steps": 12, "peft_config": LoraConfig(r=4)} if adapters else {}
    trainer = unlearned(model, data, tmp_path, check_steps=100, learning_rate=2e-4, weight_decay=0.1, **options)
    network, plan, certificate = network_of(trainer), trainer.plan, trainer.certify()
    assert relative(look(network, retain), before) <= 1e-6
    assert relative(logits(network, forget), before_forget) > (0.0005 if adapters else 0.01)
    assert certificate.leak < 1e-5
    trainer.save_model()
    if adapters:
        loaded: Any = PeftModel.from_pretrained(start, tmp_path)
    else:
        loaded = type(network).from_pretrained(tmp_path)
        assert len(certificate.leak_per_layer) > 3
        # Every parameter is either trained or listed with a reason; running statistics are not touched.
        trained = {layer.weight_name for layer in plan.selection.layers}
        assert all(key in trained or plan.selection.frozen[key] for key, _ in model.named_parameters())
        assert all(torch.equal(buffer, buffers[key]) for key, buffer in model.named_buffers())
    assert torch.equal(logits(loaded, forget), logits(network, forget))
    if adapters:
        assert relative(look(loaded.merge_and_unload(), retain), before) <= 1e-6


def test_mixtral_experts_are_frozen_and_reported() -> None:
    selection = find_layers(build("mixtral"))
    experts = {name: reason for name, reason in selection.frozen.items() if ".experts." in name}
    assert experts
    assert all("fused" in reason for reason in experts.values())
    assert not any("experts" in layer.name for layer in selection.layers)
