"""Jobs of a comparison: one after another in this process, or spread over processes of one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache
from graphlib import TopologicalSorter
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
    """A piece of work whose result is a file."""

    name: str  # unique
    run: Callable[[], str] = field(repr=False)  # does it, and returns a line for people
    needs: tuple[str, ...] = ()  # names of jobs that must be done before
    long: bool = False  # several processes begin it first; everybody waits for a long job that is begun last
    record: Path | None = None  # the file, where the job need not be done again once it is there
    wanted: bool = False  # whether the record is a result; other jobs are done for those that need them


def open_jobs(jobs: Sequence[Job]) -> list[Job]:
    """The jobs whose wanted records are missing, and those that they need."""
    missing = {job.name: job for job in jobs if job.record is None or not job.record.is_file()}
    needed, pending = set[str](), [name for name, job in missing.items() if job.wanted]
    while pending:
        name = pending.pop()
        if name in missing and name not in needed:
            needed.add(name)
            pending += missing[name].needs
    return [job for job in jobs if job.name in needed]


def one_process(what: str) -> None:
    """Refuse to be one of several processes that a launcher started: they would wait for each other's files."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise UNSCError(f"{what} was launched as {world} processes; start it once (--jobs spreads a comparison).")


def run_jobs(
    jobs: Sequence[Job], make: Callable[[], Sequence[Job]], processes: int | None, report: Callable[[str], None]
) -> None:
    """Do all jobs, each after the jobs it needs. What is finished stays, whatever happens to the others.

    Args:
        jobs: in an order in which they can be done; needs that are not among them count as done.
        make: makes the same jobs in a new process; it must be picklable.
        processes: number of processes of one thread each; None does all jobs here, with the threads torch has.
        report: receives a line for each finished job.

    Raises:
        UNSCError: a job failed, or a process died. The other processes are ended.
    """
    if processes is None:
        for i, job in enumerate(jobs):
            report(f"[{i + 1}/{len(jobs)}] {job.run()}")
    elif jobs:
        _spread(jobs, make, min(processes, len(jobs)), report)


def _spread(
    jobs: Sequence[Job], make: Callable[[], Sequence[Job]], processes: int, report: Callable[[str], None]
) -> None:
    order = {job.name: i for i, job in enumerate(sorted(jobs, key=lambda job: not job.long))}
    graph = TopologicalSorter({job.name: order.keys() & set(job.needs) for job in jobs})
    graph.prepare()
    ready: list[str] = []
    running: dict[Future[str], str] = {}
    done, others = 0, multiprocessing.active_children()
    # A fork would copy threads that hold locks.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker, (make,))
    try:
        with patch_environment(**_ONE_THREAD):
            while graph.is_active():
                ready = sorted([*ready, *graph.get_ready()], key=order.__getitem__)
                while ready and len(running) < processes:
                    name = ready.pop(0)
                    running[pool.submit(_run_job, name)] = name
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    line = future.result()
                    graph.done(running.pop(future))
                    done += 1
                    report(f"[{done}/{len(jobs)}] {line}")
    except BaseException as error:
        for child in multiprocessing.active_children():
            if child not in others:
                child.terminate()
        if isinstance(error, BrokenProcessPool):
            raise UNSCError(
                f"jobs: a process died while {', '.join(map(repr, running.values()))} ran, perhaps for lack of memory; "
                "the same command continues where it was, if need be with fewer jobs."
            ) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


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
