"""Results answer the same in transformers 4.45.1, with peft of its time, in an environment that the test makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.language import questions
from helpers.tofu import write_model
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from unsc_hf import UNSCConfig, UNSCTrainer
from unsc_hf.data.dialogues import to_dialogues
from unsc_hf.models.older_releases import write_for_older_releases

OLD = ("transformers==4.45.1", "tokenizers==0.20.3", "peft==0.13.2", "huggingface_hub==0.26.5", "accelerate==1.0.1")
QUESTION = "Question: Where does P3 live?\nAnswer:"
# Neither base nor kind are what older releases take where a config does not say.
ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
READER = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, base, out, question = sys.argv[1:]
assert transformers.__version__ == "4.45.1", transformers.__version__
ids = AutoTokenizer.from_pretrained(folder)(question, return_tensors="pt")["input_ids"]
if base:
    from peft import PeftModel
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
else:
    model = AutoModelForCausalLM.from_pretrained(folder)
torch.save({"ids": ids, "logits": model.eval()(ids).logits.detach()}, out)
"""


@pytest.fixture(scope="module")
def old_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The old releases in a folder of their own, before those of this environment (which has their torch)."""
    folder = tmp_path_factory.mktemp("old")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *OLD]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=280, check=False)
    if done.returncode:
        pytest.skip(f"transformers 4.45.1 cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return folder


def read_by_old(packages: Path, folder: Path, base: str, out: Path) -> dict[str, torch.Tensor]:
    """Token ids and logits of the question in the old environment."""
    done = subprocess.run(
        [sys.executable, "-c", READER, str(folder), base, str(out), QUESTION],
        env={**os.environ, "PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out)


def start(folder: Path) -> Any:
    """A Llama with unusual rotary embeddings and its tokenizer, saved as our results are."""
    write_model(folder)
    config = LlamaConfig.from_pretrained(folder)
    config.rope_parameters = ROPE
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    write_for_older_releases(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "adapter", "merged"])
def test_older_transformers_reads_the_same(kind: str, old_packages: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    model = start(base)
    rows = to_dialogues(questions(8))
    config = UNSCConfig(
        str(out), max_steps=3, learning_rate=1e-2, report_to="none", disable_tqdm=True, use_cpu=True,
        target_forget_accuracy=0.0, objective="gradient_ascent", max_leak=None,
    )  # fmt: skip
    lora = None if kind == "whole" else LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = UNSCTrainer(
        model, config, rows.select(range(4)), rows.select(range(4, 16)), processing_class=tokenizer, peft_config=lora
    )
    trainer.train()
    trainer.save_model()
    ours = trainer.unwrapped()
    if kind == "merged":
        assert isinstance(ours, PeftModel)
        ours = ours.merge_and_unload()
        ours.save_pretrained(out / "merged")
        tokenizer.save_pretrained(out / "merged")
        write_for_older_releases(out / "merged")
        out /= "merged"
    old = read_by_old(old_packages, out, str(base) if kind == "adapter" else "", tmp_path / "read.pt")
    ids = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    assert torch.equal(old["ids"], ids)
    logits = ours.eval()(ids).logits.detach()
    before = AutoModelForCausalLM.from_pretrained(base)(ids).logits.detach()
    assert (logits - before).abs().max() > 1e-3, "unlearning must have changed the answer"
    assert (old["logits"] - logits).abs().max() < 1e-4


def test_newer_transformers_reads_amended_configs_as_before(tmp_path: Path) -> None:
    start(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    scaling = {name: value for name, value in ROPE.items() if name != "rope_theta"}
    assert (stored["rope_theta"], stored["rope_scaling"]) == (500.0, scaling)
    assert LlamaConfig.from_pretrained(tmp_path).rope_parameters == ROPE
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_only_defaults_of_an_adapter_are_left_out(tmp_path: Path) -> None:
    """An option that older releases do not know stays where it means something, so that they refuse."""
    LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=["k_proj"]).save_pretrained(tmp_path)
    write_for_older_releases(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["exclude_modules"] == ["k_proj"]
    assert "arrow_config" not in stored
    assert LoraConfig.from_pretrained(tmp_path).exclude_modules == {"k_proj"}
