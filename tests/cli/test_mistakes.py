"""The likeliest mistakes: each one line, exit code 2, no traceback, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.recipes import parquet_folder

from unsc_hf.cli.main import main

MODEL = "--model_name_or_path user/vit"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, an interrupted run, a file, and options with a typo."""
    root = tmp_path_factory.mktemp("place")
    parquet_folder(root / "data", 8, 8)
    (root / "half").mkdir()
    (root / "half" / ".unfinished").touch()
    (root / "done").mkdir()
    (root / "done" / "results.json").write_text("{}")
    (root / "file").touch()
    (root / "bad.yaml").write_text("forget_clases: [cat]\n")
    return root


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("unlern", "unsc: 'unlern' is no command; closest: 'unlearn'"),
        ("unlearn", "unsc: expected image or text or lm after unlearn, got nothing"),
        ("unlearn picture", "unsc: expected image or text or lm after unlearn, got 'picture'"),
        ("compare lm", "unsc: expected image or text after compare, got 'lm'"),
        ("completion fish", "unsc: expected bash or zsh after completion, got 'fish'"),
        ("unlearn image --forget_clases 8", "--forget_clases: there is no such option; closest: '--forget_classes'"),
        ("unlearn image --max-leek=3", "--max-leek: there is no such option; closest: '--max_leak'"),
        ("compare image --method unsc", "--method: there is no such option; closest: '--methods'"),
        ("unlearn image 8", "unsc: '8' was not expected; options begin with --"),
        ("unlearn image --max_leak lots", "max_leak: got 'lots', expected a number"),
        ("unlearn image --max_steps 1.5", "max_steps: got '1.5', expected a whole number"),
        ("unlearn image --use_cpu maybe", "use_cpu: Truthy value expected: got maybe but"),
        ("unlearn image --output_dir", "output_dir: no value given"),
        ("unlearn image --objective unsk", "objective: got 'unsk'; closest: 'unsc'"),
        ("unlearn image --eval_strategy epochs", "eval_strategy: got 'epochs'; closest: 'epoch'"),
        ("unlearn image --lr_scheduler_type cosin", "options: cosin is not a valid SchedulerType"),
        ("unlearn image --energy 1.5", "energy: 1.5 is outside (0, 1]"),
        ("unlearn image --config nowhere.yaml", "config: cannot read nowhere.yaml"),
        ("unlearn image --config bad.yaml", "config: bad.yaml sets 'forget_clases', which is no option; closest: "),
        (f"unlearn image {MODEL}", "dataset_name: not given"),
        (f"unlearn image {MODEL} --dataset_name nowhere", "dataset_name: cannot load 'nowhere'"),
        (f"unlearn image {MODEL} --dataset_name data", "model_name_or_path: cannot load 'user/vit'"),
        ("unlearn image --dataset_name data --forget_classes lion", "forget_classes: no class 'lion'"),
        ("unlearn image --dataset_name data --forget_classes cat", "model_name_or_path: not given"),
        ("unlearn image --output_dir done", "output_dir: done holds a finished run"),
        ("unlearn image --output_dir file/out", "output_dir: file/out cannot be made"),
        ("unlearn text", "dataset_name: not given"),
        ("unlearn lm", "dataset_name: not given"),
        ("audit image", "audited: not given"),
        ("compare image --methods unsk", "methods: 'unsk' does not exist; closest: 'unsc'"),
        ("ablate image --studies ranks", "studies: 'ranks' does not exist; closest: 'rank'"),
        ("evaluate lm", "model_name_or_path: not given"),
        ("report", "unsc report: the following arguments are required: folder"),
        ("report nowhere", "folder: nowhere holds no results.json"),
        ("report half", "folder: half holds an interrupted run; start that run again"),
        ("report done", "folder: done/results.json is not what a run writes"),
        ("push done", "unsc push: the following arguments are required: --hub_model_id"),
        ("push nowhere --hub_model_id user/x", "folder: nowhere does not exist"),
        ("push half --hub_model_id user/x", "folder: half holds an interrupted run"),
    ],
)
def test_a_mistake_is_one_line(
    typed: str, said: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    words = typed.split()
    assert main(words) == 2
    seen = capsys.readouterr()
    assert seen.err.startswith(f"error: {said}"), seen.err
    assert seen.err.count("\n") == 1
    assert "Traceback" not in seen.out
    assert main([*words, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"].startswith(said)
    assert sorted(place.rglob("*")) == before
