"""Rank processes for distributed tests, forked from nurseries that have imported torch and DeepSpeed once.

A rank that starts from nothing spends 4 to 10 seconds on imports. So the first distributed test starts a nursery for
each rank; from then on the ranks of each test are forked from them in milliseconds. Nothing that a test does to a rank
(an environment variable, a patched module, a crash) reaches the next test, because it has processes of its own.

Each rank has a nursery to itself, so that hashes of strings and addresses of objects differ between ranks as they do in
a real run: what goes by the order of a set is caught.

A nursery imports, and does nothing else: a thread or a CUDA context would not survive the fork.
"""

import atexit
import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any, Protocol

from moe_dist.parallel.launch import Rank, rank_from_environment, start, stop
from tests.dist.nodes import Network, Seat

ROOT = Path(__file__).parents[2]
PRELOADED = (
    *("pytest", "tests.dist.helpers", "moe_dist.engine.deepspeed", "moe_dist.train.loop", "moe_dist.verify.command"),
    *("moe_dist.generate.command", "moe_dist.standalone.mixture_of_experts"),
    "torch._inductor.config",  # by deterministic algorithms
    "deepspeed.runtime.zero.muon.muon_optimizer",  # by every engine of DeepSpeed
    "torch._dynamo",  # by every optimizer of torch, which DeepSpeed has
)
"""What ranks import."""
GRACE = 5.0
"""Seconds in which the other ranks may say what they saw after one has failed."""


class RankError(AssertionError):
    """A rank raised, was killed or left early. The message holds its traceback."""


class Work(Protocol):
    """What a child of a nursery does."""

    def run(self) -> None: ...


@dataclass(frozen=True)
class Job:
    """One of `ranks` ranks. call: worker and arguments, pickled. seat: on a virtual node, from which ranks meet over
    its network; None for this machine, where they meet in `folder`."""

    rank: int
    ranks: int
    call: bytes
    folder: str
    working_directory: str
    environment: dict[str, str]
    seat: Seat | None = None

    @property
    def raised(self) -> Path:
        """Where the rank writes what it raised."""
        return Path(self.folder, f"raised-{self.rank}")

    def run(self) -> None:
        try:
            move_to(self.working_directory, self.environment, self.seat)
            worker, args = pickle.loads(self.call)
            here = Rank(self.rank, self.ranks, self.rank, self.ranks, file=f"{self.folder}/store")
            start(here if self.seat is None else rank_from_environment(os.environ), "cpu")
            worker(*args)
            stop()
        except Exception:
            self.raised.write_text(traceback.format_exc())
            sys.exit(1)


class Nursery:
    """A process of which rank `rank` of a test is forked; one test at a time.

    busy: it owes word of how its child ended.
    """

    def __init__(self, rank: int) -> None:
        self.connection, theirs = Pipe()
        self.busy = False
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        changes = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONHASHSEED": str(rank + 1)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from tests.dist.nursery import serve; serve({theirs.fileno()})"],
            env=os.environ | changes,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()

    def begin(self, work: Work, output: int | None = None) -> None:
        """output: the open file that the child prints to; None for the nursery's own."""
        self.busy = True
        self.connection.send((work, output is not None))
        if output is not None:
            send_handle(self.connection, output, self._process.pid)

    def child(self) -> int:
        """Its process id."""
        return int(self.connection.recv())

    def ended(self) -> tuple[int, float]:
        """The child's exit code, minus the signal where one killed it, and when on the clock of all processes."""
        code, when = self.connection.recv()
        self.busy = False
        return code, when

    def close(self) -> None:
        """Its child, if it has one, ends too."""
        self.connection.close()
        self._process.wait()


def serve(descriptor: int) -> None:
    """A nursery's life: it forks a child for each job, sends its process id, and when it has ended its exit code."""
    faulthandler.enable()
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # children need not look through what was imported, nor copy it by looking
    connection = Connection(descriptor)
    while True:
        try:
            work, prints = connection.recv()
        except EOFError:
            return
        output = recv_handle(connection) if prints else None
        child = multiprocessing.get_context("fork").Process(target=_live, args=(work, output))
        child.start()
        if output is not None:
            os.close(output)  # who reads it waits until nobody has it open
        connection.send(child.pid)
        if child.sentinel not in wait([connection, child.sentinel]):  # the tests are over, or gave up
            kill(child.pid)
        child.join()
        with suppress(BrokenPipeError):
            connection.send((child.exitcode, time.monotonic()))


def _live(work: Work, output: int | None) -> None:
    os.setsid()
    if output is not None:
        for stream in (1, 2):
            os.dup2(output, stream)
        os.close(output)
        # The nursery's own believe that they write to what it prints to, perhaps a file.
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    work.run()


def move_to(working_directory: str, environment: dict[str, str], seat: Seat | None) -> None:
    os.chdir(working_directory)
    os.environ.clear()
    os.environ.update(environment)
    if seat is not None:
        seat.take()


def kill(child: int) -> None:
    """And what it started."""
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


_NURSERIES: dict[int, Nursery] = {}


@atexit.register
def close_nurseries() -> None:
    while _NURSERIES:
        _NURSERIES.popitem()[1].close()


def nursery_of(rank: int) -> Nursery:
    if rank not in _NURSERIES:
        _NURSERIES[rank] = Nursery(rank)
    return _NURSERIES[rank]


def on_ranks(worker: Callable[..., None], ranks: int, *args: Any, network: Network | None = None) -> None:
    """worker(*args) on `ranks` new processes of this machine that form a process group; they end before this returns.

    worker must be importable. The ranks have this process's environment and working directory. network: whose nodes
    they are on, equally many on each. Raises RankError where a rank fails; the others have a few seconds to end, and
    are killed then.
    """
    seats = [None] * ranks if network is None else network.seats(ranks)
    nurseries = [nursery_of(rank) for rank in range(ranks)]
    call, environment = pickle.dumps((worker, args)), dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        jobs = [Job(rank, ranks, call, folder, os.getcwd(), environment, seats[rank]) for rank in range(ranks)]
        try:
            codes = _run(dict(zip(nurseries, jobs, strict=True)))
        finally:
            if any(nursery.busy for nursery in nurseries):  # one has died, or was left in mid-sentence
                close_nurseries()
        if any(codes.values()):
            raise RankError("\n".join(_ending(jobs[rank], code) for rank, code in codes.items() if code))


def _run(jobs: dict[Nursery, Job]) -> dict[int, int]:
    """Exit codes by rank, in the order in which they ended."""
    for nursery, job in jobs.items():
        nursery.begin(job)
    running = {nursery.connection: (nursery, nursery.child()) for nursery in jobs}
    endings: dict[int, tuple[int, float]] = {}
    deadline = None
    while running:
        try:
            ended = wait(running, None if deadline is None else max(0.0, deadline - time.monotonic()))
        except BaseException:  # the test's time is over
            for nursery, child in running.values():
                kill(child)
                nursery.ended()
            raise
        for connection in ended:
            nursery, _ = running.pop(connection)
            endings[jobs[nursery].rank] = nursery.ended()
        if not ended:
            for _, child in running.values():
                kill(child)
            deadline = None
        elif deadline is None and any(code for code, _ in endings.values()):
            deadline = time.monotonic() + GRACE
    return {rank: code for rank, (code, _) in sorted(endings.items(), key=lambda ending: ending[1][1])}


def _ending(job: Job, code: int) -> str:
    who = f"rank {job.rank} of {job.ranks}"
    if job.raised.exists():
        return f"{who} raised\n{job.raised.read_text()}"
    return f"{who} was killed by {signal.Signals(-code).name}" if code < 0 else f"{who} exited with {code}"
