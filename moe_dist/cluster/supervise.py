"""What a training job does in place of its batch script: starts the ranks, and starts them again after a fault.

    python -m moe_dist.cluster.supervise [--ranks-per-node R] [--spare-nodes S] [--srun=OPTION ...] [--within=WORD ...]
        CONFIG [FLAGS]

slurm/train.sbatch becomes this program. It runs one torchrun a node by srun, on all nodes of the job but S; when srun
ends, it asks Slurm, the run's folder and the launchers why (`cause.py`), writes that into history.jsonl, and starts
again on the nodes that were to blame least, puts the job back into the queue, or ends it. It trains nothing and imports
no torch: it outlives what happens to ranks.

A job with spare nodes is one that Slurm does not end when it loses a node (--no-kill), not even the one where this
program runs. There a step on another node watches for that, and requeues the job (`keeper.py`).
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from moe_dist.cluster import history
from moe_dist.cluster.allocation import Allocation
from moe_dist.cluster.cause import Decision, Ended, cause_of, decide
from moe_dist.cluster.nodes import chosen, is_gone, job_now, requeues, silent, states
from moe_dist.cluster.queue import state_of
from moe_dist.config import Config
from moe_dist.config.flags import Parser
from moe_dist.parallel.slurm import ask
from moe_dist.process import output_never_fatal
from moe_dist.train.arguments import run_arguments
from moe_dist.train.exit_codes import FAILED, SAVED, USAGE
from moe_dist.train.record.status import FILE as STATUS
from moe_dist.train.record.status import read_status

_ROOT = Path(__file__).parents[2]
_LOCK_SECONDS = 120  # longer than an NFS server keeps the lock of a node that is lost


@dataclass(slots=True)
class Supervisor:
    """One job of a run. srun, within: options of srun, and words that precede what each node runs, of the site. train:
    what follows `moe-dist train`."""

    allocation: Allocation
    config: Config
    train: Sequence[str]
    srun: Sequence[str] = ()
    within: Sequence[str] = ()
    blamed: Counter[str] = field(default_factory=Counter)
    told_to_end: bool = False
    running: subprocess.Popen[bytes] | None = None
    keeper: subprocess.Popen[bytes] | None = None

    @property
    def folder(self) -> Path:
        return self.config.run.folder.absolute()

    def run(self) -> int:
        """Returns the exit code of the job."""
        signal.signal(signal.SIGTERM, self._hear)
        signal.signal(signal.SIGUSR2, self._pass_on)
        self._tell_how_the_last_one_ended()
        nodes = chosen(self.allocation.nodelist, self.allocation.nodes, self.blamed)
        try:
            while True:
                decision, nodes = self._start(nodes)
                if decision.next != "restart":
                    break
        finally:
            if self.keeper is not None:
                self.keeper.terminate()
        return self._requeue(decision) if decision.next == "requeue" else decision.code

    def _start(self, nodes: tuple[str, ...]) -> tuple[Decision, tuple[str, ...]]:
        """Trains on `nodes` until that ends. What is next, and on which nodes."""
        number = history.starts(history.read(self.folder)) + 1
        shutil.rmtree(self._ends, ignore_errors=True)
        self._ends.mkdir(parents=True)
        job = {"job": self.allocation.job, "requeued": self.allocation.restarts}
        history.append(self.folder, "start", start=number, **job, nodes=nodes, **history.reached(self.folder))
        place = f"{len(nodes)} nodes x {self.allocation.ranks} ranks"
        _say(f"job {self.allocation.job}, start {number}, {place} ({','.join(nodes)})")
        before = self._written()
        self._keep(nodes)
        self.running = subprocess.Popen(self.command(nodes), env=self.environ(nodes, number), stdin=subprocess.DEVNULL)
        code = self.running.wait()
        self.running = None

        ended, left = self._look(nodes, code, before)
        cause = cause_of(ended)
        self.blamed.update(cause.nodes)
        reached = history.reached(self.folder)
        lines = history.read(self.folder)
        decision = decide(
            cause,
            fruitless=history.fruitless([*lines, {"event": "end", **reached}]),
            max_restarts=self.config.guard.max_restarts,
            enough_nodes=len(left) >= self.allocation.nodes,
            seconds_left=ended.seconds_left,
        )
        then = "requeue" if ended.requeued else decision.next  # by Slurm itself
        told = {"cause": cause.kind, "detail": cause.detail, **reached, "next": then}
        told |= {"why": decision.why} if decision.why else {}
        history.append(self.folder, "end", start=number, job=self.allocation.job, nodes=nodes, **told)
        detail = f": {cause.detail}" if cause.detail else ""
        why = f": {decision.why}" if decision.why else ""
        _say(f"job {self.allocation.job}, start {number} ended at step {reached['step']}, {cause.kind}{detail}")
        if decision.why or decision.next != "stop":
            _say(f"job {self.allocation.job}: {decision.next}{why}")
        return decision, chosen(left, self.allocation.nodes, self.blamed)

    def command(self, nodes: Sequence[str]) -> list[str]:
        """srun, with one torchrun a node, which has all that the job has there.

        --overlap: what a lost node still holds of the last step keeps no new one waiting. --export=ALL: after `sbatch
        --export=NONE` the tasks would lack what `environ` adds, and PATH. Options of the site come later, and win.
        """
        count, launcher = len(nodes), ["bash", str(_ROOT / "launch/torchrun.sh"), str(self.allocation.ranks)]
        step = [f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", f"--nodelist={','.join(nodes)}"]
        own = ["srun", "--export=ALL", "--overlap", *step, "--kill-on-bad-exit=1"]
        return [*own, *self.srun, *self.within, *launcher, *self.train, "--resume", "auto"]

    def environ(self, nodes: Sequence[str], start: int) -> dict[str, str]:
        """Of the step. srun does not take the CPUs of a task from the job, and here one task has those of all."""
        asked, environ = self.allocation, dict(os.environ)
        if asked.cpus is not None or asked.tasks > 1:
            environ["SRUN_CPUS_PER_TASK"] = str(asked.tasks * (asked.cpus or 1))
        environ["NNODES"] = str(len(nodes))
        environ["MOE_DIST_LOCK_SECONDS"] = str(_LOCK_SECONDS)
        environ["MOE_DIST_ENDS"] = str(self._ends)
        logs = self.folder / "logs" / f"start-{start:03d}"
        logs.mkdir(parents=True, exist_ok=True)
        environ["MOE_DIST_RANK_LOGS"] = str(logs)
        return environ

    @property
    def _ends(self) -> Path:
        """Where launchers note how their ranks ended."""
        return self.folder / "ends"

    def _look(self, nodes: Sequence[str], code: int, before: int | None) -> tuple[Ended, list[str]]:
        """What is known of the start on `nodes` that srun left with `code`, and all nodes that answer. before: when
        status.json had been written."""
        status: Mapping[str, Any] = {}
        with suppress(ValueError):
            if code == 0 or self._written() != before:
                status = read_status(self.folder)
        if self._is_ending():
            return self._ended_by_slurm(nodes, code, status), []
        if status.get("state") == "finished" or history.is_cancelled(history.read(self.folder)):
            return Ended(code=code, status=status, cancelled=True), []
        try:
            job = job_now(self.allocation.job)
            named = states(self.allocation.nodelist)
        except ValueError as error:
            _say(f"Slurm does not answer ({error}): all nodes are taken to be there")
            return Ended(code=code, status=status, ranks=self._ranks()), list(self.allocation.nodelist)
        gone = [node for node in self.allocation.nodelist if node not in job.nodes or is_gone(named.get(node, ""))]
        there = [node for node in self.allocation.nodelist if node not in gone]
        gone += silent(there) if status.get("state") != "preempted" else []
        if self._is_ending():  # since: Slurm lets no step of the job start any more
            return self._ended_by_slurm(nodes, code, status), []
        lost = tuple(node for node in nodes if node in gone)
        self.blamed.update(node for node in there if named.get(node, "").startswith("drain"))  # somebody doubts it
        return (
            Ended(code=code, status=status, ranks=self._ranks(), lost=lost, seconds_left=job.seconds_left),
            [node for node in there if node not in gone],
        )

    def _ended_by_slurm(self, nodes: Sequence[str], code: int, status: Mapping[str, Any]) -> Ended:
        """Which kills this process soon, so nothing is asked twice."""
        again, gone = False, list[str]()
        with suppress(ValueError):
            again = requeues(self.allocation.job) > self.allocation.restarts
            gone = [node for node, state in states(nodes).items() if is_gone(state)]
        return Ended(code=code, status=status, lost=tuple(gone), told_to_end=True, requeued=again)

    def _ranks(self) -> dict[tuple[str, int], int]:
        """Exit codes of ranks, by node and rank, as launchers noted them."""
        found = {}
        for path in sorted(self._ends.glob("*.json")):
            with suppress(OSError, ValueError):
                for rank, code in json.loads(path.read_text(encoding="utf-8")).items():
                    found[path.stem, int(rank)] = int(code)
        return found

    def _written(self) -> int | None:
        try:
            return (self.folder / STATUS).stat().st_mtime_ns
        except OSError:
            return None

    def _tell_how_the_last_one_ended(self) -> None:
        """Where its supervisor could not: its node was lost, or it was killed at once. Raises ValueError while it goes
        on, in another job."""
        lines = history.read(self.folder)
        start = history.unfinished(lines)
        if start is None:
            return
        if start["job"] != self.allocation.job and state_of(start["job"]) == "RUNNING":
            raise ValueError(f"{self.folder} is in use by job {start['job']}, which runs: wait for it, or cancel it")
        if start["job"] == self.allocation.job:  # and Slurm has queued it again
            told = {"cause": "node lost", "detail": "that of the job's script, or Slurm killed the job at once"}
            with suppress(ValueError):
                gone = [node for node, state in states(start["nodes"]).items() if is_gone(state)]
                told["detail"] = f"{', '.join(gone)}: Slurm killed the job at once" if gone else told["detail"]
        else:
            told = {"cause": "cancelled", "detail": "the job was killed before it could say why"}
        told["time"] = history.stamp(history.last_sign_of_life(self.folder))
        names = {name: start[name] for name in ("start", "job", "nodes")}
        reached = history.reached(self.folder)
        history.append(self.folder, "end", **names, **told, **reached, next="requeue")

    def _keep(self, nodes: Sequence[str]) -> None:
        """Have another node watch over this one, where Slurm would not notice that the job has lost its head."""
        if not self.allocation.spare or (self.keeper is not None and self.keeper.poll() is None):
            return
        own = os.environ.get("SLURMD_NODENAME", self.allocation.nodelist[0])
        others = [node for node in reversed(self.allocation.nodelist) if node != own and not self.blamed[node]]
        if others:
            step = ["--quiet", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={others[0]}"]
            watch = [sys.executable, "-m", "moe_dist.cluster.keeper", self.allocation.job]
            self.keeper = subprocess.Popen(["srun", "--export=ALL", *step, *watch], stdin=subprocess.DEVNULL)

    def _requeue(self, decision: Decision) -> int:
        """Slurm ends this process when it has put the job back into the queue."""
        try:
            ask("scontrol", "requeue", self.allocation.job)
        except ValueError as error:
            _say(f"job {self.allocation.job} is not queued again: {error}")
            return decision.code or FAILED
        return SAVED

    def _is_ending(self) -> bool:
        """Which may have changed since it was last asked."""
        return self.told_to_end

    def _hear(self, number: int, frame: FrameType | None) -> None:
        """Slurm ends the job: ranks have heard it too, and save."""
        self.told_to_end = True

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """From `sbatch --signal=B:USR2`, which reaches this process alone: srun passes it on to the ranks."""
        if self.running is not None:
            self.running.send_signal(number)


def main(args: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Returns the exit code of the job: 0 finished, 2 a mistake, others: train/exit_codes.py."""
    try:
        own = _parser().parse_args(list(args))
        _, config = run_arguments("train", list(own.train), "")
        allocation = Allocation.of(environ, own.ranks_per_node, own.spare_nodes)
        return Supervisor(allocation, config, own.train, own.srun, own.within).run()
    except (ValueError, OSError) as error:  # without a history nobody could tell when to stop
        print(f"moe-dist: {error}", file=sys.stderr)
        return USAGE if isinstance(error, ValueError) else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = Parser("moe_dist.cluster.supervise")
    parser.add_argument("--ranks-per-node", type=int)
    parser.add_argument("--spare-nodes", type=int, default=0)
    parser.add_argument("--srun", action="append", default=[], metavar="OPTION")
    parser.add_argument("--within", action="append", default=[], metavar="WORD")
    parser.add_argument("train", nargs=argparse.REMAINDER)
    return parser


def _say(line: str) -> None:
    print(f"moe-dist: {line}", flush=True)


if __name__ == "__main__":
    with output_never_fatal():
        code = main(sys.argv[1:])
    sys.exit(code)
