"""Files that outlive what may happen to whoever writes them: written as a whole, on the disk when a call returns, and
locks that end with their holders. Light: no torch.

A file is replaced by way of a draft beside it and a rename, so that a reader sees the old one or the new one. Before
that the draft is forced onto the disk, or a machine that goes down could leave an empty file under the new name.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_DRAFT = ".draft-"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` when the block ends; what was there stays until then. Several
    processes may do so in the same moment. Raises OSError, and leaves nothing behind."""
    draft = path.with_name(f"{_DRAFT}{path.name}{_own()}")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except Exception:
        draft.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """As `replacing`, with `text` in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())


def remove_drafts(folder: Path) -> None:
    """What another process left that was killed in `replacing`. While nobody else writes there."""
    for draft in folder.glob(f"{_DRAFT}*"):
        if not draft.name.endswith(_own()):
            draft.unlink(missing_ok=True)


def write_durably(path: Path, text: str) -> None:
    """`path` itself, in UTF-8, on the disk when this returns: for a folder that nobody knows yet."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush(folder: Path) -> None:
    """What `folder` lists is on disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lines_backwards(path: Path, block: int = 1 << 16) -> Iterator[tuple[int, bytes]]:
    """(first byte, line without its newline) of a file, the last line first; nothing of one that is missing.

    Reads as much as is asked for, so the end of a large file costs what the end of a small one does.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        start, kept = file.seek(0, os.SEEK_END), b""  # kept: bytes from `start` on, of lines that are not yet told
        last = True
        while start > 0:
            size = min(block, start)
            start = file.seek(start - size)
            kept = file.read(size) + kept
            if last:
                kept, last = kept.removesuffix(b"\n"), False
            first, *whole = kept.split(b"\n")  # where `first` begins is in the next block
            at = start + len(kept)
            for line in reversed(whole):
                at -= len(line)
                yield at, line
                at -= 1
            kept = first
        if not last:
            yield 0, kept


def open_locked(path: Path, wait: bool) -> tuple[int, OSError | None]:
    """(descriptor of the file `path`, made if it is missing; None where it is locked, else why not).

    BlockingIOError: another process holds it. Any other error: the file system knows no locks. The lock is held until
    the last process that inherits the descriptor has closed it, or has ended, however it ended. A link is not followed.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            return descriptor, error
        if _same_file(descriptor, path):
            return descriptor, None
        os.close(descriptor)  # its holder removed it between our open and our flock


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[int | None]:
    """Holds the lock file `path`; yields its descriptor, or None when another process holds it and `wait` is false."""
    descriptor, error = open_locked(path, wait)
    try:
        if error is not None and not isinstance(error, BlockingIOError):
            raise error
        yield None if error is not None else descriptor
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool | None:
    """Whether a process holds the lock file `path`, without waiting and without making it; None where that cannot be
    told. Whoever tries to take the lock in the same moment must try again."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def _own() -> str:
    return f"-{os.uname().nodename}-{os.getpid()}"


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
