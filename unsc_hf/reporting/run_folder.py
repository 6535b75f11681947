"""The output folder of a run: what it holds, and how it stays whole when a run is killed."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UNSCError, first_line
from ..utils.files import write_text

if TYPE_CHECKING:
    from transformers import Trainer

RESULTS = "results.json"
UNFINISHED = ".unfinished"  # marks a folder whose run has not ended

WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")

# What a run writes, and what may be published of it.
PUBLIC = (
    *WEIGHTS, "config.json", "generation_config.json", "adapter_config.json",
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json", "chat_template.jinja",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
    "README.md", RESULTS, "report.html", "*.png",
)  # fmt: skip

_SCRATCH = "_saving-"


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file name fits one of the patterns, as in a shell."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_output_folder(folder: str | Path) -> None:
    """Refuse a folder that holds a finished run or a model with a UNSCError; what an interrupted run left may be
    overwritten."""
    known = [(RESULTS, "a finished run")]
    if not (Path(folder) / UNFINISHED).exists():
        known += [("config.json", "a model"), ("adapter_config.json", "an adapter")]
    for file, what in known:
        if (Path(folder) / file).exists():
            raise UNSCError(f"output_dir: {folder} holds {what}; choose another folder, or move that one away.")


def move_model(trainer: Trainer, folder: Path) -> None:
    """Save the model beside, then move its files into `folder`, which counts as unfinished until `finish`.

    Every process must call this, because saving gathers sharded weights. The first process writes.
    """
    if not trainer.is_world_process_zero():
        trainer.save_model(str(folder), _internal_call=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / UNFINISHED).exists():  # an interrupted run may have written other files, such as full weights
        for file in folder.iterdir():
            if file.is_file() and matches(file.name, PUBLIC):
                file.unlink()
    write_text(folder / UNFINISHED, "The result in this folder is incomplete: start its run again.\n")
    for abandoned in folder.glob(f"{_SCRATCH}*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=folder))
    try:
        trainer.save_model(str(scratch), _internal_call=True)
        for file in sorted(scratch.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_results(folder: Path) -> dict[str, Any]:
    """`results.json` of a finished run; UNSCError where the folder holds none."""
    file = folder / RESULTS
    if not file.is_file():
        if (folder / UNFINISHED).exists():
            raise UNSCError(f"folder: {folder} holds an interrupted run; start that run again, it goes on from there.")
        raise UNSCError(f"folder: {folder} holds no results.json; name the output folder of a finished run.")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UNSCError(f"folder: {file} is not what a run writes ({first_line(error)}).") from error
    if not isinstance(results, dict) or not isinstance(results.get("request"), dict):
        raise UNSCError(f"folder: {file} is not what a run writes (it names no request); name a run's output folder.")
    return results


def finish(folder: Path, results: dict[str, Any] | None = None) -> None:
    """Write `results.json`, the last file of a run that has results, and mark the folder as finished."""
    if results is not None:
        write_text(folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False))
    (folder / UNFINISHED).unlink(missing_ok=True)
