"""The folder of a job keeps what cost time, and a stranger's card stops nothing."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from unsc_hf import UNSCError
from unsc_hf.reporting.screen import LOG
from unsc_hf.runs.job import job_folder, origin_of


def fail(folder: Path, *files: str) -> None:
    """A job that has written files when it meets bad input."""
    with suppress(UNSCError), job_folder(folder):
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("x")
        raise UNSCError("name: seen; do this.")


def test_bad_input_leaves_no_folder_with_nothing_but_a_log(tmp_path: Path) -> None:
    fail(tmp_path / "out", LOG)
    assert not (tmp_path / "out").exists()


def test_models_that_a_job_has_trained_outlive_its_bad_input(tmp_path: Path) -> None:
    fail(tmp_path / "out", "references/original-0/model.safetensors", LOG)
    assert (tmp_path / "out" / "references" / "original-0" / "model.safetensors").is_file()
    assert (tmp_path / "out" / LOG).is_file()


@pytest.mark.parametrize("metadata", ["license: [a", "- a\n- b", "model-index: 3", "license: [mit]"])
def test_an_odd_card_of_the_original_gives_no_licence(metadata: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# A model\n")
    assert origin_of(str(tmp_path), None, None, "command", "digits").license is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert origin_of(str(tmp_path), None, None, "command", "digits").license == "mit"
