"""Effective training time under faults: `python benchmarks/effective_time.py`, as root, where Slurm is installed.

A run of two nodes of slurm/local_cluster.sh, handed in by `moe-dist submit`, saves every 10 steps. In every 100
step-times one of its ranks gets SIGKILL, whatever the run does at that moment; the supervisor starts it again. The same
run without faults comes first: its median step is the step-time. The line that is printed has the effective training
time ratio as `moe-dist status` has it (train/record/effective_time.py), and where the rest went. Nobody else should use
the machine meanwhile.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from race import cpu_name

from moe_dist.cluster import history
from moe_dist.cluster.queue import state_of
from moe_dist.train.record.effective_time import EffectiveTime, effective_time_of
from moe_dist.train.record.history import last_logged_step
from moe_dist.train.record.status import status_now

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "slurm" / "local_cluster.sh"
MODEL = """
--model.d-model 256 --model.num-layers 4 --model.num-heads 8 --model.num-kv-heads 2 --model.d-ff 512
--model.moe.num-experts 8 --model.moe.top-k 2 --model.moe.d-ff 512 --parallel.ep 2
--train.seq-len 256 --train.global-batch 16 --run.no-tensorboard --run.eval-sequences 4 --run.eval-every 100000
""".split()


@dataclass(frozen=True)
class Run:
    folder: Path
    job: str

    @property
    def ended(self) -> bool:
        """At its last step. Raises RuntimeError when it has ended otherwise, and its job with it."""
        state = status_now(self.folder)["state"]
        if state in ("running", "finished") or state_of(self.job) is not None:
            return state == "finished"
        if status_now(self.folder)["state"] == "finished":  # since
            return True
        raise RuntimeError((self.folder / f"slurm/{self.job}.out").read_text(encoding="utf-8", errors="replace"))

    def rank(self, number: int) -> int | None:
        """Its process, where it has one."""
        try:
            beat = json.loads((self.folder / f"heartbeats/rank-{number:05d}.json").read_text(encoding="utf-8"))
            os.kill(beat["pid"], 0)
        except (OSError, ValueError):
            return None
        return int(beat["pid"])

    def step_seconds(self) -> list[float]:
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["step_seconds"] for line in lines]

    def effective_time(self) -> EffectiveTime:
        found = effective_time_of(self.folder)
        assert found is not None, f"{self.folder} has never started"
        return found


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Two nodes that are this machine."""
    os.environ |= {
        "MOE_DIST_CLUSTER": str(folder / "cluster"),
        "SLURM_CONF": str(folder / "cluster/slurm.conf"),
        "MOE_DIST_PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    subprocess.run([CLUSTER, "start", "2"], check=True, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        subprocess.run([CLUSTER, "stop"], check=True, stdout=subprocess.DEVNULL)


def submitted(root: Path, name: str, steps: int, save_every: int) -> Run:
    root.mkdir(exist_ok=True)
    config = root / f"{name}.yaml"
    config.write_text("{}\n", encoding="utf-8")  # submit wants a file; flags say all
    flags = ["--nodes", "2", *MODEL, "--train.steps", str(steps), "--run.save-every", str(save_every)]
    flags += ["--run.root", str(root), "--run.name", name, "--device", "cpu"]
    command = [sys.executable, "-m", "moe_dist.cli", "submit", str(config), *flags, "--", "--overcommit"]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, encoding="utf-8").stdout
    return Run(root / name, said.split()[1].rstrip(":"))


def break_it(run: Run, every: float, draw: random.Random) -> None:
    """Kills a rank in each `every` seconds from the first step on, at a moment drawn evenly, until the run has ended.
    Where none lives at that moment, nothing is killed."""
    while last_logged_step(run.folder) == 0 and not run.ended:
        time.sleep(0.5)
    began, number = time.monotonic(), 0
    while not run.ended:
        _sleep_until(began + (number + draw.random()) * every, run)
        victim = run.rank(draw.randrange(2))
        if victim is not None and not run.ended:
            os.kill(victim, signal.SIGKILL)
        number += 1
        _sleep_until(began + number * every, run)


def _sleep_until(moment: float, run: Run) -> None:
    while time.monotonic() < moment and not run.ended:
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--fault-every", type=int, default=100, help="step-times")
    parser.add_argument("--save-every", type=int, default=10, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder)):
        root = Path(folder, "runs")
        calm = submitted(root, "calm", args.fault_every, args.save_every)
        while not calm.ended:
            time.sleep(1)
        step, time_of_calm = statistics.median(calm.step_seconds()), calm.effective_time()
        broken = submitted(root, "broken", args.steps, args.save_every)
        break_it(broken, args.fault_every * step, random.Random(args.seed))
        time_of_broken = broken.effective_time()
        faults = [line for line in history.read(broken.folder) if line["event"] == "end" and line["next"] == "restart"]
    print(f"{cpu_name()}, two ranks of one thread, a step of {step:.2f} s, a save every {args.save_every} steps")
    print(f"without faults, {args.fault_every} steps: {time_of_calm.describe()}")
    print(f"a fault in every {args.fault_every} step-times, {args.steps} steps: {time_of_broken.describe()}")
    for fault in faults:
        print(f"  {fault['cause']} at step {fault['step']}, saved {fault['saved']}")
    if faults:
        again = statistics.mean(fault["step"] - fault["saved"] for fault in faults)
        rest = (time_of_broken.wall - time_of_broken.queued - time_of_broken.kept) / time_of_broken.starts
        print(f"after a fault, {again:.1f} steps were trained again; the rest took {rest:.1f} s of a start")


if __name__ == "__main__":
    main()
