"""On a CUDA device: the same promises, and the same results as on a CPU. Skipped where there is none."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import two_processes
from helpers.architectures import MODELS, build, reader, rows_for
from helpers.language import answer_logits, make_lm, repeated_tokens
from helpers.models import learned, logits, make_vit, relative
from helpers.recipes import FAST, RECIPE, parquet_folder, run_process
from helpers.rows import Data, Draw, exact_rows, with_odd_labels
from helpers.training import COMPILED, make_trainer, network_of, unlearned
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from unsc_hf import ActivationStatistics, split_dataset
from unsc_hf.objectives import OBJECTIVES
from unsc_hf.utils.precision import full_float32

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture(autouse=True)
def _default_precision() -> Iterator[None]:
    """`tf32=True` and `torch_compile=True` change the whole process."""
    yield
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "none"


def _unlearn(model: Any, data: Data, folder: Path, adapters: bool = False, **options: Any) -> Any:
    settings = {"use_cpu": False, "check_steps": 100, "learning_rate": 2e-4, "weight_decay": 0.1, **options}
    trainer = unlearned(model, data, folder, **({"peft_config": LoraConfig(r=4)} if adapters else {}), **settings)
    assert next(trainer.model.parameters()).device.type == "cuda"
    return trainer


def _network(trainer: Any) -> Any:
    """The unlearned model on the CPU, where rows and what they are compared with are."""
    return copy.deepcopy(network_of(trainer)).cpu()


@pytest.mark.parametrize("adapters", [False, True], ids=["full weights", "adapters"])
@pytest.mark.parametrize("name", MODELS)
def test_retained_outputs_do_not_move(name: str, adapters: bool, tmp_path: Path) -> None:
    model = build(name)
    start = copy.deepcopy(model)
    data = forget, retain = rows_for(model, name)
    look = reader(name)
    before, before_forget = look(model, retain), logits(model, forget)
    trainer = _unlearn(model, data, tmp_path, adapters, max_steps=12)
    network = _network(trainer)
    assert relative(look(network, retain), before) <= 1e-6
    assert relative(logits(network, forget), before_forget) > 0.003
    assert trainer.certify().leak < 1e-5
    trainer.save_model()
    loaded = PeftModel.from_pretrained(start, tmp_path) if adapters else type(network).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, forget), logits(network, forget))


@pytest.mark.parametrize("adapters", [False, True], ids=["full weights", "adapters"])
@pytest.mark.parametrize("name", ["vit", "resnet", "bert", "gpt2"])
def test_the_same_run_as_on_a_cpu(name: str, adapters: bool, tmp_path: Path) -> None:
    model = build(name)
    data = rows_for(model, name)
    found = []
    for place, cpu in (("cpu", True), ("cuda", False)):
        trainer = make_trainer(
            copy.deepcopy(model), data, tmp_path / place, use_cpu=cpu, energy=0.9, optim="sgd", learning_rate=1e-2,
            check_steps=2, peft_config=LoraConfig(r=4) if adapters else None,
        )  # fmt: skip
        with full_float32():  # else convolutions in the steps are in TF32
            trainer.train()
        found.append((_network(trainer), trainer.plan, trainer.held_out_leak().total))
    (ours, plan, leak), (theirs, other, their_leak) = found
    ranks = [{key: layer.ranks for key, layer in part.subspace.layers.items()} for part in (plan, other)]
    assert ranks[0] == ranks[1]
    assert torch.equal(plan.pseudo_labels.argmax(-1), other.pseudo_labels.argmax(-1))
    torch.testing.assert_close(other.pseudo_labels, plan.pseudo_labels, rtol=0, atol=1e-5)
    assert their_leak == pytest.approx(leak, rel=1e-3)
    if adapters:  # directions of A are only known up to their sign, so products are compared
        ours, theirs = ours.merge_and_unload(), theirs.merge_and_unload()
    start = dict(model.named_parameters())
    moved = sum(float((p - start[n]).square().sum()) for n, p in ours.named_parameters()) ** 0.5
    apart = sum(float((p - dict(theirs.named_parameters())[n]).square().sum()) for n, p in ours.named_parameters())
    assert moved > 0
    assert apart**0.5 <= 1e-3 * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_moments_as_on_a_cpu(dtype: torch.dtype) -> None:
    model = make_vit().double()
    rows = two_processes.images().with_format("torch", dtype=torch.float64)
    for options in ({}, {"max_memory": "1.5MB", "pool_as": "all"}):
        one, two = (
            ActivationStatistics.collect(
                model.to(place), rows, batch_size=4, dtype=dtype, progress=False, rows_per_direction=1, **options
            )
            for place in ("cpu", "cuda")
        )
        for group, by_key in one.moments.items():
            for key, moment in by_key.items():
                other = two.moments[group][key]
                ours, theirs = moment.matrix.cpu(), other.matrix.cpu()
                # TF32 would be 1e-3 off.
                assert float((theirs - ours).norm()) <= (1e-10 if dtype == torch.float64 else 1e-6) * float(ours.norm())


@pytest.mark.parametrize("objective", [name for name, each in OBJECTIVES.items() if "refusal" not in each.needs])
@pytest.mark.parametrize("adapters", [False, True], ids=["full weights", "adapters"])
def test_answers_do_not_move_under_any_objective(objective: str, adapters: bool, tmp_path: Path) -> None:
    data = forget, retain = repeated_tokens()
    model = make_lm()
    before, before_forget = answer_logits(model, retain), answer_logits(model, forget)
    trainer = _unlearn(model, data, tmp_path, adapters, objective=objective)
    network = _network(trainer)
    assert relative(answer_logits(network, retain), before) <= 2e-6
    if objective != "fine_tune":
        assert relative(answer_logits(network, forget), before_forget) > 1e-4
    assert trainer.certify().leak < 1e-5


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_under_adapters_a_bfloat16_model_keeps_its_outputs_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    if kind == "vit":
        model, data = make_vit(labels=10).to(torch.bfloat16), exact_rows(list("abcdefghij"))
    else:
        model, data = make_lm().to(torch.bfloat16), repeated_tokens()
    trainer = _unlearn(model, data, tmp_path, adapters=True, learning_rate=2e-3)
    certificate = trainer.certify()
    assert certificate.drift.largest == 0
    assert certificate.relative_change > 0.01


@pytest.mark.parametrize(
    "options",
    [{"bf16": True}, {"tf32": True}, COMPILED, {"torch_compile": True}, {"activation_checkpointing": True},
     {"optim": "adamw_torch_fused"}],
    ids=["autocast", "tf32", "traced", "compiled", "activation checkpointing", "fused"],
)  # fmt: skip
@pytest.mark.parametrize("adapters", [False, True], ids=["full weights", "adapters"])
def test_options_of_the_trainer_keep_the_promise(options: dict[str, Any], adapters: bool, tmp_path: Path) -> None:
    torch._dynamo.reset()
    model, data = make_vit(labels=10), exact_rows(list("abcdefghij"))
    look = reader("vit")
    before, before_forget = look(model, data[1]), logits(model, data[0])
    network = _network(_unlearn(model, data, tmp_path, adapters, max_steps=12, **options))
    assert relative(look(network, data[1]), before) <= 1e-6
    assert relative(logits(network, data[0]), before_forget) > 0.003


def test_single_rows_and_a_resumed_run(separable_data: Draw, tmp_path: Path) -> None:
    train = separable_data(30)
    model, unseen = learned(train), with_odd_labels(separable_data(30), 60)
    data, found = split_dataset(train, indices=range(0, 92, 4)), []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        trainer = make_trainer(
            copy.deepcopy(model), (data.forget, data.retain), tmp_path, use_cpu=False, energy=0.9, max_steps=6,
            learning_rate=1e-4, save_strategy="steps", save_steps=4, max_leak=0.5, objective="unsc_retain",
            check_steps=3, unseen_dataset=unseen, target_forget_accuracy=0.01,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        found.append({name: p.detach().cpu() for name, p in trainer.model.named_parameters()})
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-4, atol=1e-6)


def test_sharded_and_replicated_weights(tmp_path: Path) -> None:
    """FSDP2 and DDP as a launcher starts them, with one process on the device, end where a CPU does."""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "1", "--standalone")
    run_process(*launcher, two_processes.__file__, "gpu", tmp_path)
    for case, given in two_processes.CASES.items():
        two_processes.unlearn(case, tmp_path / "alone" / case)
        alone = json.loads((tmp_path / "alone" / case / "found-0.json").read_text())
        for kind in given.kinds:
            found = json.loads((tmp_path / kind / case / "found-0.json").read_text())
            assert ("FSDP" in found["class"]) == (kind == "sharded")
            for name in ("leak", "drift", "change"):
                assert found[name] == pytest.approx(alone[name], rel=1e-3), (kind, case, name)
            file = "adapter_model.safetensors" if case == "adapters" else "model.safetensors"
            ours, theirs = (load_file(tmp_path / k / case / "model" / file) for k in ("alone", kind))
            assert ours.keys() == theirs.keys()
            if case != "adapters":  # directions of A are only known up to their sign
                for name, weight in ours.items():
                    assert (theirs[name] - weight).norm() <= 1e-4 * weight.norm().clamp_min(1e-3), (kind, case, name)


def test_the_recipe(tmp_path: Path) -> None:
    """Trains an original and a reference, unlearns beside its controls, certifies and writes: all on the device."""
    words = ["--dataset_name", parquet_folder(tmp_path / "data"), "--references_dir", tmp_path / "references",
             "--forget_classes", "frog",
             "--train_original", "--train_retrained", "--output_dir", tmp_path / "out", *FAST[1:]]  # fmt: skip
    assert run_process(RECIPE, *words, cwd=tmp_path).count("Verdict:") == 1
    methods = json.loads((tmp_path / "out" / "results.json").read_text())["methods"]
    assert methods["original"]["AccDrt"] > 0.5
    assert {"unsc", "masked", "random_projector", "retrained"} <= methods.keys()
