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


def _device() -> str:
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {memory:.0f} GB each"
    return "Apple GPU (mps)" if torch.backends.mps.is_available() else "no accelerator: models run on the CPU"


def examine() -> dict[str, str]:
    """Versions, device, folders and access, by name. Nothing is sent anywhere, and the token is not shown."""
    cache = Path(constants.HF_HOME)
    there = next(path for path in (cache, *cache.parents) if os.path.exists(path))
    return {
        **versions(),
        "device": _device(),
        "threads": str(torch.get_num_threads()),
        "memory": f"{psutil.virtual_memory().available / 1e9:.1f} GB free",
        "cache folder": f"{cache}, {shutil.disk_usage(there).free / 1e9:.1f} GB free",
        "current folder": f"{Path.cwd()}, {shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB free",
        "Hub token": "set" if huggingface_hub.get_token() else "not set; `hf auth login` sets it (needed to publish)",
        "Hub": "offline: HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "online",
    }
