"""Runs that must refuse or warn, from the command line and from Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from helpers.language import questions
from helpers.recipes import results_of
from helpers.tofu import write_tofu
from helpers.worlds import FAST, World, again, answers, images, sentences
from safetensors.torch import load_file, save_file

from unsc_hf import UNSCConfig, UNSCError, audit, compare, unlearn
from unsc_hf.cli.main import main
from unsc_hf.utils.reserve import HOLDER, reserved


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    made = {"image": images, "text": sentences, "lm": answers}
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in made.items()}


def options(**changes: Any) -> UNSCConfig:
    settings: dict[str, Any] = {"use_cpu": True, "disable_tqdm": True, "max_steps": 4, "report_to": "none"}
    return UNSCConfig(**{**settings, **changes})


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def overlapping(world: World) -> tuple[dict[str, Dataset], str]:
    """Data in which one or two rows are on both sides, with other labels or ids, and what is said of them."""
    if world.kind == "image":  # an owl that is also called a cat
        train = again(world.data["train"], [3], label=0)
        return {**world.data, "train": train}, "1 of 61 rows to keep are also among the 20 rows to forget"
    if world.kind == "text":  # of the two rows to forget
        count = len(world.data["train"])
        train = again(world.data["train"], [0, 5, 5], user=77)
        return {**world.data, "train": train}, f"3 of {count + 1} rows to keep are also among the 2 rows to forget"
    retain = again(world.data["retain"], [])
    rows = Dataset.from_list([*retain, {**world.data["forget"][0], "person": 99}], features=retain.features)
    return {**world.data, "retain": rows}, "1 of 15 rows to keep are also among the 6 rows to forget"


@pytest.mark.parametrize("kind", ["image", "text", "lm"])
def test_rows_on_both_sides_are_refused_or_dropped(
    kind: str, worlds: dict[str, World], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    world = worlds[kind]
    data, message = overlapping(world)
    assert world.unlearn(data, tmp_path) == 2
    line = said(capsys)
    assert message in line
    assert "--drop_overlap" in line
    assert not (tmp_path / "out").exists()
    wanted: dict[str, Any] = {"image": {"forget_classes": "owl"}, "text": {"indices": [0, 5]}, "lm": {}}[kind]
    with pytest.raises(UNSCError, match=message):
        unlearn(world.model, DatasetDict(data), **wanted, config=options(target_forget_accuracy=0.0))

    assert world.unlearn(data, tmp_path, "--drop_overlap", "--max_leak", "None") == 0
    assert message in caplog.text
    assert results_of(tmp_path / "out")["hyperparameters"]["drop_overlap"] is True


def test_one_split_cannot_be_both_sides(
    worlds: dict[str, World], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"train": questions(8)}
    same = ("--forget_split", "train", "--retain_split", "train")
    assert worlds["lm"].unlearn(rows, tmp_path / "a", *same) == 2
    assert "retain_split: 'train' is the forget_split too" in said(capsys)
    assert worlds["lm"].unlearn(rows, tmp_path / "b", *same, "--forget_indices", 0, 1, "--max_leak", "None") == 0
    assert results_of(tmp_path / "b" / "out")["request"]["rows"] == 2
    assert worlds["image"].unlearn(worlds["image"].data, tmp_path / "c", "--test_split", "train") == 2
    assert "test_split: 'train' is the train_split too" in said(capsys)
    twice = DatasetDict(forget=questions(4), retain=questions(4))
    with pytest.raises(UNSCError, match="8 of 8 rows to keep are also among the 8 rows to forget, so there is nothing"):
        unlearn(worlds["lm"].model, twice, config=options(target_forget_accuracy=0.0, drop_overlap=True))


def test_one_configuration_cannot_be_both_sides(
    worlds: dict[str, World], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, world = write_tofu(tmp_path / "tofu", with_perturbed=False), worlds["lm"]
    same = ("--forget_config", "forget10", "--retain_config", "forget10", "--target_forget_accuracy", "0")
    words = ["unlearn", "lm", "--model_name_or_path", world.model, "--dataset_name", folder, *same, *FAST]
    assert main([str(word) for word in (*words, "--output_dir", tmp_path / "out", "--drop_overlap")]) == 2
    assert "6 of 6 rows to keep are also among the 6 rows to forget, so there is nothing to keep" in said(capsys)
    assert not (tmp_path / "out").exists()


def test_copies_of_training_rows_do_not_count_as_held_out(worlds: dict[str, World], tmp_path: Path) -> None:
    world = worlds["image"]
    data = {**world.data, "train": again(world.data["train"], range(40))}
    assert world.unlearn(data, tmp_path, "--max_leak", "None") == 0
    results, card = results_of(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert any("held-out rows to keep are copies" in caveat for caveat in results["caveats"])
    kept = next(caveat for caveat in results["caveats"] if "rows of the certificate are copies" in caveat)
    forgotten = next(caveat for caveat in results["caveats"] if "held-out rows to forget are copies" in caveat)
    copied, count = (int(word) for word in kept.split() if word.isdigit())
    assert 0 < copied < count
    assert results["certificate"]["rows"] == count - copied
    assert results["certificate"]["held_out"]
    for file in (card, (tmp_path / "out" / "report.html").read_text()):
        assert kept in file
        assert forgotten in file


def test_where_all_held_out_rows_are_copies_none_is_claimed(worlds: dict[str, World]) -> None:
    world = worlds["image"]
    data = DatasetDict({**world.data, "train": again(world.data["train"], [*range(80)] * 9)})
    result = unlearn(world.model, data, forget_classes="owl", controls=False, config=options(max_leak=None))
    assert len([caveat for caveat in result.trainer.caveats() if "no other was held out" in caveat]) == 3
    assert not result.certificate["held_out"]
    assert result.certificate["rows"] > 0


def test_rows_to_keep_that_do_not_differ_are_refused(
    worlds: dict[str, World], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One picture under three labels; pictures that hardly differ are tested with the trainer."""
    world = worlds["image"]
    rows = list(world.data["train"])
    same = [row if row["label"] == 3 else {**row, "image": rows[0]["image"]} for row in rows]
    features = world.data["train"].features
    data = {**world.data, "train": Dataset.from_list(same, features=features)}
    message = "outputs on 32 of its rows differ by 0 of their size"
    assert world.unlearn(data, tmp_path) == 2
    assert message in said(capsys)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UNSCError, match=f"retain_dataset: the model's {message}"):
        unlearn(world.model, DatasetDict(data), forget_classes="owl", config=options())


@pytest.mark.parametrize("place", ["classifier.weight", "classifier.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.7e37])
def test_damaged_weights_of_the_head_are_named(
    place: str, value: float, worlds: dict[str, World], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = worlds["image"]
    damaged = World(world.kind, tmp_path / "model", world.data, world.request)
    damaged.model.mkdir()
    for file in world.model.iterdir():
        (damaged.model / file.name).write_bytes(file.read_bytes())
    tensors = load_file(world.model / "model.safetensors")
    tensors[place].view(-1)[1] = value
    save_file(tensors, damaged.model / "model.safetensors", {"format": "pt"})
    message = f"model: {place} holds the value {value:.3g}"
    assert damaged.unlearn(world.data, tmp_path) == 2
    line = said(capsys)
    assert message in line
    assert "weights are damaged: fetch them again" in line
    assert not (tmp_path / "out").exists()
    with pytest.raises(UNSCError, match=message.replace("+", r"\+")):
        unlearn(damaged.model, DatasetDict(world.data), forget_classes="owl", config=options())


def test_a_class_that_was_never_recognised_is_nothing_to_forget(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = images(tmp_path / "model", relabel=lambda label: 0 if label == 3 else label)
    assert world.unlearn(world.data, tmp_path, "--max_leak", "None") == 0
    sentence = "Before the first step the forget accuracy was 0 already, and the target is 0.002: there was nothing to"
    assert sentence in caplog.text
    assert any(caveat.startswith(sentence) for caveat in results_of(tmp_path / "out")["caveats"])
    assert sentence in (tmp_path / "out" / "README.md").read_text()
    assert main(["report", str(tmp_path / "out")]) == 0
    assert sentence in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("place", ["below a file", "a file", "nowhere"])
@pytest.mark.parametrize("command", ["unlearn", "compare", "ablate"])
def test_folders_that_cannot_be_written_are_one_line(
    command: str, place: str, worlds: dict[str, World], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    folder = {"below a file": tmp_path / "file" / "out", "a file": tmp_path / "file", "nowhere": Path("/proc/unsc/out")}
    if command == "unlearn":
        code = worlds["image"].unlearn(worlds["image"].data, tmp_path, "--output_dir", folder[place])
    else:
        code = main([command, "image", "--output_dir", str(folder[place]), "--use_cpu"])
    assert code == 2
    assert "output_dir: " in said(capsys)
    world, given = worlds["image"], {"output_dir": folder[place], "config": options()}
    python: Any = unlearn if command == "unlearn" else compare
    with pytest.raises(UNSCError, match=r"^output_dir: "):
        python(str(world.model), DatasetDict(world.data), forget_classes=["owl"], **given)


def test_read_only_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UNSCError, match=f"out cannot be written, {tmp_path} is read-only"), reserved(tmp_path / "out"):
        pass


def test_a_folder_belongs_to_one_run_at_a_time(
    worlds: dict[str, World], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world, out = worlds["image"], tmp_path / "out"
    with reserved(out):
        (out / "kept.txt").write_text("of the first run")
        assert world.unlearn(world.data, tmp_path) == 2
        assert f"another run writes into {out} (process {os.getpid()} on " in said(capsys)
        given: dict[str, Any] = {"forget_classes": "owl", "output_dir": out, "config": options()}
        with pytest.raises(UNSCError, match=f"process {os.getpid()} on "):
            unlearn(world.model, DatasetDict(world.data), **given)
        assert main(["compare", "image", "--methods", "masked", "--output_dir", str(out), "--use_cpu"]) == 2
    assert (out / "kept.txt").is_file()
    assert not (out / HOLDER).exists()
    with reserved(out):  # free again
        pass
    with reserved(tmp_path / "new" / "folder"):
        pass
    assert not (tmp_path / "new").exists()  # nothing was written into it


def test_the_lock_of_a_killed_run_is_released(tmp_path: Path) -> None:
    hold = f"with reserved({str(tmp_path)!r}):\n    print('held', flush=True); input()"
    code = f"from unsc_hf.utils.reserve import reserved\n{hold}"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UNSCError, match=f"process {other.pid} on "), reserved(tmp_path):
            pass
        other.send_signal(signal.SIGKILL)
    with reserved(tmp_path):
        pass


@pytest.mark.parametrize(
    ("command", "words", "argument"),
    [
        ("audit", ["--audited", "NOT_THERE"], "audited"),
        ("audit", ["--audited", "MODEL", "--originals", "NOT_THERE"], "originals"),
        (
            "audit",
            ["--audited", "MODEL", "--retrained_model_name_or_path", "NOT_THERE"],
            "retrained_model_name_or_path",
        ),
        ("compare", ["--originals", "NOT_THERE"], "originals"),
        ("compare", ["--model_name_or_path", "NOT_THERE"], "model_name_or_path"),
    ],
)
def test_models_that_are_not_there_are_found_before_any_is_trained(
    command: str, words: list[str], argument: str, worlds: dict[str, World], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    given = [str(worlds["image"].model) if word == "MODEL" else word for word in words]
    assert main([command, "image", *given, "--output_dir", "out", "--use_cpu"]) == 2
    assert f"error: {argument}: cannot load 'NOT_THERE'" in said(capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_audit_from_python_finds_missing_models_first(worlds: dict[str, World], tmp_path: Path) -> None:
    data, model = DatasetDict(worlds["image"].data), str(worlds["image"].model)
    with pytest.raises(UNSCError, match="^audited: cannot load 'NOT_THERE'"):
        audit("NOT_THERE", model, data, ["owl"], output_dir=tmp_path / "out")
    with pytest.raises(UNSCError, match="^retrained_model_name_or_path: cannot load 'NOT_THERE'"):
        audit(model, model, data, ["owl"], retrained=["NOT_THERE"], output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_retrained_model_that_is_not_there_is_found_before_the_original_is_trained(
    worlds: dict[str, World], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ("--train_original", "--model_size", "nano", "--references_dir", tmp_path / "references")
    missing = ("--retrained_model_name_or_path", "NOT_THERE")
    assert worlds["image"].unlearn(worlds["image"].data, tmp_path, *train, *missing) == 2
    assert "retrained_model_name_or_path: cannot load 'NOT_THERE'" in said(capsys)
    assert not (tmp_path / "references").exists()
