"""The page on the layout of the code: its picture, its table, and the four complete files that it shows."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset
from helpers.models import fit
from helpers.training import Known, make_trainer, quiet_config, unlearned
from transformers import DefaultDataCollator, PreTrainedConfig, PreTrainedModel

from unsc_hf import split_dataset
from unsc_hf.comparison.methods import METHODS, Workbench
from unsc_hf.comparison.plugins import load_plugins
from unsc_hf.evaluation.audits import AUDITS, Examination
from unsc_hf.models.outputs import Outputs, RowOutputs, collect_outputs
from unsc_hf.objectives import OBJECTIVES, Terms
from unsc_hf.tasks import TASKS, make_task
from unsc_hf.utils.fingerprint import weight_hash

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CONTRACT = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("\nlayers = [")[1].split("]")[0]
LAYERS = re.findall(r'"(\w+)"', CONTRACT)


@pytest.fixture(autouse=True)
def registers() -> Iterator[None]:
    """Whatever a test registers is unknown again afterwards."""
    tables: list[dict[str, Any]] = [OBJECTIVES, AUDITS, METHODS]
    known, tasks = [dict(table) for table in tables], list(TASKS)
    yield
    for table, before in zip(tables, known, strict=True):
        table.clear()
        table.update(before)
    TASKS[:] = tasks


def page_file(heading: str, folder: Path) -> ModuleType:
    """The file that the page shows under a heading, imported as a user's own."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.split(f"### {heading}\n")[1].split("\n### ")[0], flags=re.DOTALL)
    assert len(blocks) == 1
    file = folder / f"{heading.lower().replace(' ', '_')}.py"
    file.write_text(blocks[0], encoding="utf-8")
    load_plugins([str(file)])
    return sys.modules[f"unsc_hf_plugin_{file.stem}"]


def test_the_page_and_its_picture_name_every_layer_in_order() -> None:
    assert len(LAYERS) > 10
    assert re.findall(r"^\*\*`(\w+)`\*\*", PAGE, flags=re.MULTILINE) == LAYERS
    picture = (ROOT / "docs" / "layers.svg").read_text(encoding="utf-8")
    assert re.findall(r'font-weight="bold"[^>]*>(\w+)<', picture) == LAYERS


def test_the_table_points_at_code_that_exists() -> None:
    entries = re.findall(r"\]\(\.\./(unsc_hf/[\w/]+)\.py\) \| `(\w+)` \|", PAGE)
    assert len(entries) >= 10
    for path, name in entries:
        assert hasattr(importlib.import_module(path.replace("/", ".")), name), (path, name)


def test_the_objective_of_the_page(known: Known, tmp_path: Path) -> None:
    """Its loss is UNSC's minus the weighted entropy, and the trainer runs it with the weight that was given."""
    page_file("An objective", tmp_path)
    logits, labels = torch.randn(7, 5), torch.arange(7) % 5
    terms = Terms(logits, labels, (labels + 1) % 5, torch.arange(7), torch.zeros(7))
    unsure = OBJECTIVES["unsc_unsure"].run(terms, entropy_weight=3.0)
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    torch.testing.assert_close(unsure, OBJECTIVES["unsc"].run(terms) - 3 * entropy)

    def trained(name: str, **options: Any) -> str:
        options |= {"energy": 0.9, "max_steps": 3, "check_steps": 100}
        return weight_hash(unlearned(deepcopy(known.model), known.data, tmp_path / name, **options).model)

    plain = trained("plain")
    assert trained("none", objective="unsc_unsure", objective_args={"entropy_weight": 0.0}) == plain
    assert trained("some", objective="unsc_unsure", objective_args={"entropy_weight": 3.0}) != plain


def test_the_audit_of_the_page(known: Known, tmp_path: Path) -> None:
    """All of a known class is among two answers of three, and none of it where its logit is lowest."""
    page_file("An audit", tmp_path)
    model, rows, (forget, retain) = known

    def collect(network: PreTrainedModel, part: Dataset) -> Outputs:
        return collect_outputs(network, part, DefaultDataCollator(), features=True)

    def first_two(bias: float) -> float:
        network = deepcopy(model)
        with torch.no_grad():
            network.classifier.bias[2] += bias
        outputs = RowOutputs(collect(network, forget), collect(network, retain), collect(network, rows))
        nothing: Any = None
        exam = Examination(network, outputs, outputs, [], [2], forget, retain, rows, collect, nothing)
        return AUDITS["second_guess"].run(exam)["first_two"]  # type: ignore[return-value]

    assert AUDITS["second_guess"].headline == "first_two"
    assert (first_two(0.0), first_two(-100.0)) == (1.0, 0.0)


def test_the_method_of_the_page(known: Known, tmp_path: Path) -> None:
    """It changes a copy, in the trained weights alone, and more at a larger scale."""
    page_file("A method", tmp_path)
    model, config = known.model, quiet_config(tmp_path, energy=0.9)
    bench, before = Workbench(model, *known.data, config, None), weight_hash(model)
    method, leaks = METHODS["weight_noise"], []
    for settings in method.settings:
        noisy = bench.run(method.run, dict(settings))
        trained = {layer.weight_name for layer in bench.layers(noisy)}
        changed = {name for name, weight in noisy.state_dict().items() if not weight.equal(model.state_dict()[name])}
        assert changed == trained
        leaks.append(bench.leak(noisy))
    assert weight_hash(bench.original) == before
    assert leaks == sorted(leaks)
    assert leaks[0] < 0.1 < leaks[-1]


def test_the_task_of_the_page(tmp_path: Path) -> None:
    """Its model is unlearned: one class of a table goes, and the others stay."""
    page = page_file("A task", tmp_path)
    labels = torch.arange(3).repeat_interleave(40)
    values = 3 * torch.eye(4)[labels] + 0.3 * torch.randn(120, 4)
    columns = {name: values[:, i].tolist() for i, name in enumerate(page.COLUMNS)}
    table = Dataset.from_dict({**columns, "kind": labels.tolist()}).cast_column("kind", ClassLabel(names=list("abc")))
    network = page.TableClassifier(PreTrainedConfig(num_labels=3, id2label=dict(enumerate("abc"))))
    fit(network, {"measurements": values, "labels": labels}, steps=150)
    data = split_dataset(table, forget_classes=["c"])
    assert type(make_task(network, quiet_config(tmp_path), *data, None)) is page.TableTask
    trainer = make_trainer(
        network, data, tmp_path / "out", eval_dataset={"forget": data[0], "retain": data[1]}, energy=0.9, max_steps=200,
        learning_rate=1e-2, check_steps=10,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_forget_accuracy"] > 0.95
    assert after["eval_forget_accuracy"] <= 0.1
    assert after["eval_retain_accuracy"] > 0.9
