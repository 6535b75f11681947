"""Work spread over processes of one thread each: pieces with names, what each needs, and who keeps what in memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from ..errors import UNSCError, first_line, full_disk_in_one_line

_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),  # glibc gives larger arrays back at once, and asks for cleared pages again
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}


@dataclass(frozen=True)
class Job:
    """A piece of work whose result is a file.

    Attributes:
        name: unique.
        run: does it, and returns a line for people.
        needs: names of jobs that must be done before.
        place: jobs of one place share what a process keeps in memory; a process stays in its place while there is work.
        long: to be begun before others, whatever the place: a long job begun last is waited for by everybody.
    """

    name: str
    run: Callable[[], str] = field(repr=False)
    needs: tuple[str, ...] = ()
    place: str = ""
    long: bool = False


def one_process(what: str) -> None:
    """Refuse to be one of several processes that a launcher started: they would wait for each other's files.

    Raises:
        UNSCError: saying what to do instead.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise UNSCError(f"{what} was launched as {world} processes; start it once (--jobs spreads a comparison).")


Make = Callable[[], Sequence[Job]]


def run_jobs(jobs: Sequence[Job], make: Make, processes: int | None, tell: Callable[[str], None]) -> None:
    """Do all jobs, each after what it needs.

    Args:
        jobs: in an order in which they can be done; needs that are not among them count as done.
        make: makes the same jobs again in a new process; a function that can be pickled.
        processes: how many, of one thread each; None does all here, in the given order, with the threads torch has.
        tell: is given a line for each job done.

    Raises:
        UNSCError: bad input found by a job; or a process failed or died, which ends all of them.
    """
    if processes is None:
        for i, job in enumerate(jobs):
            tell(f"[{i + 1}/{len(jobs)}] {job.run()}")
        return
    if not jobs:
        return
    team = [_Worker(make) for _ in range(min(processes, len(jobs)))]
    try:
        _lead(jobs, team, tell)
    finally:
        for worker in team:
            worker.stop()


def _lead(jobs: Sequence[Job], team: Sequence[_Worker], tell: Callable[[str], None]) -> None:
    """Give each worker that is free the next job that can be done."""
    left, names, done = {job.name: job for job in jobs}, {job.name for job in jobs}, set[str]()
    while len(done) < len(jobs):
        for worker in team:
            ready = [job for job in left.values() if not (set(job.needs) & names) - done]
            if worker.busy is None and ready:
                chosen = next_job(ready, worker.place)
                worker.begin(left.pop(chosen.name))
        busy = [worker for worker in team if worker.busy is not None]
        if not busy:
            raise RuntimeError(f"jobs wait for each other: {', '.join(left)}")
        for connection in wait([worker.connection for worker in busy]):
            worker = next(one for one in busy if one.connection is connection)
            assert worker.busy is not None
            name = worker.busy.name
            line = worker.end()
            done.add(name)
            tell(f"[{len(done)}/{len(jobs)}] {line}")


def next_job(ready: Sequence[Job], place: str) -> Job:
    """The first long one; else the first of this place, else the first."""
    return min(ready, key=lambda job: (not job.long, job.place != place))  # min takes the first of equals


class _Worker:
    """A process and the job it does.

    Attributes:
        busy: the job, None when it is free.
        place: of the last job.
    """

    def __init__(self, make: Make) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy threads that hold locks
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, make), daemon=True)
        with _environment(_ONE_THREAD):
            self.process.start()
        theirs.close()
        self.busy: Job | None = None
        self.place = ""

    def begin(self, job: Job) -> None:
        self.busy, self.place = job, job.place
        with suppress(OSError):  # it is dead: reading from it tells
            self.connection.send(job.name)

    def end(self) -> str:
        """The line of the job that was done.

        Raises:
            UNSCError: it failed.
        """
        assert self.busy is not None
        name, self.busy = self.busy.name, None
        try:
            failed, line = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            raise UNSCError(
                f"jobs: the process at {name!r} died (exit code {code}; -9 is what a lack of memory looks like); the same command goes on "
                "where it was, if need be with fewer jobs."
            ) from None
        if failed:
            raise UNSCError(
                line if failed == "input" else f"jobs: {name!r} failed, {line}; without jobs it shows where."
            )
        return str(line)

    def stop(self) -> None:
        """A free process ends by itself when nobody can ask any more."""
        self.connection.close()
        if self.busy is None:
            self.process.join(10)
        self.process.terminate()
        self.process.join()


def _serve(connection: Connection, make: Make) -> None:
    """What a worker does: jobs by name, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends its workers
    import datasets
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 -- the parent speaks for all
    work: Mapping[str, Job] | None = None
    while True:
        try:
            name = connection.recv()
        except EOFError:  # the parent is gone
            return
        answer: tuple[str, Any]
        try:
            with full_disk_in_one_line():
                if work is None:
                    work = {job.name: job for job in make()}
                answer = "", work[name].run()
        except UNSCError as error:
            answer = "input", str(error)
        except Exception as error:  # whatever it is, it must be told by the one who asked
            answer = "failure", f"{type(error).__name__}: {first_line(error)}"
        try:
            connection.send(answer)
        except OSError:
            return


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """What new processes inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
