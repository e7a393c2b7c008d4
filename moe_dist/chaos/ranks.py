"""The ranks of one start on this machine, as torchrun would start them, and what became of them.

Like a launcher it ends the others when one has failed, but only after a while: until then they are to end themselves.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import moe_dist

_POLL, _SAMPLE = 0.02, 0.25  # seconds
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Usage:
    """Of one process, at a moment: seconds of `time.time`, resident bytes, open files."""

    time: float
    memory: int
    files: int


@dataclass
class End:
    """How a rank ended. code: minus the signal where one killed it. time: of `time.time`. killed: it had to be, by us,
    for it did not end itself."""

    code: int
    time: float
    killed: bool
    usage: list[Usage] = field(default_factory=list)


class Ranks:
    """`python -m MODULE ARGUMENTS` on `world` new processes that can form a process group over loopback. What they
    print goes to `log`. Within `with`: afterwards none is left.
    """

    def __init__(self, arguments: Sequence[str], world: int, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        # The code that runs here, not another that may be installed.
        paths = [str(Path(moe_dist.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        shared |= {"MASTER_PORT": str(port), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.began, self.log = time.time(), log
        self._file = log.open("ab", buffering=0)
        # Groups of their own: Ctrl-C reaches us alone. Pipes: a rank that cannot grow a file can still say so.
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ends: list[End | None] = [None] * world
        self._usage: list[list[Usage]] = [[] for _ in range(world)]
        self._sampled, self._readers = 0.0, list[threading.Thread]()
        try:
            for rank in range(world):
                process = subprocess.Popen(
                    [sys.executable, "-m", *arguments],
                    env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                )
                self.processes.append(process)
                self._readers.append(threading.Thread(target=self._copy, args=(rank, process.stdout), daemon=True))
                self._readers[-1].start()
        except BaseException:  # Ctrl-C between two of them
            self.kill()
            raise

    def wait(self, seconds: float, grace: Callable[[], float], watch: Callable[[], object] = lambda: None) -> list[End]:
        """Until all have ended. grace: seconds that others may go on after one ended badly; whoever is left then, or
        after `seconds`, is killed. watch: called about 50 times a second."""
        deadline, failed = time.monotonic() + seconds, None
        while self.poll():
            watch()
            if failed is None and any(end is not None and end.code for end in self.ends):
                failed = time.monotonic()
            if time.monotonic() > min(deadline, failed + grace() if failed is not None else deadline):
                self.kill()
            time.sleep(_POLL)
        for reader in self._readers:
            reader.join()
        return [end for end in self.ends if end is not None]

    def poll(self) -> bool:
        """Look at each once; whether any still runs."""
        sample = time.monotonic() - self._sampled >= _SAMPLE
        if sample:
            self._sampled = time.monotonic()
        for rank, process in enumerate(self.processes):
            if self.ends[rank] is not None:
                continue
            if (code := process.poll()) is not None:
                self._ended(rank, code, killed=False)
            elif sample and (usage := _usage(process.pid)) is not None:
                self._usage[rank].append(usage)
        return None in self.ends

    def kill(self) -> None:
        """All that still run."""
        for rank, process in enumerate(self.processes):
            if self.ends[rank] is None:
                code = process.poll()
                if code is None:
                    os.killpg(process.pid, signal.SIGKILL)  # and what it may have started
                    process.wait()
                self._ended(rank, -signal.SIGKILL if code is None else code, killed=code is None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()
        for reader in self._readers:
            reader.join()
        self._file.close()

    def _ended(self, rank: int, code: int, killed: bool) -> None:
        self.ends[rank] = End(code, time.time(), killed, self._usage[rank])

    def _copy(self, rank: int, pipe: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                self._file.write(b"[%d] " % rank + line)


def _usage(pid: int) -> Usage | None:
    """None when the process has just ended."""
    with suppress(OSError, IndexError, ValueError):
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
        return Usage(time.time(), pages * _PAGE, len(os.listdir(f"/proc/{pid}/fd")))
    return None
