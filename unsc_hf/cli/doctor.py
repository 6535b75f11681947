"""`unsc doctor`: what a maintainer asks first when something does not work."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import huggingface_hub
import psutil
import torch
from huggingface_hub import constants

from ..reporting.model_card import versions


def _free(folder: Path) -> str:
    """Free disk where a folder is, or will be."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return f"{shutil.disk_usage(there).free / 1e9:.1f} GB free"


def _device() -> str:
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {memory:.0f} GB each"
    if torch.backends.mps.is_available():
        return "Apple GPU (mps)"
    return "no accelerator: models run on the CPU"


def examine() -> dict[str, str]:
    """Versions, device, folders and access, by name. Nothing is sent anywhere, and the token is not shown."""
    cache, here = Path(constants.HF_HOME), Path.cwd()
    token = "set" if huggingface_hub.get_token() else "not set; `hf auth login` sets it (needed to publish)"
    offline = "offline: HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "online"
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        **versions(),
        "device": _device(),
        "processors": f"{processors}, torch uses {torch.get_num_threads()}",
        "memory": f"{psutil.virtual_memory().available / 1e9:.1f} GB free",
        "cache folder": f"{cache}, {_free(cache)}",
        "current folder": f"{here}, {_free(here)}",
        "Hub token": token,
        "Hub": offline,
    }
