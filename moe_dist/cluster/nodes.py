"""What Slurm says of a job and its nodes, and which of them a start of the run gets. Light: no torch."""

import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from moe_dist.parallel.slurm import ask, hosts

_BROKEN = ("down", "fail", "error", "power", "not_resp", "unk", "reboot")
_ATTEMPTS, _PAUSE = 5, 4.0  # of asking a controller that may just be restarting; seconds, doubled each time
_AT_ONCE, _PROBE_SECONDS = 32, 60.0


@dataclass(frozen=True, slots=True)
class Job:
    """nodes: those that Slurm still counts to it, and batch the one where its script runs. seconds_left: to its time
    limit, None for none."""

    nodes: tuple[str, ...]
    batch: str
    seconds_left: float | None


def job_now(number: str) -> Job:
    """Raises ValueError when Slurm does not say."""
    words = _patiently(lambda: ask("squeue", "--noheader", f"--jobs={number}", "--format=%B %L %N")).split()
    if len(words) != 3:
        raise ValueError(f"squeue does not say where job {number} runs: {' '.join(words) or 'nothing'}")
    return Job(tuple(hosts(words[2])), words[0], seconds_of(words[1]))


def requeues(number: str) -> int:
    """How often the job was put back into the queue. Raises ValueError when Slurm does not say."""
    said = ask("squeue", "--noheader", "--states=all", f"--jobs={number}", "--Format=RestartCnt:20").strip()
    if not said.isdigit():
        raise ValueError(f"squeue does not say how often job {number} was queued: {said or 'nothing'}")
    return int(said)


def seconds_of(text: str) -> float | None:
    """A time as squeue shows what is left of one; None where there is no limit.

    >>> seconds_of("1-02:03:04"), seconds_of("5:00"), seconds_of("UNLIMITED")
    (93784.0, 300.0, None)
    """
    found = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None if text in ("UNLIMITED", "NOT_SET") else 0.0  # INVALID: it is over
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def states(nodes: Sequence[str]) -> dict[str, str]:
    """What Slurm calls them: mixed, allocated, down*, draining, ... Raises ValueError when it does not say."""
    said = ask("sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N %T")
    return dict(line.split(maxsplit=1) for line in said.splitlines() if line.strip())


def is_gone(state: str) -> bool:
    """Of a node that is broken, or that has stopped to answer Slurm."""
    return state.startswith(_BROKEN) or state.rstrip().endswith("*")


def silent(nodes: Sequence[str]) -> list[str]:
    """Those of `nodes` where no step of this job can be started: Slurm takes minutes to notice one that is gone."""

    def answers(node: str) -> bool:
        probe = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={node}", "true"]
        try:
            done = subprocess.run(
                probe, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return [node for node, well in zip(nodes, pool.map(answers, nodes), strict=True) if not well]


def chosen(nodes: Sequence[str], count: int, blamed: Mapping[str, int]) -> tuple[str, ...]:
    """`count` of `nodes`, those that were to blame least often, in the order of `nodes`; all where there are fewer.

    >>> chosen(["a", "b", "c"], 2, {"a": 1})
    ('b', 'c')
    """
    best = sorted(nodes, key=lambda node: blamed.get(node, 0))[:count]
    return tuple(node for node in nodes if node in best)


def _patiently(question: Callable[[], str]) -> str:
    """Raises ValueError when there is no answer in about two minutes."""
    for attempt in range(_ATTEMPTS):
        try:
            return question()
        except ValueError:
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(_PAUSE * 2**attempt)
    raise AssertionError("the last attempt returns or raises")
