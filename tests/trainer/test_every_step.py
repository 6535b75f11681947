"""What holds at every step and epoch of a run, not at its end alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers.language import make_lm
from helpers.models import make_vit
from helpers.training import Data, Stop, make_trainer
from peft import LoraConfig

from unsc_hf.tasks.causal_lm import SOFT_TOKENS
from unsc_hf.trainer.rows import RelabelledDataset


@pytest.mark.parametrize("adapters", [False, True])
def test_every_leak_in_the_log_is_rounding(adapters: bool, exact_data: Data, tmp_path: Path) -> None:
    """The displacement is projected at every step, not only after the last."""
    trainer = make_trainer(
        make_vit(labels=10), exact_data, tmp_path, check_steps=1, weight_decay=0.1, learning_rate=2e-4,
        peft_config=LoraConfig(r=4) if adapters else None,
    )  # fmt: skip
    trainer.prepare_unlearning()
    trainer.goal.target = -1.0  # never reached, so that all steps are taken
    trainer.train()
    leaks = [entry["leak"] for entry in trainer.state.log_history if "leak" in entry]
    assert len(leaks) == 7
    assert max(leaks) <= 1e-6
    assert trainer.certify().relative_change > 1e-4


def test_the_temperature_of_a_language_models_targets(token_data: Data, tmp_path: Path) -> None:
    """Half the temperature doubles the odds' logarithms."""
    model, shares = make_lm(), {}
    for temperature in (1.0, 0.5):
        trainer = make_trainer(model, token_data, tmp_path, pseudo_labels="soft", pseudo_label_temperature=temperature)
        targets = torch.cat([row["pseudo_labels"] for row in trainer.prepare_unlearning().targets])
        shares[temperature] = targets[:, SOFT_TOKENS : SOFT_TOKENS + 5].double()
    odds = {temperature: (top[:, :1] / top[:, 1:]).log() for temperature, top in shares.items()}
    assert float(odds[1.0].max()) > 0.1
    torch.testing.assert_close(odds[0.5], 2 * odds[1.0], rtol=1e-3, atol=1e-4)


def test_the_data_are_told_every_epoch(low_rank_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    begin = RelabelledDataset.begin_epoch

    def noted(self: RelabelledDataset, epoch: int) -> None:
        begun.append(epoch)
        begin(self, epoch)

    monkeypatch.setattr(RelabelledDataset, "begin_epoch", noted)
    model = make_vit()
    with torch.no_grad():
        model.classifier.bias[2] = 20.0  # far from forgotten
    options = {"save_strategy": "steps", "save_steps": 3, "check_steps": 100, "objective": "unsc_retain"}
    start = copy.deepcopy(model)
    make_trainer(model, low_rank_data, tmp_path, learning_rate=1e-4, callbacks=[Stop(3)], **options).train()
    assert begun == [0, 0, 1]  # made, and two steps an epoch
    begun.clear()
    resumed = make_trainer(start, low_rank_data, tmp_path, learning_rate=1e-4, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert begun == [0, 1, 2]
