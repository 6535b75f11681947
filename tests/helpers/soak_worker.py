"""Many requests one after another, from whatever an earlier process has left: what is killed by the soak."""

from __future__ import annotations

import gc
import os
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from transformers import ViTForImageClassification

from helpers.models import fit, make_vit
from helpers.rows import tensor_dataset
from unsc_hf import UNSCConfig, UNSCTrainer, serve_request
from unsc_hf.reporting.run_folder import UNFINISHED

_CLASSES, _OF_EACH = 20, 14


class Request(NamedTuple):
    """What is forgotten, and what stays: numbers of rows."""

    kind: str
    forget: list[int]
    retain: list[int]


def plan(count: int) -> list[Request]:
    """The requests, always the same: of every twenty one is a class, one trains an adapter, and 18 are single rows."""
    draw, left, requests = random.Random(0), list(range(_CLASSES * _OF_EACH)), list[Request]()
    for i in range(count):
        kind = {9: "adapters", 19: "class"}.get(i % 20, "rows")
        chosen = draw.choice(left)
        forget = [row for row in left if row % _CLASSES == chosen % _CLASSES] if kind == "class" else [chosen]
        left = [row for row in left if row not in forget]
        requests.append(Request(kind, forget, left))
    return requests


def serve(folder: str, count: int, log: str) -> None:
    """Serve what is left of `count` requests, with the output in a file."""
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects garbage often, and what was imported stays anyway
    torch.manual_seed(0)
    images = torch.randn(_CLASSES * _OF_EACH, 1, 4, 4)
    labels = torch.arange(len(images)) % _CLASSES
    rows = tensor_dataset(images, labels.tolist(), [f"class {c}" for c in range(_CLASSES)])
    model: Any = make_vit(labels=_CLASSES, hidden=32, layers=1, image=4, patch=2, num_channels=1)
    era, done = found(Path(folder))
    if not done:
        fit(model, {"pixel_values": images, "labels": labels}, steps=100)
    else:
        last = era / f"request-{done - number(era)}"
        model = ViTForImageClassification.from_pretrained(last if last.exists() else era / "start")
    for old in Path(folder).iterdir() if done else ():
        if old != era:
            shutil.rmtree(old)
    for request in plan(count)[done:]:
        forget, retain = rows.select(request.forget), rows.select(request.retain)
        args = UNSCConfig(
            output_dir=str(era), max_steps=1, check_steps=10, energy=0.9, max_leak=None, max_flips=None, use_cpu=True,
            rows_per_direction=None, target_forget_accuracy=0.0, disable_tqdm=True, report_to="none",
        )  # fmt: skip
        if request.kind != "adapters":
            serve_request(model, era / "statistics", args, forget, retain)
            assert [path.name for path in era.glob("request-*")] == [f"request-{done + 1 - number(era)}"]
        else:
            trainer = UNSCTrainer(model, args, forget, retain, peft_config=LoraConfig(r=2))
            trainer.train()
            model = trainer.unwrapped().merge_and_unload()
            after = era.with_name(str(done + 1))
            model.save_pretrained(era / "merged")
            after.mkdir(exist_ok=True)
            os.rename(era / "merged", after / "start")
            shutil.rmtree(era)
            era = after
        done += 1


def number(era: Path) -> int:
    """Requests before those of a folder."""
    return int(era.name)


def found(folder: Path) -> tuple[Path, int]:
    """Where requests are served now, and how many are done."""
    eras = [path for path in folder.glob("*") if number(path) == 0 or (path / "start").exists()]
    era = max(eras, key=number, default=folder / "0")
    models = [file.parent for file in era.glob("request-*/model.safetensors")]
    whole = [path for path in models if not (path / UNFINISHED).exists()]
    return era, number(era) + max((int(path.name.removeprefix("request-")) for path in whole), default=0)
