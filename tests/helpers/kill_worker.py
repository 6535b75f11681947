"""What is killed: a whole run of the command line, in a process of its own that has everything imported already."""

from __future__ import annotations

import os
import resource
import sys


def unlearn(words: list[str], log: str, largest: int | None = None) -> None:
    """`unsc WORDS`, with its output in a file; no other file may grow beyond `largest` bytes, as on a full disk."""
    import torch

    from unsc_hf.cli.main import main

    torch.set_num_threads(1)
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        if largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        code = main(words)
    sys.exit(code)
