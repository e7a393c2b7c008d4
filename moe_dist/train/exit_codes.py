"""What the exit code of `moe-dist train` means, in one place. Light: no torch.

torchrun passes none of these on (it returns 1), so the code of a run that failed is in its status.json too.
"""

import os

DONE = 0
"""The run has reached its last step, or had before."""
FAILED = 1
"""Anything without a code of its own; the reason is in status.json."""
USAGE = 2
"""What the user got wrong, told before anything starts."""
SAVED = os.EX_TEMPFAIL
"""75, "try again later" of sysexits.h: a signal or the time limit came, the run saved and left. With --resume
the same command goes on."""
DIVERGED = 76
"""Too many steps in a row could not be applied, or the loss went off, also after going back to a checkpoint."""
STALLED = 77
"""Some rank made no progress for guard.stall_seconds."""
REPLICAS_DIFFER = 78
"""Copies of a parameter that must be equal are not: a flipped bit, or an error of ours."""
CRASH_LOOP = 79
"""Started more than guard.max_restarts times in a row without a new checkpoint, or a step further than before."""
INTERRUPTED = 130
"""A second Ctrl-C: nothing was saved."""


class EndRun(RuntimeError):
    """Ends a run for a reason that has a code. Raised on every rank, at the same point."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
