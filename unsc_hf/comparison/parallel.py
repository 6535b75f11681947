"""Jobs of a comparison: files that this process makes, or several processes of one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import patch_environment

from ..errors import UNSCError, first_line

# Variables that new processes inherit.
_ONE_THREAD: dict[str, Any] = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), 1),
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_MMAP_THRESHOLD_": 2**30,  # glibc returns larger arrays at once, and asks for cleared pages again
    "MALLOC_TRIM_THRESHOLD_": 2**32,
}


@dataclass(frozen=True)
class Job:
    """A file, and what makes it. Files that it needs are made on the way, or waited for while others make them."""

    name: str
    file: Path
    make: Callable[[], Any]


def work(jobs: Sequence[Job]) -> Iterator[Job]:
    """Make the missing files, and yield each job when it is done."""
    for job in jobs:
        if not job.file.is_file():
            job.make()
            yield job


def share(jobs: Sequence[Job], again: Callable[[], Sequence[Job]], processes: int) -> Iterator[Job]:
    """As `work`, by several processes of one thread each. What is finished stays, whatever happens to the others.

    Args:
        again: makes the same jobs in a new process; it must be picklable.

    Raises:
        UNSCError: a job failed, or a process died. The other processes are ended.
    """
    others, spawn = multiprocessing.active_children(), multiprocessing.get_context("spawn")  # a fork copies held locks
    with patch_environment(**_ONE_THREAD), ProcessPoolExecutor(processes, spawn, _begin) as pool:
        try:
            made = {pool.submit(_make, again, job.name): job for job in jobs if not job.file.is_file()}
            for one in as_completed(made):
                one.result()
                yield made[one]
        except BaseException as error:
            for child in multiprocessing.active_children():
                if child not in others:
                    child.terminate()
            if isinstance(error, BrokenProcessPool):
                raise UNSCError(
                    "jobs: a process died, perhaps for lack of memory; the same command continues where it was, if "
                    "need be with fewer jobs."
                ) from None
            raise


# ---- in a process of the pool ---------------------------------------------------------------------------------------
_jobs: dict[str, Job] = {}


def _begin() -> None:
    """One thread, no output, and no life beyond that of the process which asks."""
    import datasets
    import torch
    from transformers.utils import logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it too, and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 -- the parent reports for all


def _make(again: Callable[[], Sequence[Job]], name: str) -> None:
    """Make the file of a job."""
    try:
        if not _jobs:
            _jobs.update({job.name: job for job in again()})
        if name not in _jobs:
            raise UNSCError(f"jobs: no process can make {name!r}; register what it needs in plugins.")
        _jobs[name].make()
    except UNSCError:
        raise
    except Exception as error:  # whatever it is, it has to survive the way to the parent
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UNSCError(f"jobs: {name!r} failed, {reason}; without jobs the whole traceback is shown.") from None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        signal.raise_signal(signal.SIGTERM)
