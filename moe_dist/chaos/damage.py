"""Checkpoints that rot between two starts, and which ones are whole: seen from outside the run."""

import random
from pathlib import Path
from typing import Literal, get_args

from moe_dist.checkpoint.layout import MANIFEST, Manifest
from moe_dist.checkpoint.reader import Reader
from moe_dist.checkpoint.store import checkpoints

Damage = Literal["bit", "truncated", "empty", "removed", "manifest"]
DAMAGES: tuple[Damage, ...] = get_args(Damage)


def corrupt(checkpoint: Path, damage: Damage, draw: random.Random) -> str:
    """Damage one file of a checkpoint, between two starts; a sentence that says how."""
    files = sorted(path for path in checkpoint.iterdir() if (path.name == MANIFEST) is (damage == "manifest"))
    path = draw.choice(files)
    data = bytearray(path.read_bytes())
    where = draw.randrange(len(data))
    match damage:
        case "bit":
            data[where] ^= 1 << draw.randrange(8)
            how = f"one bit of byte {where} was flipped in"
        case "truncated":
            del data[where:]
            how = f"all from byte {where} on was cut off"
        case "empty":
            data.clear()
            how = "nothing was left in"
        case "manifest":
            data[where : where + 16] = draw.randbytes(16)
            how = f"16 bytes from byte {where} on were replaced by garbage in"
        case "removed":
            path.unlink()
            return f"{path} was removed"
    path.write_bytes(data)
    return f"{how} {path}"


def whole(root: Path) -> list[int]:
    """Steps of the checkpoints under `root` of which every byte is as the manifest says, oldest first. Of a run that
    stands still."""
    found = []
    for path in checkpoints(root):
        try:
            reader = Reader(path)
        except ValueError:
            continue
        if not reader.check_digests(0, 1):
            found.append(reader.manifest.step)
    return found


def any_complete(root: Path) -> bool:
    """Whether some checkpoint is there whose manifest and files are, at a moment of a run that goes on. A look may fall
    between the listing of a folder and its renaming, so that only several in a row mean that there is none."""
    return any(_complete(path) for _ in range(5) for path in reversed(checkpoints(root)))


def _complete(path: Path) -> bool:
    try:
        files = Manifest.load(path).files
        return all((path / shard.file).stat().st_size == shard.size for shard in files)
    except (OSError, ValueError):
        return False
