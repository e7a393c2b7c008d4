"""A program: two processes add up a number over gloo on this machine, as ranks of a run would. Prints the seconds.

torch is imported once, and the second process forked before anything has started a thread.
"""

import os
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def main(seconds: float) -> int:
    """Returns the exit code: 0 when both saw the sum."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # as parallel/launch.py has it on one machine
    with tempfile.TemporaryDirectory(prefix="moe_dist-") as folder:
        other, began = os.fork(), time.monotonic()
        rank = 0 if other else 1
        total = added(rank, Path(folder) / "store", seconds)
        if not other:
            os._exit(0 if total == 3 else 1)
        _, status = os.waitpid(other, 0)
    print(f"{time.monotonic() - began:.2f}")
    return 0 if total == 3 and status == 0 else 1


def added(rank: int, store: Path, seconds: float) -> float:
    """1 + 2."""
    meeting = dist.FileStore(str(store), 2)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=seconds))
    number = torch.tensor([rank + 1.0])
    dist.all_reduce(number)
    dist.barrier()
    dist.destroy_process_group()
    return float(number)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
