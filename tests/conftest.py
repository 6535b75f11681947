"""Tiny models and data for offline tests on a CPU."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

datasets.disable_progress_bars()
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


# The files that take longest, the longest first: begun last, one of them would run on while the other worker has nothing to do.
_LONG = (
    "test_compare_methods.py", "test_interruptions.py", "test_two_processes.py", "test_trainer.py", "test_architectures.py", "test_recipe.py",
    "test_studies.py", "test_text.py", "test_large_layers.py", "test_preparation.py", "test_methods.py", "test_causal_lm.py", "test_compile.py",
    "test_feature_bands.py", "test_feature_erasure.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first; within a file the order stays."""
    gone = [name for name in _LONG if not Path(__file__).with_name(name).is_file()]
    assert not gone, f"_LONG names files that are no longer here: {gone}"
    place = {name: i for i, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(_LONG)))


def pytest_configure() -> None:
    """One seed for the run, drawn anew; set before the workers start, so that they share it."""
    os.environ.setdefault("TEST_SEED", str(torch.seed() % 2**31))


def _seed(place: str) -> None:
    torch.manual_seed((int(os.environ["TEST_SEED"]) + zlib.crc32(place.encode())) % 2**31)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, Any, Any]:
    """A fixture that several tests share draws the same whichever of them comes first."""
    if fixturedef.scope != "function":
        _seed(f"{fixturedef.baseid}::{fixturedef.argname}[{getattr(request, 'param_index', 0)}]")
    return (yield)


@pytest.fixture(autouse=True)
def _fresh_inputs(request: pytest.FixtureRequest) -> None:
    """Inputs are drawn anew in every run; a failure prints the seed that repeats it, alone or with others."""
    _seed(request.node.nodeid)
    request.node.add_report_section("setup", "seed", f"repeat with TEST_SEED={os.environ['TEST_SEED']}")


def make_vit(
    labels: int = 3, hidden: int = 48, layers: int = 2, image: int = 8, patch: int = 4, **config: Any
) -> ViTForImageClassification:
    """A ViT of a few thousand weights, without dropout unless asked for; biases and norms are random, not trivial."""
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_channels": 3, **config}
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=2 * hidden,
            image_size=image,
            patch_size=patch,
            num_labels=labels,
            **settings,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def learned(data: Dataset) -> PreTrainedModel:
    """A tiny ViT that knows the classes."""
    model = make_vit()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    model.train()
    for _ in range(60):
        out = model(pixel_values=data[:]["pixel_values"], labels=data[:]["label"])
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
    return model.eval()


def tensor_dataset(pixels: torch.Tensor, labels: list[int], names: list[str] | None = None) -> Dataset:
    """Rows ready for the model: `pixel_values` and `label`."""
    count = max(labels) + 1
    feature = ClassLabel(names=names or [f"class {i}" for i in range(count)])
    side: Any = Value("float32")
    for _ in range(pixels.dim() - 1):
        side = List(side)
    features = Features({"pixel_values": side, "label": feature})
    return Dataset.from_dict({"pixel_values": pixels.tolist(), "label": labels}, features=features).with_format("torch")


def exact_rows(names: list[str]) -> tuple[Dataset, Dataset]:
    """Forget rows of class 2, and retained rows of classes 0 and 1 that repeat four images."""
    images = torch.randn(4, 3, 8, 8)
    retain = tensor_dataset(images.repeat(6, 1, 1, 1), [0, 0, 1, 1] * 6, names)
    return tensor_dataset(torch.randn(40, 3, 8, 8), [2] * 40, names), retain


@pytest.fixture
def low_rank_data() -> tuple[Dataset, Dataset]:
    """Forget rows of class 2, and retained rows of classes 0 and 1 that repeat four images: few distinct activations."""
    return exact_rows(["a", "b", "c"])


@pytest.fixture
def exact_data() -> tuple[Dataset, Dataset]:
    """The same for models of ten labels: of three random logits alone, all may be nearly zero, and a change relative to
    them would then measure their size."""
    return exact_rows(list("abcdefghij"))


@pytest.fixture
def separable_data() -> Callable[[int], Dataset]:
    """Classes that differ in their mean image, so that a tiny model can learn them."""
    means = 2 * torch.randn(3, 3, 8, 8)

    def draw(per_class: int) -> Dataset:
        labels = [c for c in range(3) for _ in range(per_class)]
        pixels = torch.stack([means[c] + 0.5 * torch.randn(3, 8, 8) for c in labels])
        return tensor_dataset(pixels, labels, ["cat", "dog", "frog"])

    return draw


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Real data and trained models for development; tests that need them are skipped where they are absent."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "models" / "fashion_mnist_vit").is_dir():
        pytest.skip("real data and trained models are not here")
    return folder


def with_odd_labels(data: Dataset, rows: int) -> Dataset:
    """The same rows, some with labels that no model would give."""
    odd = torch.randperm(len(data))[:rows].tolist()
    labels = [(int(label) + 1) % 3 if i in odd else int(label) for i, label in enumerate(data["label"][:])]
    return tensor_dataset(torch.stack(list(data["pixel_values"][:])), labels, ["cat", "dog", "frog"])
