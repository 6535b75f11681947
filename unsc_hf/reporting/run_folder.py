from __future__ import annotations

import fnmatch
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import Trainer

from ..errors import UNSCError
from ..utils.files import write_text

UNFINISHED = ".unfinished"


RESULTS = "results.json"


# What a run writes, and what may be published of it.
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


PUBLIC = (
    *WEIGHTS, "config.json", "generation_config.json", "adapter_config.json",
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json", "chat_template.jinja",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
    "README.md", "results.json", "report.html", "*.png",
)  # fmt: skip


_SCRATCH = "_saving-"


def check_output_folder(folder: str | Path) -> None:
    """Refuse a folder that holds a finished run, or any model: nothing is overwritten but what a killed run has left.

    Raises:
        UNSCError: says what is there.
    """
    known = [(RESULTS, "a finished run")]
    if not (Path(folder) / UNFINISHED).exists():
        known += [("config.json", "a model"), ("adapter_config.json", "an adapter")]
    for file, what in known:
        if (Path(folder) / file).exists():
            raise UNSCError(f"output_dir: {folder} holds {what}; choose another folder, or move that one away.")


def move_model(trainer: Trainer, folder: Path) -> None:
    """Save the model beside, then move its files into `folder`, which counts as unfinished from now on.

    Every process must call this, since sharded weights are put together for it; the first one writes.
    """
    if not trainer.is_world_process_zero():
        trainer.save_model(str(folder), _internal_call=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / UNFINISHED).exists():  # what a killed run has left may be of other names
        for left in folder.iterdir():
            if left.is_file() and any(fnmatch.fnmatchcase(left.name, pattern) for pattern in PUBLIC):
                left.unlink()
    write_text(folder / UNFINISHED, "The result in this folder is not whole: start its run again.\n")
    for left in folder.glob(f"{_SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=folder))
    try:
        trainer.save_model(str(scratch), _internal_call=True)
        for file in sorted(scratch.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def finish(folder: Path, results: dict[str, Any] | None = None) -> None:
    """Write `results.json`, the last file of a run that has results; the folder is whole now."""
    if results is not None:
        write_text(folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False))
    (folder / UNFINISHED).unlink(missing_ok=True)
