"""Checkpoints of a run: which are whole, and which run they belong to."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ..errors import UNSCError
from ..utils.files import write_text

logger = logging.getLogger(__name__)

_STATE_FILE = "unsc_state.json"


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
                f"resume_from_checkpoint: {wanted} was not written by UNSCTrainer, or not to its end; use an earlier "
                "one, or true for the last whole one."
            )
        return str(wanted)
    whole = [
        path for path in Path(output_dir).glob("checkpoint-*") if (path / _STATE_FILE).is_file() and _step(path) >= 0
    ]
    if not whole:
        logger.warning("%s holds no whole checkpoint; unlearning starts from the original.", output_dir)
        return None
    return str(max(whole, key=_step))


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
