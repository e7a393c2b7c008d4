"""torchrun that says in a line which rank died of what, and opens nothing to the network for ranks of one machine.

    python -m moe_dist.parallel.torchrun --nproc_per_node 2 -m moe_dist.cli train CONFIG

Takes the flags of torchrun; on one machine all but those of the rendezvous. `torchrun --standalone` keeps two stores
that listen on every interface, and whoever reaches them can write what ranks read. Here the launcher meets itself in a
file, and the ranks meet at a port of the loopback interface, which rank 0 opens (`launch.py`). With `--nnodes` they
meet as those of torchrun do.
"""

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_dist.process import EarlySignals, output_never_fatal

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import ProcessFailure

_SAVED = os.EX_TEMPFAIL  # train/exit_codes.py


def main(args: Sequence[str]) -> int:
    """Returns the exit code when all ranks have ended: 0, or as torchrun 1 for whatever they returned."""
    with EarlySignals(leave=True):  # until torchrun has handlers of its own there is nobody to pass a signal on to
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # What they say of ranks and signals is what is said here, in more words.
    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="moe_dist-") as folder:
        try:
            run.run(run.parse_args([*_meeting(args, folder), *args]))
        except ChildFailedError as error:
            print("\n".join(described(error.failures)), file=sys.stderr, flush=True)
            return 1
        except SignalException as error:
            print(f"moe-dist: {signal.Signals(error.sigval).name}, passed on to all ranks", file=sys.stderr, flush=True)
            return 1
    return 0


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


def _meeting(args: Sequence[str], folder: str) -> list[str]:
    """Where launchers and ranks meet, if the caller does not say that there are several machines."""
    if any(arg.partition("=")[0] in ("--nnodes", "--nnode") for arg in _own(args)):
        return []
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # the launcher opens no store for the ranks
    meet = ["--nnodes", "1", "--local_addr", "127.0.0.1", "--rdzv_backend", "c10d"]
    return [*meet, "--rdzv_endpoint", os.path.join(folder, "rendezvous"), "--rdzv_conf", "store_type=file"]


def _own(args: Sequence[str]) -> Sequence[str]:
    """The launcher's flags, which end where the ranks' program begins."""
    return args[: args.index("-m")] if "-m" in args else args


if __name__ == "__main__":
    with output_never_fatal():
        code = main(sys.argv[1:])
    sys.exit(code)
