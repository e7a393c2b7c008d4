"""A rank that stands still is named with the last thing it did, and the others end: in seconds, not at a timeout.

Each rank has a thread that writes a heartbeat into heartbeats/ of the run folder: how far its main thread is, for how
long it has been there, and what it did last. The thread of rank r watches two things: its own main thread, and the file
of rank r + 1, so that the cost for each rank does not grow with the world. When one has not moved for `seconds`, all
files are read and judged:

1. A file that no longer changes is of a process that is stopped, or of a machine that is lost. It is to blame.
2. Else, when every main thread has stood still for so long, the one that has noted the fewest phases and collectives:
   the others wait for it, further on. Not before the first step: how long reading data takes nobody knows.

What each rank entered last is there too as soon as its main thread stands still; the verdict names the collective that
some ranks have entered and others have not, and logs/collectives.log has the last ones of all.

The first to judge writes verdict.json; all watch for that file, and leave on it with os._exit, as their main threads
hang in a collective. Stopped processes on one's own machine are killed, so that none is left behind.
"""

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moe_dist.disk import replace_text
from moe_dist.parallel.trail import Trail
from moe_dist.train.exit_codes import STALLED
from moe_dist.train.health.collectives import LOG, Entered, describe, mismatch, read_entered, write_entered
from moe_dist.train.record.run_folder import write_together
from moe_dist.train.record.status import write_status

_FOLDER, _VERDICT = "heartbeats", "verdict.json"
_WIDTH = 512  # bytes of a heartbeat: always the same ones, written at once, so that no reader sees a part


@dataclass(frozen=True, kw_only=True)
class Beat:
    """One heartbeat. born: when the process started, in ticks of the machine, so that a pid used again is not killed.
    count, doing: of the rank's Trail. idle: seconds since its main thread was last seen to move."""

    rank: int
    host: str
    pid: int
    born: str
    number: int
    count: int
    idle: float
    doing: str
    left: bool = False


@dataclass
class Age:
    """How long a value has been the same, as far as this process has run."""

    seconds: float = 0.0
    value: Any = field(default=object())

    def see(self, value: Any, passed: float) -> float:
        self.seconds = self.seconds + passed if value == self.value else 0.0
        self.value = value
        return self.seconds


class Watchdog:
    """Within `with Watchdog(...)`: this rank's heart beats and it watches. seconds None: nothing is done.

    Every rank must enter, with the trail that its mesh will have. Leaving it in order, after the last collective, or
    because the run was refused, removes what was written. Raises EndRun on every rank when nothing can be.
    """

    def __init__(self, run: Path, rank: int, world: int, trail: Trail, seconds: float | None) -> None:
        self.run, self.rank, self.world, self.trail, self.seconds = run, rank, world, trail, seconds
        self.folder = run / _FOLDER
        self.period = min(seconds / 10, 0.5) if seconds is not None else 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._number, self._born, self._own = 0, _born(os.getpid()), Age()
        self._told = -1  # the count at which the last collectives were written

    def clear(self) -> None:
        """Forget an earlier start. Rank 0 alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.iterdir():
            old.unlink()

    def __enter__(self) -> Self:
        if self.seconds is not None:
            write_together(self.folder, self.clear if self.rank == 0 else lambda: None)
            self._beat()  # before anything can stop this process: who has never been heard of cannot be ended either
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.seconds is None:
            return
        self._stop.set()
        self._thread.join()
        if kind is not None and not issubclass(kind, ValueError | SystemExit):
            self._beat(left=True)
        elif self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def verdict(self) -> list[Beat] | None:
        """The processes that do not run, if it has been judged that some rank stands still."""
        try:
            return [Beat(**beat) for beat in json.loads((self.folder / _VERDICT).read_text(encoding="utf-8"))["dead"]]
        except (OSError, ValueError):
            return None

    def _watch(self) -> None:
        assert self.seconds is not None
        other, next_rank = Age(), (self.rank + 1) % self.world
        last = time.monotonic()
        while not self._stop.wait(self.period):
            now = time.monotonic()
            passed, last = min(now - last, 4 * self.period), now  # if this process slept, so may the others have
            idle = self._idle(passed)
            stalled = idle >= self.seconds
            self._beat()
            if idle >= self.seconds / 2 and self._told != self.trail.count:
                self._told = self.trail.count
                with suppress(OSError, RuntimeError):  # RuntimeError: it goes on after all
                    write_entered(self._entered(self.rank), self.trail)
            if (dead := self.verdict()) is not None:
                self._leave(dead)
            beat = self._read(next_rank)
            if not (beat and beat.left):
                stalled |= other.see(beat, passed) >= self.seconds
            if stalled:
                self._judge()

    def _idle(self, passed: float) -> float:
        return self._own.see((self.trail.count, self.trail.ticks), passed)

    def _judge(self) -> None:
        assert self.seconds is not None
        if not self._sleep(min(self.rank, 4)):  # a few ranks first, or all would read all files at once
            return
        before = self._read_all()
        if not self._sleep(3):  # long enough for any heart that beats
            return
        after = self._read_all()
        dead = [beat for rank, beat in after.items() if not beat.left and before.get(rank) == beat]
        alive = [beat for beat in after.values() if beat not in dead]
        patience = self.seconds - 2 * self.period
        if not dead and (not self.trail.step or any(beat.idle < patience for beat in alive if not beat.left)):
            return  # somebody goes on, and the others may wait for it
        least = min((beat.count for beat in alive), default=0)
        silent = sorted(set(range(self.world)) - after.keys())
        blamed = dead or ([] if silent else [beat for beat in alive if beat.count == least])
        lines = [f"rank {rank} has not been heard of" for rank in silent]
        lines += [_sentence(beat, self.seconds, beat in dead) for beat in blamed[:8]]
        waits = next((beat for beat in alive if beat not in blamed), None)
        if waits is not None:
            lines.append(f"rank {waits.rank} waits in {waits.doing}")
        entered = {rank: read_entered(self._entered(rank)) for rank in after}
        known = {rank: each for rank, each in entered.items() if each is not None and each.count == after[rank].count}
        if (line := mismatch(known)) is not None:
            lines.append(line)
        self._pronounce("; ".join(lines), dead, known)

    def _sleep(self, periods: int) -> bool:
        """False when there is nothing to judge any more."""
        for _ in range(periods):
            time.sleep(self.period)
            self._idle(self.period)
            self._beat()
            if self._stop.is_set() or self.verdict() is not None:
                return False
        return True

    def _pronounce(self, reason: str, dead: list[Beat], entered: Mapping[int, Entered] | None = None) -> None:
        """Leaves whatever happens: with a full disk, or without the folder, the others come to their own verdict."""
        try:
            if not self._write_verdict(reason, dead):
                return  # another rank was first: the next round finds its verdict
            write_status(self.run, "failed", reason=reason, code=STALLED)
            if entered:
                (self.run / "logs").mkdir(exist_ok=True)
                replace_text(self.run / "logs" / LOG, describe(entered))
        except OSError as error:
            reason += f" (not written to {self.run}: {error})"
        with suppress(OSError):  # nobody may read it any more
            print(f"moe-dist: {reason}", file=sys.stderr, flush=True)
        time.sleep(2 * self.period)  # the others leave by themselves first, not by a connection that this one closes
        self._leave(dead)

    def _write_verdict(self, reason: str, dead: list[Beat]) -> bool:
        """False when there is one."""
        path = self.folder / _VERDICT
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(file, json.dumps({"reason": reason, "dead": [asdict(beat) for beat in dead]}).encode())
        except OSError:
            path.unlink(missing_ok=True)  # an empty one would keep the others from writing theirs
            raise
        finally:
            os.close(file)
        return True

    def _leave(self, dead: list[Beat]) -> None:
        for beat in dead:
            with suppress(OSError):  # it has ended meanwhile, or is another user's
                _kill_if_here(beat)
        os._exit(STALLED)

    def _beat(self, left: bool = False) -> None:
        self._number += 1
        beat = Beat(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            born=self._born,
            number=self._number,
            count=self.trail.count,
            idle=self._own.seconds,
            doing=self.trail.describe()[:120],
            left=left,
        )
        try:
            file = os.open(self._path(self.rank), os.O_WRONLY | os.O_CREAT, 0o644)
            os.pwrite(file, json.dumps(asdict(beat)).ljust(_WIDTH).encode(), 0)
            os.close(file)
        except OSError:
            pass  # a file system that fails for a moment; if it goes on, this rank is taken for one that stands still

    def _read(self, rank: int) -> Beat | None:
        try:
            return Beat(**json.loads(self._path(rank).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def _read_all(self) -> dict[int, Beat]:
        beats = {rank: self._read(rank) for rank in range(self.world)}
        return {rank: beat for rank, beat in beats.items() if beat is not None}

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def _entered(self, rank: int) -> Path:
        return self.folder / f"entered-{rank:05d}.json"


def _sentence(beat: Beat, seconds: float, dead: bool) -> str:
    how = "its process does not run" if dead else "it has left" if beat.left else "its process runs"
    return (
        f"rank {beat.rank} ({beat.host}, pid {beat.pid}) has made no progress for {seconds:g} s, {how}; "
        f"last: {beat.doing}"
    )


def _kill_if_here(beat: Beat) -> None:
    """A stopped process cannot end itself. Not where the pid belongs to another process by now."""
    if beat.host == socket.gethostname() and beat.born and _born(beat.pid) == beat.born:
        os.kill(beat.pid, signal.SIGKILL)


def _born(pid: int) -> str:
    """When the process was started, in clock ticks; empty where the system does not say, or it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
