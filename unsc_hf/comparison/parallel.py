"""Jobs of a comparison: one after another in this process, or spread over processes of one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from accelerate.utils import patch_environment

from ..errors import UNSCError, first_line, full_disk_in_one_line

# Variables that new processes inherit.
_ONE_THREAD: dict[str, Any] = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), 1),
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_MMAP_THRESHOLD_": 2**30,  # glibc returns larger arrays at once, and asks for cleared pages again
    "MALLOC_TRIM_THRESHOLD_": 2**32,
}


@dataclass(frozen=True)
class Job:
    """A piece of work. One with a `file` makes a result; others are done for those of later stages."""

    name: str  # unique
    run: Callable[[], str] = field(repr=False)  # does it, and returns a line for people
    file: Path | None = None  # where the result is kept


def run_stages(
    stages: Sequence[Sequence[Job]],
    make: Callable[[], Sequence[Job]],
    processes: int | None,
    report: Callable[[str], None],
) -> None:
    """Do the jobs whose files are missing, a stage after the other. What is finished stays, whatever happens to others.

    Args:
        stages: the jobs of one do not need each other.
        make: makes all jobs anew in another process; it must be picklable.
        processes: number of processes of one thread each; None does all jobs here, with the threads torch has.
        report: receives a line for each finished job.

    Raises:
        UNSCError: a job failed, or a process died. The other processes are ended.
    """
    stages = [[job for job in stage if job.file is None or not job.file.is_file()] for stage in stages]
    if any(job.file for stage in stages for job in stage):
        lines = (job.run() for stage in stages for job in stage)
        count = sum(map(len, stages))
        for i, line in enumerate(lines if processes is None else _spread(stages, make, processes)):
            report(f"[{i + 1}/{count}] {line}")


def _spread(stages: Sequence[Sequence[Job]], make: Callable[[], Sequence[Job]], processes: int) -> Iterator[str]:
    """Yields the line of each job when it is done."""
    others, spawn = multiprocessing.active_children(), multiprocessing.get_context("spawn")  # a fork copies held locks
    with patch_environment(**_ONE_THREAD), ProcessPoolExecutor(processes, spawn, _start_worker, (make,)) as pool:
        try:
            for stage in stages:
                for done in as_completed([pool.submit(_run_job, job.name) for job in stage]):
                    yield done.result()
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


# ---- in a worker ----------------------------------------------------------------------------------------------------
_jobs_by_name: Callable[[], dict[str, Job]] = dict  # replaced when a worker starts


def _start_worker(make: Callable[[], Sequence[Job]]) -> None:
    """One thread, no output, and no life beyond that of the process which asks."""
    import datasets
    import torch
    from transformers.utils import logging

    global _jobs_by_name
    _jobs_by_name = cache(lambda: {job.name: job for job in make()})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it too, and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 -- the parent reports for all


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        signal.raise_signal(signal.SIGTERM)


def _run_job(name: str) -> str:
    try:
        with full_disk_in_one_line():
            return _jobs_by_name()[name].run()
    except UNSCError:
        raise
    except Exception as error:  # whatever it is, it has to survive the way to the parent
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UNSCError(f"jobs: {name!r} failed, {reason}; without jobs the whole traceback is shown.") from None
