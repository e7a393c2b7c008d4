"""torchrun that says in a line which rank died of what, and opens nothing to the network for ranks of one machine.

    python -m moe_dist.parallel.torchrun --nproc_per_node 2 -m moe_dist.cli train CONFIG

Takes the flags of torchrun, but for those of the rendezvous; where machines and ranks meet is in nodes.py.

MOE_DIST_ENDS names a folder where each machine notes the exit codes of its ranks that ended badly, NAME.json, for
whoever started it there (`moe_dist/cluster/supervise.py`): what srun returns is one code for all machines.
"""

import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from moe_dist.disk import replace_text
from moe_dist.process import EarlySignals, output_never_fatal

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import ProcessFailure

_SAVED = os.EX_TEMPFAIL  # train/exit_codes.py


def main(args: Sequence[str]) -> int:
    """Returns the exit code when all ranks have ended: 0, 2 for a mistake, or as torchrun 1 for what they returned."""
    with EarlySignals(leave=True):  # until torchrun has handlers of its own there is nobody to pass a signal on to
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        from moe_dist.parallel.nodes import launch

    # What they say of ranks and signals is what is said here, in more words.
    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        launch(args)
    except ValueError as error:
        print(f"moe-dist: {error}", file=sys.stderr, flush=True)
        return 2
    except ChildFailedError as error:
        _note(error.failures)
        print("\n".join(described(error.failures)), file=sys.stderr, flush=True)
        return 1
    except SignalException as error:
        print(f"moe-dist: {signal.Signals(error.sigval).name}, passed on to all ranks", file=sys.stderr, flush=True)
        return 1
    return 0


def _note(failures: dict[int, "ProcessFailure"]) -> None:
    if folder := os.environ.get("MOE_DIST_ENDS"):
        name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        codes = {rank: failure.exitcode for rank, failure in failures.items()}
        with suppress(OSError):  # what it prints says it too
            replace_text(Path(folder) / f"{name}.json", json.dumps(codes))


def described(failures: dict[int, "ProcessFailure"]) -> list[str]:
    """A line for each end that ranks of this machine came to, the likeliest cause of the others first.

    failures: of torchrun, by rank. It ends all other ranks when one has ended badly, and lists those too.
    """
    ends: dict[int, list[int]] = {}
    for rank, failure in sorted(failures.items()):
        ends.setdefault(failure.exitcode, []).append(rank)
    if len(ends) > 1:
        ends.pop(-signal.SIGTERM, None)  # ended by the launcher, or by whoever ended it
    order = sorted(ends, key=lambda code: (code >= 0, code == _SAVED))  # who was killed takes the others with it
    return [
        f"moe-dist: rank{'s' if len(ends[code]) > 1 else ''} {', '.join(map(str, ends[code]))} "
        f"on {socket.gethostname()} {_end(code)}"
        for code in order
    ]


def _end(code: int) -> str:
    if code == _SAVED:
        return f"saved and stopped (exit code {code}): run it again to go on"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    hint = ": by the system for want of memory, or by hand" if -code == signal.SIGKILL else ""
    return f"died of signal {-code} ({name}){hint}"


if __name__ == "__main__":
    with output_never_fatal():
        code = main(sys.argv[1:])
    sys.exit(code)
