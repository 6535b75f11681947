"""Tiny models and data for offline tests on a CPU."""

from __future__ import annotations

import copy
import os
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import pytest
import torch
from helpers.language import repeated_tokens
from helpers.models import learned
from helpers.rows import Data, Draw, exact_rows, separable
from helpers.training import Known

from unsc_hf import split_dataset

# Tests start processes of their own, which import the same helpers.
_HERE = Path(__file__).parent
_PATHS = [str(_HERE), str(_HERE.parent), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(_PATHS).rstrip(os.pathsep)

datasets.disable_progress_bars()
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

# The slowest files, slowest first. If one of them started last, the other worker would have nothing to do meanwhile.
_LONG = (
    "trainer/test_soak.py", "cli/test_interruptions.py", "trainer/test_two_processes.py", "docs/test_blocks.py",
    "docs/test_notebooks.py",
    "comparison/test_compare_methods.py", "tasks/test_causal_lm.py", "trainer/test_architectures.py",
    "trainer/test_trainer.py", "comparison/test_methods.py", "runs/test_image_jobs.py", "comparison/test_studies.py",
    "trainer/test_compile.py", "trainer/test_preparation.py", "comparison/test_texts.py",
    "trainer/test_large_layers.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first; within a file the order stays."""
    missing = [name for name in _LONG if not (_HERE / name).is_file()]
    assert not missing, f"_LONG names files that do not exist: {missing}"
    place = {name: i for i, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path.relative_to(_HERE).as_posix(), len(_LONG)))


def pytest_configure() -> None:
    """Draw one seed for the run before the workers start, so that they share it."""
    os.environ.setdefault("TEST_SEED", str(torch.seed() % 2**31))


def _seed(place: str) -> None:
    torch.manual_seed((int(os.environ["TEST_SEED"]) + zlib.crc32(place.encode())) % 2**31)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, Any, Any]:
    """Seed a fixture that several tests share by its name, so that it does not depend on which test comes first."""
    if fixturedef.scope != "function":
        _seed(f"{fixturedef.baseid}::{fixturedef.argname}[{getattr(request, 'param_index', 0)}]")
    return (yield)


@pytest.fixture(autouse=True)
def _fresh_inputs(request: pytest.FixtureRequest) -> None:
    """Inputs differ from run to run. A failure prints the seed that repeats it, alone or with other tests."""
    _seed(request.node.nodeid)
    request.node.add_report_section("setup", "seed", f"repeat with TEST_SEED={os.environ['TEST_SEED']}")


@pytest.fixture
def low_rank_data() -> Data:
    """Forget rows of class 2, and retained rows of classes 0 and 1 that repeat four images."""
    return exact_rows(["a", "b", "c"])


@pytest.fixture
def exact_data() -> Data:
    """The same for models of ten labels. Three random logits may all be nearly zero, and a change relative to them
    would then be large by chance."""
    return exact_rows(list("abcdefghij"))


@pytest.fixture
def separable_data() -> Draw:
    return separable()


@pytest.fixture(scope="session")
def _known() -> Known:
    train = separable()(30)
    return Known(learned(train), train, split_dataset(train, forget_classes=["frog"]))


@pytest.fixture
def known(_known: Known) -> Known:
    """What is trained once, with a model of the test's own."""
    return _known._replace(model=copy.deepcopy(_known.model))


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Real data and trained models for development; tests that need them are skipped where they are absent."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "models" / "fashion_mnist_vit").is_dir():
        pytest.skip("real data and trained models are not here")
    return folder


@pytest.fixture(scope="session")
def golden_tofu() -> Path:
    """Small copies of TOFU, two models, and what open-unlearning's evaluator gave for them.

    They are beside the repository, or where UNSC_GOLDEN_TOFU says; tests that need them are skipped where they are
    absent.
    """
    beside = Path(__file__).parents[2] / "shared" / "golden" / "tofu"
    folder = Path(os.environ.get("UNSC_GOLDEN_TOFU", beside))
    if not (folder / "open-unlearning").is_dir():
        pytest.skip("open-unlearning's numbers and the models they are of are not here")
    return folder


@pytest.fixture
def token_data() -> Data:
    return repeated_tokens()
