"""`moe-dist train` with steps of at least SECONDS: faulty_train.py SECONDS[,RANK,STEP] ARGUMENTS.

Long enough to signal a run that has just written a step, or to stop a rank in the middle of one. With RANK and STEP,
that rank never gets its data of that step (counted from 1).
"""

import os
import sys
import time
from typing import Any

from moe_dist.cli import main
from moe_dist.data import SequenceSampler


def slow_steps(seconds: float, rank: str = "", step: str = "") -> None:
    indices = SequenceSampler.indices

    def slowly(sampler: SequenceSampler, at: int) -> Any:
        time.sleep(seconds)
        while rank == os.environ["RANK"] and at + 1 == int(step):
            time.sleep(1)
        return indices(sampler, at)

    SequenceSampler.indices = slowly  # type: ignore[method-assign]


if __name__ == "__main__":
    seconds, *hang = sys.argv[1].split(",")
    slow_steps(float(seconds), *hang)
    sys.exit(main(sys.argv[2:]))
