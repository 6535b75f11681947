"""What a run leaves on a disk, in such an order that a run killed at any moment can be started again.

A folder is *unfinished* from the moment the first file of a result is moved into it until `results.json` is there. Such a
folder may be written over; one that holds a finished run, or somebody's model, may not.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UNSCError
from .files import write_text

if TYPE_CHECKING:
    from .trainer import UNSCTrainer

logger = logging.getLogger(__name__)

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
_STATE_FILE = "unsc_state.json"
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


def move_model(trainer: UNSCTrainer, folder: Path) -> None:
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


# ---- resuming ------------------------------------------------------------------------------------------------------


def unmark_checkpoint(folder: Path) -> None:
    """Before a checkpoint is written over: it is not whole until it is marked again."""
    (folder / _STATE_FILE).unlink(missing_ok=True)


def mark_checkpoint(folder: Path, identity: dict[str, Any]) -> None:
    """Write, last of all, what the run of a checkpoint began with; a checkpoint without it is not whole."""
    write_text(folder / _STATE_FILE, json.dumps(identity))


def resume_from(value: str | None) -> str | bool | None:
    """`--resume_from_checkpoint true` means the last whole one in the output folder."""
    return True if value is not None and value.lower() in ("true", "last") else value


def find_checkpoint(wanted: str | bool | None, output_dir: str | Path) -> str | None:
    """The checkpoint to go on from: the one named, or with True the last whole one; None where there is none yet.

    Raises:
        UNSCError: a named checkpoint that is not whole.
    """
    if not wanted:
        return None
    if wanted is not True:
        if not Path(str(wanted), _STATE_FILE).is_file():
            raise UNSCError(
                f"resume_from_checkpoint: {wanted} was not written by UNSCTrainer, or not to its end; use an earlier one, or true for the last whole one."
            )
        return str(wanted)
    whole = [
        path for path in Path(output_dir).glob("checkpoint-*") if (path / _STATE_FILE).is_file() and _step(path) >= 0
    ]
    if not whole:
        logger.warning("%s holds no whole checkpoint; unlearning starts from the original.", output_dir)
        return None
    return str(max(whole, key=_step))


def has_checkpoint(output_dir: str | Path) -> bool:
    """Whether a killed run could go on from something in this folder."""
    return any((path / _STATE_FILE).is_file() for path in Path(output_dir).glob("checkpoint-*"))


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1


def check_checkpoint(folder: str, identity: dict[str, Any]) -> None:
    """Refuse a checkpoint of another model, data or options.

    Raises:
        UNSCError: names the first difference.
    """
    began = json.loads(Path(folder, _STATE_FILE).read_text(encoding="utf-8"))
    for name, now in identity.items():
        if began.get(name) != now:
            raise UNSCError(
                f"resume_from_checkpoint: the run began with {name} {began.get(name)!r}, now it is {now!r}; "
                "resume with the original model, the same data and options."
            )
