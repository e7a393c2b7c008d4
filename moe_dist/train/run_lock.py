"""One run in a folder at a time: a lock on a file in it, held by rank 0.

The kernel drops the lock when its holder ends, however it ends, so a file that is left over never keeps anybody out;
its text only tells who holds it. On NFS, Linux passes flock to the server, which sees all machines; after a machine
died, an NFSv4 server keeps its locks for the lease, about 90 seconds: whoever starts a run again after such a loss sets
MOE_DIST_LOCK_SECONDS, and it waits so long. A file system that knows no flock (Lustre mounted without it, for example)
is named in a warning, and then nothing keeps a second run out.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import torch.distributed as dist

from moe_dist.disk import open_locked
from moe_dist.parallel.objects import broadcast_json
from moe_dist.train.record.status import LOCK


@contextmanager
def run_lock(folder: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Holds the run folder `folder`, made if it is missing. Every rank must enter; rank 0 takes the lock and speaks.

    Raises ValueError on every rank when another process holds it, naming the process, its host and since when, or when
    the folder cannot be written to. A folder that was made for the lock alone goes with it, and so do those above it.
    """
    refusal: str | None = None
    descriptor = None
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    if dist.get_rank() == 0:
        try:
            descriptor = _take(folder, say)
        except ValueError as error:
            refusal = str(error)
        except OSError as error:
            refusal = f"{folder} cannot be written to: {error}; make it writable, or choose another --run.root"
    refusal = broadcast_json(refusal)
    if refusal is not None:
        raise ValueError(refusal)
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):  # what is left behind keeps nobody out
                _release(folder, descriptor, made)


def _take(folder: Path, say: Callable[[str], None]) -> int:
    path = folder / LOCK
    # At least a moment: `moe-dist status` may be looking.
    end = time.monotonic() + max(0.2, float(os.environ.get("MOE_DIST_LOCK_SECONDS") or 0))
    while True:
        last = time.monotonic() >= end
        descriptor, error = open_locked(path, wait=False)
        if not isinstance(error, BlockingIOError):
            break
        holder = _describe(os.pread(descriptor, 4096, 0))
        os.close(descriptor)
        if last:
            raise ValueError(f"{folder} is in use by {holder}: wait for it, stop it, or choose another --run.name")
        time.sleep(0.1)
    if error is not None:
        say(f"warning: {path} cannot be locked ({error.strerror}); nothing keeps a second run out of {folder}")
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().isoformat(" ", "seconds")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(mine).encode(), 0)
    return descriptor


def _release(folder: Path, descriptor: int, made: list[Path]) -> None:
    try:
        os.ftruncate(descriptor, 0)
        if os.listdir(folder) == [LOCK]:
            (folder / LOCK).unlink()
            for path in made:
                path.rmdir()  # not empty when somebody else has just come
    finally:
        os.close(descriptor)


def _describe(text: bytes) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # it has not yet said who it is
