"""Jobs of a comparison: files that this process makes, or several processes of one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import patch_environment

from ..errors import UNSCError, first_line
from ..utils.files import busy

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
    """Make the missing files, and yield each job when it is done. What another process is making comes last."""
    later = []
    for job in jobs:
        if not job.file.is_file():
            if busy(job.file):
                later.append(job)
            else:
                job.make()
                yield job
    for job in later:
        job.make()
        yield job


def share(jobs: Sequence[Job], again: Callable[[], Sequence[Job]], processes: int) -> Iterator[Job]:
    """As `work`, by several processes of one thread each. What is finished stays, whatever happens to the others.

    Args:
        again: makes the same jobs in a new process; it must be picklable.

    Raises:
        UNSCError: a job failed, or a process died. The other processes are ended.
    """
    missing = [job for job in jobs if not job.file.is_file()]
    others, spawn = multiprocessing.active_children(), multiprocessing.get_context("spawn")  # a fork copies held locks
    with patch_environment(**_ONE_THREAD), ProcessPoolExecutor(processes, spawn) as pool:
        try:
            working = {pool.submit(_work_quietly, again) for _ in range(processes if missing else 0)}
            while working or missing:
                done, working = wait(working, timeout=0.2, return_when=FIRST_EXCEPTION)
                yield from (job for job in missing if job.file.is_file())
                missing = [job for job in missing if not job.file.is_file()]
                for one in done:
                    one.result()
                if missing and not working:
                    raise UNSCError(f"jobs: no process made {missing[0].name!r}; register what it needs in plugins.")
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


def _work_quietly(again: Callable[[], Sequence[Job]]) -> None:
    """All of it with one thread, without output, and without a life beyond that of the process which asks."""
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
    for _ in work([replace(job, make=partial(_make, job)) for job in again()]):
        pass


def _make(job: Job) -> None:
    try:
        job.make()
    except UNSCError:
        raise
    except Exception as error:  # whatever it is, it has to survive the way to the parent
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UNSCError(f"jobs: {job.name!r} failed, {reason}; without jobs the whole traceback is shown.") from None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        signal.raise_signal(signal.SIGTERM)
