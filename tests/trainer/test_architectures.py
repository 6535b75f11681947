"""Every architecture that is named as supported: statistics, unlearning, certificate, exactness, saving and loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.architectures import MODELS, build, reader, rows_for
from helpers.models import logits, relative
from helpers.training import make_trainer
from peft import LoraConfig, PeftModel

from unsc_hf import UNSCError
from unsc_hf.models.layers import find_layers


@pytest.mark.parametrize("name", MODELS)
def test_full_weights(name: str, tmp_path: Path) -> None:
    model = build(name)
    forget, retain = rows_for(model, name)
    look = reader(name)
    before, before_forget = look(model, retain), logits(model, forget)
    trainer = make_trainer(
        model, (forget, retain), tmp_path, check_steps=100, learning_rate=2e-4, weight_decay=0.1, optim="adamw_torch"
    )
    trainer.train()
    network = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    assert relative(look(network, retain), before) <= 1e-6
    assert relative(logits(network, forget), before_forget) > 0.01
    certificate = trainer.certify()
    assert certificate.leak < 1e-5
    assert len(certificate.leak_per_layer) > 3

    # Every parameter is either trained or listed with a reason.
    plan = trainer.plan
    assert plan is not None
    trained = {layer.weight_name for layer in plan.selection.layers}
    for parameter, _ in network.named_parameters():
        assert parameter in trained or plan.selection.frozen[parameter]

    trainer.save_model()
    loaded = type(network).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, forget), logits(network, forget))


@pytest.mark.parametrize("name", list(MODELS))
def test_adapters(name: str, tmp_path: Path) -> None:
    model = build(name)
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    forget, retain = rows_for(model, name)
    look = reader(name)
    before, before_forget = look(model, retain), logits(model, forget)
    trainer = make_trainer(
        model,
        (forget, retain),
        tmp_path,
        check_steps=100,
        max_steps=12,
        learning_rate=2e-4,
        weight_decay=0.1,
        optim="adamw_torch",
        trainer_kwargs={"peft_config": LoraConfig(r=4)},
    )
    trainer.train()
    network = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    assert relative(look(network, retain), before) <= 1e-6
    assert relative(logits(network, forget), before_forget) > 0.003
    certificate = trainer.certify()
    assert certificate.leak < 1e-5
    trainer.save_model()
    fresh = type(model)(model.config)
    fresh.load_state_dict(base)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(logits(loaded, forget), logits(network, forget))
    merged = loaded.merge_and_unload()
    assert relative(look(merged, retain), before) <= 1e-6


def test_mixtral_experts_are_frozen_and_reported() -> None:
    selection = find_layers(build("mixtral"))
    experts = {name: reason for name, reason in selection.frozen.items() if ".experts." in name}
    assert experts
    assert all("fused" in reason for reason in experts.values())
    assert not any("experts" in layer.name for layer in selection.layers)


def test_model_without_a_protectable_layer() -> None:
    with pytest.raises(UNSCError, match="no protectable layer"):
        find_layers(torch.nn.Sequential(torch.nn.LayerNorm(4)))
