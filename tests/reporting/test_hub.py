"""Publishing to a Hub on this machine: one commit, nothing private, bit-equal models for whoever loads them, and
nothing lost in a fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hub_server import READ_ONLY, TOKEN, Fault, Hub
from helpers.models import make_vit
from helpers.results import finished_run
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, ViTImageProcessorPil

from unsc_hf import UNSCError
from unsc_hf.reporting.hub import public_files
from unsc_hf.reporting.model_card import write_card

Call = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Hub, str]]:
    hub = Hub()
    with hub.serve() as endpoint:
        yield hub, endpoint


@pytest.fixture
def hub(server: tuple[Hub, str]) -> Hub:
    hub, _ = server
    hub.fault = None
    for state in (hub.repos, hub.storage, hub.requests, hub.before):
        state.clear()
    return hub


@pytest.fixture(scope="module")
def call(server: tuple[Hub, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Call]:
    """Calls in a fresh process whose client knows only this Hub and has an empty cache."""
    environment = {
        **os.environ, "HF_ENDPOINT": server[1], "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost", "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    }  # fmt: skip
    environment.pop("HF_TOKEN", None)
    worker = subprocess.Popen(
        [sys.executable, str(Path(__file__).parents[1] / "helpers" / "hub_worker.py")], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    asked, answers = worker.stdin, worker.stdout
    assert json.loads(answers.readline())["ready"]

    def ask(function: str, **options: Any) -> dict[str, Any]:
        asked.write(json.dumps({"call": function, **options}) + "\n")
        asked.flush()
        answer: dict[str, Any] = json.loads(next(line for line in answers if line.startswith("\x1e"))[1:])
        assert "crash" not in answer, answer
        return answer

    yield ask
    asked.close()
    worker.wait(20)


@pytest.fixture
def publish(call: Call) -> Call:
    def ask(folder: Path, repo_id: str = "user/vit", **options: Any) -> dict[str, Any]:
        return call("publish", folder=str(folder), repo_id=repo_id, **{"token": TOKEN, **options})

    return ask


def write_run_files(folder: Path, **content: Any) -> None:
    """The files of a run beside its model."""
    content = {"model_name": "user/vit", **content}
    write_card(finished_run(pictures=[("unlearning.png", "The course")], **content), folder)
    (folder / "results.json").write_text(json.dumps({"verdict": "suppressed"}))
    (folder / "report.html").write_text("<!doctype html><p>report</p>")
    (folder / "unlearning.png").write_bytes(b"\x89PNG")


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    make_vit().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    write_run_files(folder)
    return folder


def _files(hub: Hub, name: str, revision: str = "main") -> dict[str, bytes]:
    return {path: content for path, content in hub.repos[name].files(revision).items() if path != ".gitattributes"}


def _local(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---- round trips ----------------------------------------------------------------------------------------------------
def test_a_published_model_is_one_commit_and_loads_equal(hub: Hub, publish: Call, call: Call, finished: Path) -> None:
    answer = publish(finished)
    repo = hub.repos["user/vit"]
    assert answer == {"commit": repo.branches["main"]}
    assert len(repo.commits) == 2  # the empty repository, and this
    assert _files(hub, "user/vit") == _local(finished)
    rows = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        own = type(make_vit()).from_pretrained(finished).eval()(pixel_values=rows).logits
    assert call("load", name="user/vit", task="image", rows=rows.tolist())["logits"] == own.double().tolist()
    assert ModelCard(_files(hub, "user/vit")["README.md"].decode()).data.base_model == "user/vit"
    assert all(token != TOKEN for stage, token in hub.requests if stage == "storage")


def test_the_card_loads_the_model_from_where_it_is(hub: Hub, publish: Call, finished: Path) -> None:
    """A card is written beside the model, before anybody knows the repository's name."""
    for adapter, lines in ((None, 2), ({"r": 4, "alpha": 4}, 2)):
        write_run_files(finished, model_name="run", adapter=adapter)
        publish(finished, "user/vit-without-shirt")
        card = _files(hub, "user/vit-without-shirt")["README.md"].decode()
        example = card.split("```python")[1].split("```")[0]
        assert example.count('"user/vit-without-shirt")') == lines
        assert '"run"' not in card
        assert ('from_pretrained("user/vit")' in example) == (adapter is not None)
        assert card.count("user/vit-without-shirt") == lines  # nothing else has changed


def test_a_published_adapter_loads_on_its_base(hub: Hub, publish: Call, call: Call, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = make_vit()
    model.save_pretrained(base)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(base)
    write_run_files(base)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(adapter)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(adapter)
    write_run_files(adapter, adapter=True)
    publish(base, "user/base")
    refused = publish(adapter, "user/adapter")
    assert "names its base model by a local folder" in refused["error"]
    assert "user/adapter" not in hub.repos
    assert "commit" in publish(adapter, "user/adapter", base_model="user/base")
    assert "model.safetensors" not in _files(hub, "user/adapter")
    rows = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        own = tuned.eval()(pixel_values=rows).logits
    answer = call("load", name="user/adapter", task="image", rows=rows.tolist(), adapter_of="user/base")
    assert answer["logits"] == own.double().tolist()


def test_a_published_text_model_answers_in_a_pipeline(hub: Hub, publish: Call, call: Call, tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "pay", "my", "bill", "hello"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    folder = tmp_path / "run"
    tokenizer = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(words), num_labels=3, **size)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_run_files(folder, task="text-classification")
    assert "commit" in publish(folder, "user/bert")
    rows = ["pay my bill", "hello"]
    with torch.no_grad():
        own = model(**tokenizer(rows, return_tensors="pt", padding=True)).logits
    assert call("load", name="user/bert", task="text", rows=rows)["logits"] == own.double().tolist()
    assert call("pipeline", name="user/bert", text="hello")["answer"]["label"] == f"LABEL_{int(own[1].argmax())}"


# ---- what stays at home ---------------------------------------------------------------------------------------------
def test_only_public_files_leave(hub: Hub, publish: Call, finished: Path) -> None:
    expected = _local(finished)
    for name in ("training_args.bin", "optimizer.pt", "forget_indices.txt", "train.parquet", "notes.md", ".env"):
        (finished / name).write_text("private")
    for name in ("checkpoint-5/model.safetensors", "statistics/statistics.safetensors", "_unsc/moments.safetensors"):
        (finished / name).parent.mkdir()
        (finished / name).write_text("private")
    (finished / "more.png").symlink_to("/etc/hostname")
    publish(finished)
    assert _files(hub, "user/vit") == expected


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("results.json", '{"token": "hf_abcdefghijklmnopqrstuvwxyz012345"}', "looks like a Hub token"),
        ("results.json", '{"token": "my-own-secret"}', "holds the token"),
        ("report.html", "<p>{cwd}/data/train.parquet</p>", "names a local folder"),
        ("config.json", '{"_name_or_path": "/home/jane/models/vit"}', "names a local folder"),
        ("tokenizer_config.json", '{"name_or_path": "/home/jane/models/bert"}', "names a local folder"),
        ("results.json", '{"data": "C:\\\\Users\\\\jane\\\\x"}', "names a local folder"),
        ("README.md", "---\ntags: [a\n---\n# x", "its metadata cannot be read"),
    ],
)
def test_what_would_give_something_away_is_refused(finished: Path, file: str, text: str, message: str) -> None:
    (finished / file).write_text(text.replace("{cwd}", str(Path.cwd())))
    with pytest.raises(UNSCError, match=message) as caught:
        public_files(finished, secrets=["my-own-secret"])
    assert str(caught.value).startswith(file)
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_run_or_hide_a_path_are_refused(finished: Path, tmp_path: Path) -> None:
    for folder, message in ((tmp_path / "gone", "does not exist"), (tmp_path, "holds no README.md")):
        with pytest.raises(UNSCError, match=message):
            public_files(folder)
    save_file({"x": torch.zeros(2)}, finished / "model.safetensors", metadata={"from": "/home/jane/x/y"})
    with pytest.raises(UNSCError, match=r"model\.safetensors: names a local folder"):
        public_files(finished)
    (finished / "model.safetensors").unlink()
    with pytest.raises(UNSCError, match="holds no weights"):
        public_files(finished)


# ---- again, elsewhere, over something else --------------------------------------------------------------------------
def test_a_second_push_changes_nothing_and_a_new_card_is_one_file(hub: Hub, publish: Call, finished: Path) -> None:
    first = publish(finished)
    assert publish(finished) == first
    assert len(hub.repos["user/vit"].commits) == 2
    hub.requests.clear()
    (finished / "README.md").write_text((finished / "README.md").read_text() + "\nmore\n")
    publish(finished)
    assert len(hub.repos["user/vit"].commits) == 3
    assert "storage" not in {stage for stage, _ in hub.requests}
    assert _files(hub, "user/vit") == _local(finished)


def test_weights_that_still_remember_are_taken_out(hub: Hub, publish: Call, finished: Path) -> None:
    publish(finished)
    files = _files(hub, "user/vit")
    old = {"pytorch_model.bin": b"old", "model-00001-of-00002.safetensors": b"old", "notes.txt": b"kept"}
    hub.repos["user/vit"].commit({**files, **old})
    publish(finished)
    assert set(_files(hub, "user/vit")) == {*_local(finished), "notes.txt"}


def test_branch_and_visibility_are_honoured(hub: Hub, publish: Call, finished: Path) -> None:
    assert "commit" in publish(finished, private=True, revision="forgot")
    repo = hub.repos["user/vit"]
    assert repo.private
    assert _files(hub, "user/vit", "forgot") == _local(finished)
    assert _files(hub, "user/vit", "main") == {}
    assert "commit" in publish(finished, revision="forgot")


# ---- refusals and faults --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": "hf_wrong"}, "hub_token: it is not accepted"),
        ({"token": READ_ONLY}, "hub_token: the token may not write"),
        ({"repo_id": "somebody/vit"}, "hub_token: the token may not write to somebody/vit"),
        ({"repo_id": "user/a b"}, "hub_model_id: 'user/a b' is not a valid repository name"),
    ],
)
def test_a_refusal_is_one_line(hub: Hub, publish: Call, finished: Path, options: dict[str, Any], message: str) -> None:
    answer = publish(finished, **options)
    assert answer["error"].startswith(message)
    assert "\n" not in answer["error"]
    assert all(len(repo.commits) == 1 for repo in hub.repos.values())


@pytest.mark.parametrize("stage", ["yaml", "preupload", "commit"])
def test_a_commit_that_lands_in_between_is_not_overwritten(hub: Hub, publish: Call, finished: Path, stage: str) -> None:
    publish(finished)
    repo = hub.repos["user/vit"]
    theirs = {**_files(hub, "user/vit"), "README.md": b"# Corrected by somebody else"}
    (finished / "README.md").write_text((finished / "README.md").read_text() + "\nmore\n")
    hub.before[stage] = lambda: repo.commit(theirs)
    answer = publish(finished)
    assert "commit" not in answer, "overwrites what somebody else has written"
    assert answer["error"].startswith("hub_model_id: somebody else changed user/vit in between, nothing was overw")
    assert "\n" not in answer["error"]
    assert repo.files("main") == theirs
    assert len(repo.commits) == 3


FAULTS = [
    ("create", 500, False), ("create", None, False), ("create", None, True), ("info", 503, False),
    ("yaml", 502, False), ("preupload", 401, False), ("preupload", 403, False), ("preupload", 429, False),
    ("preupload", None, False), ("lfs", 402, False), ("lfs", 503, False), ("storage", 403, False),
    ("storage", 503, False), ("storage", None, False), ("commit", 402, False), ("commit", 409, False),
    ("commit", 412, False), ("commit", 429, False), ("commit", 503, False), ("commit", None, False),
    ("commit", None, True),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "status", "late"), FAULTS)
def test_after_a_fault_the_hub_holds_the_old_or_the_new_and_a_second_push_repairs(
    hub: Hub, publish: Call, finished: Path, stage: str, status: int | None, late: bool
) -> None:
    hub.fault = Fault(stage, status, late)
    error = publish(finished)["error"]
    assert "\n" not in error
    assert any(advice in error for advice in ("publish again with `unsc push ", "log in", "a token with write access"))
    state = _files(hub, "user/vit") if "user/vit" in hub.repos else {}
    assert state == (_local(finished) if (stage, late) == ("commit", True) else {})
    hub.fault = None
    assert "commit" in publish(finished)
    assert _files(hub, "user/vit") == _local(finished)
    assert len(hub.repos["user/vit"].commits) == 2
