"""`moe-dist train`, but rank 0 is killed as soon as it has logged a step: killed_train.py STEP ARGUMENTS."""

import os
import signal
import sys
from typing import Any

from moe_dist.cli import main
from moe_dist.train.metrics import MetricsWriter


def kill_after(last_step: int) -> None:
    log = MetricsWriter.log

    def log_and_die(writer: MetricsWriter, record: dict[str, Any]) -> None:
        log(writer, record)
        if record["step"] == last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsWriter.log = log_and_die


if __name__ == "__main__":
    kill_after(int(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
