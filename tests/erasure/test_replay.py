"""Replayed passes read what whole passes do, run fewer blocks, and give way where a model is not made so."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.architectures import build, rows_for
from helpers.erasure import Data, batch_of
from helpers.language import make_lm
from torch import Tensor, nn

from unsc_hf.data.dialogues import AnswerCollator
from unsc_hf.erasure import replay as replay_module
from unsc_hf.erasure.readings import find_readings, find_writer, read_writer
from unsc_hf.erasure.replay import Replay
from unsc_hf.models.layers import find_layers


def _counted(model: nn.Module) -> Counter[str]:
    """How often each member of a list of blocks has run."""
    ran: Counter[str] = Counter()
    for owner, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            for i, block in enumerate(module):
                for inner in block.modules():  # a replaced block calls none of its parts
                    if isinstance(inner, nn.Linear | nn.Conv2d):
                        inner.register_forward_hook(lambda *_, name=f"{owner}.{i}": ran.update([name]))
                        break
    return ran


@pytest.mark.parametrize("name", ["vit", "dinov2", "swin", "convnext", "resnet", "bert", "distilbert", "causal_lm"])
def test_replayed_passes_read_the_same(name: str, token_data: Data) -> None:
    answers = name == "causal_lm"
    model = (make_lm() if answers else build(name)).eval()
    rows = token_data[0] if answers else rows_for(model, name)[0]
    parts = [rows.select(range(start, start + 3)) for start in (0, 3)]
    batches = [AnswerCollator(1)(list(part.with_format("torch"))) if answers else batch_of(part) for part in parts]
    layers = find_layers(model).layers
    ran = _counted(model)
    spared = 0
    for reading in find_readings(model, not answers, answers, batches[0]):
        writer = find_writer(model, layers, reading, batches[0])
        if writer is None:
            continue
        near = replace(reading, replay=Replay(model, writer.module, reading, batches[0]))
        for repeated in range(3):
            whole, passed = [], []
            for batch in batches:
                ran.clear()
                whole.append(read_writer(model, writer, reading, batch, jacobian=True))
                of_whole = ran.total()
                ran.clear()
                passed.append(read_writer(model, writer, near, batch, jacobian=True))
                spared += of_whole - ran.total()
                if name == "bert" and reading.name == "head" and repeated:
                    assert not ran  # written by the pooler, behind all blocks
            for one, other in zip(whole, passed, strict=True):
                for part in ("features", "inputs", "jacobian"):
                    expected, found = getattr(one, part), getattr(other, part)
                    assert float((expected - found).norm()) <= 1e-5 * float(expected.norm())
            with torch.no_grad():
                writer.module.weight += 0.1 * torch.randn_like(writer.module.weight)
    assert spared > 0
    assert not any("forward" in vars(module) for module in model.modules())


class _Listed(nn.Linear):
    """Gives what no replay can keep."""

    def forward(self, x: Tensor) -> Any:
        return [super().forward(x)]


class _Blocks(nn.Module):
    """Three blocks; `sums` adds the output of the first to that of the last, `twice` runs them two times, `writes` in place, `lists` gives lists."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.ran = kind, [0, 0, 0]
        self.blocks = nn.ModuleList((_Listed if kind == "lists" else nn.Linear)(4, 4) for _ in range(3))
        for i, block in enumerate(self.blocks):
            block.forward = self._counted(i, block.forward)

    def _counted(self, i: int, run: Any) -> Any:
        def forward(x: Tensor) -> Any:
            self.ran[i] += 1
            return run(x)

        return forward

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2 if self.kind == "twice" else 1):
            first = self._run(0, x)
            x = self._run(1, first)
            if self.kind == "writes":
                x *= 2
            x = self._run(2, x)
        return x + first if self.kind == "sums" else x

    def _run(self, i: int, x: Tensor) -> Tensor:
        found = self.blocks[i](x)
        return found[0] if self.kind == "lists" else found


class _Whole:
    """A reading of all that a model gives."""

    state = None

    def rows(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch["x"])


WHOLE: Any = _Whole()


@pytest.mark.parametrize(
    ("kind", "replayed"), [("plain", True), ("writes", True), ("sums", False), ("twice", False), ("lists", False)]
)
def test_models_that_need_more_than_the_last_block_run_whole(kind: str, replayed: bool) -> None:
    model, batch = _Blocks(kind), {"x": torch.randn(5, 4)}
    own = [block.forward for block in model.blocks]
    again = Replay(model, model.blocks[2], WHOLE, batch)
    with torch.no_grad():
        model.blocks[2].weight.mul_(-3)
    whole = model(batch["x"])
    model.ran = [0, 0, 0]
    for _ in range(2):
        with again(batch):
            assert torch.allclose(model(batch["x"]), whole, atol=1e-5)
    times = 4 if kind == "twice" else 2
    assert model.ran == ([0, 0, 2] if replayed else [times] * 3)
    assert [block.forward for block in model.blocks] == own  # what others have put there is theirs


def test_parts_of_the_block_itself_are_replayed_while_memory_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("vit").eval()
    batches = [batch_of(rows_for(model, "vit")[0].select(range(start, start + 3))) for start in (0, 3)]
    (head,) = find_readings(model, False, False, batches[0])
    block = model.vit.layers[1]
    runs: Counter[str] = Counter()

    def count(name: str, run: Any) -> Any:
        return lambda *args, **kwargs: (runs.update([name]), run(*args, **kwargs))[1]

    for name in ("fc1", "fc2"):
        layer = getattr(block.mlp, name)
        layer.forward = count(name, layer.forward)
    whole = [head.rows(model, batch) for batch in batches]
    of_a_batch = Replay(model, block.mlp.fc2, head, batches[0])._bytes
    for limit, spared in ((4 * of_a_batch, True), (1.5 * of_a_batch, False)):  # half of it is for blocks
        monkeypatch.setattr(replay_module, "_MOST_BYTES", limit)
        again = replace(head, replay=Replay(model, block.mlp.fc2, head, batches[0]))
        runs.clear()
        for batch, expected in zip([*batches, *batches], [*whole, *whole], strict=True):
            assert torch.allclose(again.rows(model, batch), expected, atol=1e-5)
        assert runs["fc2"] == 4
        assert runs["fc1"] == (1 if spared else 4)  # the first batch was read when the replay was made


def test_what_does_not_fit_in_memory_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _Blocks("plain")
    batches = [{"x": torch.randn(5, 4)} for _ in range(3)]
    monkeypatch.setattr(replay_module, "_MOST_BYTES", 2 * 5 * 4 * 4)
    again = Replay(model, model.blocks[2], WHOLE, batches[0])
    for batch in batches:
        with again(batch):
            model(batch["x"])
    for batch, runs in zip(batches, (0, 0, 1), strict=True):
        model.ran = [0, 0, 0]
        with again(batch):
            assert torch.isfinite(model(batch["x"])).all()
        assert model.ran == [runs, runs, 1]
