"""What is measured or projected is in full float32, whatever the process computes in otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import make_vit
from helpers.rows import Data
from helpers.training import unlearned

from unsc_hf.nullspace.projection import Projector


def _operators() -> list[Any]:
    backends: Any = torch.backends
    return [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul]


def _ask_for_tf32(way: str) -> None:
    if way == "products":
        torch.set_float32_matmul_precision("high")
    elif way == "convolutions":  # as they are unless told otherwise
        torch.backends.cudnn.allow_tf32 = True
    elif hasattr(torch.backends, "fp32_precision"):  # as the Trainer's tf32=True and torch_compile=True do
        torch.backends.fp32_precision = "tf32"
    else:
        pytest.skip("this torch has no general setting")


@pytest.fixture
def default_precision() -> Iterator[None]:
    def reset() -> None:
        if hasattr(torch.backends, "fp32_precision"):
            torch.backends.fp32_precision = "none"
            for operator in _operators():
                operator.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        if hasattr(torch.backends, "fp32_precision"):
            for operator in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
                operator.fp32_precision = "none"

    reset()
    yield
    reset()


@pytest.mark.parametrize("way", ["products", "convolutions", "everything"])
def test_no_tf32_where_something_is_measured_or_projected(
    way: str, default_precision: None, low_rank_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state() -> tuple[Any, ...]:
        new = [o.fp32_precision for o in _operators()] if hasattr(torch.backends, "fp32_precision") else []
        try:
            return (*new, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
        except RuntimeError:  # the old switches cannot be read beside the new ones
            return (*new,)

    seen: dict[str, set[tuple[Any, ...]]] = {"measured": set(), "trained": set(), "projected": set()}
    model = make_vit()
    model.register_forward_pre_hook(
        lambda module, _: seen["trained" if torch.is_grad_enabled() else "measured"].add(state())
    )
    call = Projector.__call__
    monkeypatch.setattr(Projector, "__call__", lambda *words: seen["projected"].add(state()) or call(*words))
    _ask_for_tf32(way)
    before = state()
    unlearned(model, low_rank_data, tmp_path, max_steps=2)
    assert state() == before
    assert seen["trained"] == {before}  # the steps are computed as was asked for
    precise = ("ieee",) * (3 if hasattr(torch.backends, "fp32_precision") else 0) + ("highest", False)
    assert seen["measured"] == seen["projected"] == {precise}
    # Whoever changes the general setting afterwards is obeyed.
    if way == "everything":
        torch.backends.fp32_precision = "ieee"
        assert {o.fp32_precision for o in _operators()} == {"ieee"}
