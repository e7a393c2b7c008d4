"""What follows `moe-dist doctor`. Light: its help comes without torch."""

import argparse
from collections.abc import Sequence

from moe_dist.config.flags import Parser

_ABOUT = """Say what is on this machine and whether training can run here: fit to paste into an issue.

Versions, backends and why some cannot run, GPUs, processor, memory, disks, shared memory, Slurm, network, variables of
the environment (those that could hold secrets masked), and an all-reduce of two processes. Needs no network; what gives
no answer in time is told so.

Exit codes: 0 training can run here; 1 something that it needs is broken, and what to do about it is said.
"""


def doctor_arguments(args: Sequence[str]) -> argparse.Namespace:
    parser = Parser("moe-dist doctor", _ABOUT)
    parser.add_argument("--json", action="store_true", help="print all of it as JSON, for programs")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="that a check may take")
    own = parser.parse_args(list(args))
    if not 0 < own.seconds < 1e6:
        raise ValueError(f"command line: --seconds {own.seconds:g} is not above 0 and below 1000000")
    return own
