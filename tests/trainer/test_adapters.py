"""Adapters keep the promise exactly, leave the base alone, and are ordinary PEFT adapters afterwards."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.architectures import MODELS, build, rows_for
from helpers.language import answer_logits, make_lm, repeated_tokens
from helpers.models import logits, make_vit, relative
from helpers.rows import Data, exact_rows
from helpers.training import Known, assert_resumed_run_ends_as_a_whole_one, make_trainer, network_of, unlearned
from peft import LoraConfig, PeftModel, PromptTuningConfig

from unsc_hf import ActivationStatistics, UNSCError
from unsc_hf.comparison.arguments import LanguageArguments, check_model_dtype
from unsc_hf.nullspace.lora import null_space_start
from unsc_hf.nullspace.moments import SecondMoment
from unsc_hf.nullspace.rules import build_subspace
from unsc_hf.objectives import OBJECTIVES
from unsc_hf.trainer.sharding import shard_model
from unsc_hf.utils.fingerprint import weight_hash

NAMES = list("abcdefghij")
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "adamw with decay": ({}, {"weight_decay": 0.1}),
    "momentum": ({}, {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 3e-3}),
    "rslora, alpha, dropout": (
        {"use_rslora": True, "lora_alpha": 16, "lora_dropout": 0.3},
        {"weight_decay": 0.1, "learning_rate": 1e-4},
    ),
    "patch convolution": ({"target_modules": ["projection", "q_proj"]}, {"weight_decay": 0.1}),
    "activation checkpointing": ({}, {"activation_checkpointing": True}),
}


def _unlearn(model: Any, data: Data, folder: Path, lora: dict[str, Any] | None = None, **options: Any) -> Any:
    config = LoraConfig(**{"r": 4, **(lora or {})})
    return unlearned(model, data, folder, peft_config=config, **{"check_steps": 100, "learning_rate": 2e-4, **options})


def assert_same_base(network: Any, base: dict[str, torch.Tensor]) -> None:
    adapted = network.get_base_model().state_dict()
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in adapted.items()}
    assert all(torch.equal(kept[name], tensor) for name, tensor in base.items())


@pytest.mark.parametrize("case", CASES)
def test_retained_outputs_do_not_move_and_the_base_is_untouched(case: str, exact_data: Data, tmp_path: Path) -> None:
    forget, retain = exact_data
    lora, options = CASES[case]
    model = make_vit(labels=10)
    fresh, before, before_forget = copy.deepcopy(model), logits(model, retain), logits(model, forget)
    base = fresh.state_dict()
    trainer = _unlearn(model, exact_data, tmp_path / "adapter", lora, **options)
    network = network_of(trainer)
    assert relative(logits(network, retain), before) <= 1e-6
    assert relative(logits(network, forget), before_forget) > 0.01

    trainer.save_model()
    assert weight_hash(fresh) == trainer.original_weights
    assert not list((tmp_path / "adapter").glob("*.md"))  # PEFT's own card names folders of this machine
    loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / "adapter")
    assert torch.equal(logits(loaded, forget), logits(network, forget))
    assert relative(logits(loaded.merge_and_unload(), retain), before) <= 1e-6
    assert_same_base(network, base)


@pytest.mark.parametrize(
    ("place", "broken", "options", "least"),
    [
        ("projection.NullSpaceProjection.project_displacements", lambda *_: None, {"weight_decay": 0.1}, 1e-4),
        ("lora.null_space_start", lambda here, forgotten, rank, place: torch.randn(rank, here.width), {}, 1e-3),
    ],
)
def test_without_projection_or_a_start_in_the_null_space_adapters_break_the_promise(
    place: str, broken: Any, options: dict[str, Any], least: float, exact_data: Data, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(f"unsc_hf.nullspace.{place}", broken)
    model, retain = make_vit(labels=10), exact_data[1]
    before = logits(model, retain)
    trainer = _unlearn(model, exact_data, tmp_path, learning_rate=5e-3, **options)
    assert relative(logits(trainer.model, retain), before) > least


def test_start_is_principal_and_free() -> None:
    retain, forget = torch.randn(40, 5) @ torch.randn(5, 16), torch.randn(400, 16) * torch.linspace(3, 0.1, 16)
    moment = {"0": {"k": SecondMoment.zeros(1, 16).update(retain[None])}}
    space = build_subspace(moment, {"k": "k"}, energy=1.0)["k"]
    forgotten = SecondMoment.zeros(1, 16).update(forget[None])
    start = null_space_start(space, forgotten, 3)
    assert (start @ retain.double().T).abs().max() < 1e-4
    torch.testing.assert_close(start @ start.T, torch.eye(3, dtype=torch.float64) * 16 / 3)
    free = space.basis[0, :, 5:]
    best = torch.linalg.eigvalsh(free.T @ forgotten.matrix[0] @ free)[-3:].sum()
    caught = (start @ forgotten.matrix[0] @ start.T).trace() * 3 / 16
    assert caught == pytest.approx(float(best))
    wide = null_space_start(space, forgotten, 14)
    assert (wide.norm(dim=1) > 0).tolist() == [True] * 11 + [False] * 3


def test_rank_is_reduced_to_capacity(low_rank_data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = _unlearn(make_vit(), low_rank_data, tmp_path, {"r": 40, "target_modules": ["q_proj"]})
    assert "vit.layers.0.attention.q_proj: rank 40 is reduced to its capacity, " in caplog.text
    for layer in trainer.plan.selection.layers:
        capacity = int(trainer.plan.subspace[layer.name].capacity)
        assert int((layer.weight.norm(dim=1) > 0).sum()) == capacity < 40


def test_statistics_of_the_model_serve_its_adapters(low_rank_data: Data, tmp_path: Path) -> None:
    model = make_vit()
    statistics = ActivationStatistics.collect(model, low_rank_data[1], progress=False)
    trainer = _unlearn(model, low_rank_data, tmp_path, {"r": 2}, statistics=statistics)
    assert trainer.certify().leak < 1e-5


def test_resumed_adapter_run_ends_at_the_same_weights(known: Known, tmp_path: Path) -> None:
    assert_resumed_run_ends_as_a_whole_one(
        known.model, known.data, tmp_path, 2, peft_config=LoraConfig(r=4), learning_rate=1e-4, check_steps=100,
        energy=0.9, max_steps=5, save_strategy="steps", save_steps=1, per_device_train_batch_size=5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(use_dora=True, target_modules=["q_proj"]), "use_dora"),
        (LoraConfig(lora_bias=True, target_modules=["q_proj"]), "lora_bias"),
        (LoraConfig(bias="all", target_modules=["q_proj"]), "bias='none'"),
        (LoraConfig(modules_to_save=["classifier"], target_modules=["q_proj"]), "modules_to_save"),
        (LoraConfig(init_lora_weights="olora", target_modules=["q_proj"]), "init_lora_weights"),
        (LoraConfig(target_modules=["query", "value"]), r"'q_proj'.*Its layers are classifier, fc1, fc2"),
        (PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS"), "only LoraConfig"),
    ],
)
def test_adapters_that_are_refused(config: Any, message: str, low_rank_data: Data, tmp_path: Path) -> None:
    model = make_vit()
    with pytest.raises(UNSCError, match=message):
        make_trainer(model, low_rank_data, tmp_path / "out", peft_config=config)
    assert not (tmp_path / "out").exists()
    assert not any("lora" in name for name, _ in model.named_modules())


def _bfloat16(kind: str) -> tuple[Any, Data, Callable[[Any, Dataset], torch.Tensor]]:
    """A model in bfloat16, rows to forget, retained rows of few distinct activations, and how its logits are read."""
    if kind == "vit":
        return make_vit(labels=10).to(torch.bfloat16), exact_rows(NAMES), logits
    return make_lm(kind).to(torch.bfloat16), repeated_tokens(), answer_logits


@pytest.mark.parametrize("name", [name for name in MODELS if name != "vit"])
def test_every_architecture_in_bfloat16_keeps_its_outputs_to_the_last_bit(name: str, tmp_path: Path) -> None:
    model = build(name).to(torch.bfloat16)
    trainer = _unlearn(model, rows_for(model, name), tmp_path, learning_rate=2e-3)
    certificate = trainer.certify()
    assert certificate.drift.largest == 0
    assert certificate.relative_change > 0.01
    assert certificate.merged["bfloat16"].relative < 0.5


@pytest.mark.parametrize("kind", ["vit", "llama"])
@pytest.mark.parametrize("objective", [name for name, each in OBJECTIVES.items() if "refusal" not in each.needs])
def test_every_objective_in_bfloat16(objective: str, kind: str, tmp_path: Path) -> None:
    model, rows, _ = _bfloat16(kind)
    if kind == "vit" and "hidden" in OBJECTIVES[objective].needs:
        with pytest.raises(
            UNSCError, match="^objective: 'rmu' reads hidden states of answer tokens, which a classifier"
        ):
            _unlearn(model, rows, tmp_path, learning_rate=2e-3, objective=objective)
        return
    trainer = _unlearn(model, rows, tmp_path, learning_rate=2e-3, objective=objective)
    assert trainer.certify().drift.largest == 0
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("kind", ["vit", "gpt2", "llama"])
def test_under_adapters_a_bfloat16_model_keeps_its_outputs_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    """What is left of an update on retained inputs is far less than bfloat16 can tell apart."""
    model, (forget, retain), read = _bfloat16(kind)
    base = copy.deepcopy(model)
    before, before_forget = read(model, retain), read(model, forget)
    trainer = _unlearn(model, (forget, retain), tmp_path / "adapter", learning_rate=2e-3, weight_decay=0.1)
    network = network_of(trainer)
    assert {p.dtype for name, p in network.named_parameters() if ".lora_" in name} == {torch.float32}
    assert torch.equal(read(network, retain), before)
    # Queries, keys and values read one input, though each casts it for itself.
    inputs = trainer.plan.subspace.module_keys
    assert len({inputs[name] for name in inputs if name.rsplit(".", 1)[-1] in ("q_proj", "k_proj", "v_proj")}) == (
        0 if kind == "gpt2" else 2
    )
    assert relative(read(network, forget), before_forget) > 0.01

    certificate = trainer.certify()
    assert certificate.drift.largest == 0
    # In float32 the activations differ by their rounding; merged into bfloat16 the update itself is rounded.
    assert 0 < certificate.merged["float32"].relative < 0.1
    assert 0 < certificate.merged["bfloat16"].relative < 0.1

    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert 'dtype="bfloat16")' in card
    assert "on the base model in bfloat16" in card
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(read(loaded, retain), before)
    assert torch.equal(read(loaded, forget), read(network, forget))


def test_half_precision_is_refused_where_it_would_round_updates(low_rank_data: Data, tmp_path: Path) -> None:
    with pytest.raises(UNSCError, match=r"bfloat16.*dtype=torch\.float32.*or unlearn in adapters"):
        make_trainer(make_vit().to(torch.bfloat16), low_rank_data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UNSCError, match=r"float16.*dtype=torch\.float32 \(bf16=True still trains in autocast\)\.$"):
        _unlearn(make_vit().to(torch.float16), low_rank_data, tmp_path)
    model, rows, _ = _bfloat16("vit")
    trainer = make_trainer(model, rows, tmp_path, peft_config=LoraConfig(r=4))
    with pytest.raises(UNSCError, match="fsdp: the model is in bfloat16; load it in float32"):
        shard_model(trainer.accelerator, trainer.model, trainer.args)
    for options, words in (
        ({"model_dtype": "bfloat16"}, "use_peft"),
        ({"model_dtype": "int8", "use_peft": True}, "choose from float32, bfloat16"),
    ):
        with pytest.raises(UNSCError, match=f"model_dtype: .*{words}"):
            check_model_dtype(LanguageArguments(**options))


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_what_a_product_does_is_measured_in_as_many_rows_as_its_rank(kind: str, tmp_path: Path) -> None:
    lora: dict[str, Any] = {}
    if kind == "vit":  # the patches' convolution too
        model, rows = make_vit(labels=10), exact_rows(NAMES)
        lora = {"target_modules": ["projection", "q_proj", "fc1"], "use_rslora": True, "lora_alpha": 3}
    else:  # weights that are stored transposed
        model, rows = make_lm("gpt2"), repeated_tokens()
    trainer = _unlearn(model, rows, tmp_path, lora, learning_rate=1e-2)
    projection = trainer.plan.projection
    assert len(projection.layers) > 4
    for layer in projection.layers:
        whole, small = projection.change(layer), projection.measured(layer)
        assert small.shape[1] == 4 < whole.shape[1]
        root = torch.randn(1, whole.shape[2], whole.shape[2], dtype=torch.float64)
        moment = SecondMoment(root @ root.mT, 1)
        assert moment.energy(small) == pytest.approx(moment.energy(whole), rel=1e-4)
        assert moment.energy(small) > 0
