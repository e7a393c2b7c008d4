"""On another node than the batch script of a job: requeues the job when Slurm has taken the script's node from it.

A job submitted with --no-kill outlives the loss of any node, also of that one; without its script it would hold the
others until its time limit. It watches from a second or two after a start on. Light: no torch.
"""

import signal
import sys
import time
from contextlib import suppress

from moe_dist.cluster.nodes import job_now
from moe_dist.parallel.slurm import ask

_EVERY = 20.0  # seconds


def keep(job: str, every: float = _EVERY) -> None:
    """Returns when it has put the job back into the queue, which ends this process too."""
    while True:
        time.sleep(every)
        with suppress(ValueError):  # Slurm is asked again later
            now = job_now(job)
            if now.batch not in now.nodes:
                print(f"moe-dist: {now.batch}, where job {job} ran its script, is lost: queued again", flush=True)
                ask("scontrol", "requeue", job)
                return


if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # it is for the ranks, and all steps of a job get it
    keep(sys.argv[1])
