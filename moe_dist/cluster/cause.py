"""Why a start of a run has ended, and what to do about it: two functions of what is known, and of nothing else.

What is known, from the surest on: a signal to the supervisor itself, the run's status.json, nodes that do not answer,
exit codes of ranks as their launchers noted them, the exit code of srun.

| cause | known by | then |
|---|---|---|
| finished | status.json | stop |
| cancelled, taken back | history.jsonl; Slurm told the batch script to end | stop; Slurm queues what it took back |
| preempted, time limit, signal | the run saved and left on SIGTERM, near the limit, on SIGUSR2 or SIGINT | requeue |
| diverged, replicas differ, crash loop | 76, 78, 79 in status.json | stop: it would happen again |
| node lost | Slurm, or a step that cannot start there | restart |
| stalled | 77 in status.json | restart |
| out of memory | the reason in status.json | stop |
| mistake | a rank returned 2 | stop |
| rank died | a signal ended it that no launcher sends | restart |
| collective | the reason in status.json: a peer was lost, and nobody knows a better cause | restart |
| error | anything else | restart once; stop when it comes again without progress |

A restart stays in the allocation. It becomes a requeue where too few nodes answer or the time limit is near, and a stop
after more than `guard.max_restarts` starts in a row without progress. Light: no torch.
"""

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_dist.train.exit_codes import CRASH_LOOP, DIVERGED, FAILED, REPLICAS_DIFFER, SAVED, STALLED, USAGE

Kind = Literal[
    "finished",
    "cancelled",
    "taken back",
    "preempted",
    "time limit",
    "signal",
    "diverged",
    "replicas differ",
    "crash loop",
    "node lost",
    "stalled",
    "out of memory",
    "mistake",
    "rank died",
    "collective",
    "error",
]
MARGIN = 180.0
"""Seconds before the time limit in which no start is worth it: the signal that asks to save comes at 120."""

_ENDED = {DIVERGED: "diverged", REPLICAS_DIFFER: "replicas differ", CRASH_LOOP: "crash loop"}
_REPEATS = ("diverged", "replicas differ", "crash loop", "out of memory", "mistake")
_OF_A_PEER = ("RankLost", "DistNetworkError", "DistBackendError", "DistStoreError", "NCCL", "gloo", "ProcessGroup")
_BY_LAUNCHERS = (-signal.SIGTERM, SAVED, STALLED)  # what ranks end with when another one is the cause


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What is known of a start that has ended.

    code: of srun. status: what this start wrote into status.json, or found there and left with 0; else empty. ranks: by
    node and rank, the exit codes other than 0 that launchers noted, below 0 the signal. lost: nodes that do not answer.
    cancelled: by `moe-dist cancel`. told_to_end: the supervisor heard SIGTERM; requeued: and Slurm has put the job back
    into its queue. seconds_left: to the job's time limit, None for none.
    """

    code: int
    status: Mapping[str, Any] = field(default_factory=dict)
    ranks: Mapping[tuple[str, int], int] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    cancelled: bool = False
    told_to_end: bool = False
    requeued: bool = False
    seconds_left: float | None = None


@dataclass(frozen=True, slots=True)
class Cause:
    """kind as in the table above; detail: a line for a person. nodes: those that are to blame. code: what the job ends
    with if it ends for this. final: it does."""

    kind: Kind
    detail: str = ""
    nodes: tuple[str, ...] = ()
    code: int = FAILED
    final: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """code: of the job, where it stops. why: in a few words, where the cause alone does not say."""

    next: Literal["stop", "restart", "requeue"]
    code: int = 0
    why: str = ""


def cause_of(ended: Ended) -> Cause:
    """The surest explanation."""
    state, reason = ended.status.get("state"), " ".join(str(ended.status.get("reason", "")).split())
    code = ended.status.get("code", FAILED)
    if state == "finished":
        return Cause("finished", code=0, final=True)
    if ended.cancelled or ended.told_to_end:
        return _ended_from_outside(ended)
    if state == "preempted":
        return _saved(ended, str(ended.status.get("signal")))
    if state == "failed" and code in _ENDED:
        return Cause(_ENDED[code], reason, code=code)  # type: ignore[arg-type]
    if ended.lost:
        told = f"; {reason}" if reason else ""
        return Cause("node lost", f"{_silent(ended.lost)}{told}", ended.lost)
    if state == "failed" and code == STALLED:
        return Cause("stalled", reason, code=STALLED)
    return _of_ranks(ended, reason if state == "failed" else "")


def _ended_from_outside(ended: Ended) -> Cause:
    """By a person, or by Slurm, which then decides what is next."""
    saved = ended.status.get("state") == "preempted"
    told = f", saved at step {ended.status.get('step')}" if saved else ""
    if ended.requeued and ended.lost:
        return Cause("node lost", f"{_silent(ended.lost)}: Slurm queued the job again{told}", code=SAVED, final=True)
    if ended.requeued:
        return Cause("taken back", f"Slurm ended the job and queued it again{told}", code=SAVED, final=True)
    by = "moe-dist cancel" if ended.cancelled else "Slurm ended the job for good"
    return Cause("cancelled", f"{by}{told}", code=SAVED if saved else FAILED, final=True)


def _silent(nodes: tuple[str, ...]) -> str:
    return f"{', '.join(nodes)} {'do' if len(nodes) > 1 else 'does'} not answer"


def _saved(ended: Ended, heard: str) -> Cause:
    left = ended.seconds_left
    if heard == "SIGTERM":  # and the batch script did not hear it: so it was not scancel
        return Cause("preempted", "saved on SIGTERM: Slurm wants the nodes for another job", code=SAVED)
    if heard == "time limit" or (heard == "SIGUSR2" and left is not None and left < MARGIN):
        return Cause("time limit", f"saved on {heard}", code=SAVED)
    return Cause("signal", f"saved on {heard}, sent by hand", code=SAVED)


def _of_ranks(ended: Ended, reason: str) -> Cause:
    """Where neither Slurm nor the run itself has named a cause."""
    dead = {place: code for place, code in ended.ranks.items() if code < 0 and code not in _BY_LAUNCHERS}
    if "out of memory" in reason:
        return Cause("out of memory", reason)
    if USAGE in ended.ranks.values():
        return Cause("mistake", reason or "a rank refused to start: see above", code=USAGE)
    if dead:
        told = "; ".join(f"rank {rank} on {node} died of {_signal(code)}" for (node, rank), code in dead.items())
        return Cause("rank died", told, tuple(sorted({node for node, _ in dead})))
    if any(word in reason for word in _OF_A_PEER):
        return Cause("collective", reason)
    return Cause("error", reason or f"srun ended with {ended.code}, and no rank said why")


def decide(
    cause: Cause, *, fruitless: int, max_restarts: int | None, enough_nodes: bool, seconds_left: float | None
) -> Decision:
    """fruitless: starts in a row without progress, the one that has just ended included. enough_nodes: as many as the
    run needs answer in this allocation."""
    if cause.final:
        return Decision("stop", cause.code)
    if cause.kind in ("preempted", "time limit", "signal"):
        return Decision("requeue", cause.code)
    if cause.kind in _REPEATS:
        return Decision("stop", cause.code, "it would happen again")
    if cause.kind == "error" and fruitless > 1:
        return Decision("stop", cause.code, "it has happened again, no step further")
    if max_restarts is not None and fruitless > max_restarts:
        return Decision("stop", CRASH_LOOP, f"{fruitless} starts without progress (guard.max_restarts={max_restarts})")
    if not enough_nodes:
        return Decision("requeue", cause.code, "too few nodes of this job answer")
    if seconds_left is not None and seconds_left < MARGIN:
        return Decision("requeue", cause.code, f"{seconds_left:.0f} s are left of this job")
    return Decision("restart")


def _signal(code: int) -> str:
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"
