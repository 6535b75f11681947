"""What is killed: a whole run of the command line, in a process of its own that has everything imported already."""

from __future__ import annotations

import os
import sys


def unlearn(words: list[str], log: str) -> None:
    """`unsc WORDS`, with its output in a file."""
    import torch

    from unsc_hf.cli import main

    torch.set_num_threads(1)
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        code = main(words)
    sys.exit(code)
