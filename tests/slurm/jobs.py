"""Runs that `moe-dist submit` hands to a real Slurm of some nodes, for tests of what may happen to them there."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_dist.cluster import history
from moe_dist.train.record.history import last_logged_step
from tests.slurm.conftest import ROOT, Cluster, _free_ports, _missing, wait_until

SCRIPT = str(ROOT / "slurm/local_cluster.sh")

MINUTE = 60.0


@dataclass(frozen=True)
class Runs:
    """Of one configuration, under `root`, on `count` nodes. patience: seconds that a start may take."""

    cluster: Cluster
    config: Path
    root: Path
    count: int
    patience: float

    def cli(self, *words: str | Path, refused: bool = False) -> str:
        return self.cluster.run(sys.executable, "-m", "moe_dist.cli", *words, refused=refused)

    def submit(self, name: str, *options: str, sbatch: tuple[str, ...] = ()) -> "Run":
        """options: of submit, then flags of the configuration."""
        said = self.cli(
            "submit", self.config, "--nodes", "2", *options, "--run.name", name, "--", "--overcommit", *sbatch
        )
        return Run(self, self.root / name, said.split()[1].rstrip(":"))

    def lose(self, node: str) -> None:
        self.cluster.run(SCRIPT, "lose", node)

    def come_back(self, node: str) -> None:
        self.cluster.run(SCRIPT, "return", node)

    def cable(self, node: str, state: str) -> None:
        """`down` pulls it, `up` plugs it in."""
        self.cluster.run(SCRIPT, "cable", node, state)

    def preempt(self) -> None:
        """A short job takes all nodes from what runs."""
        all_nodes = ("--partition=urgent", f"--nodes={self.count}", "--exclusive", "--ntasks-per-node=1")
        self.cluster.run("sbatch", *all_nodes, "--output=/dev/null", "--wrap", "sleep 1")


@dataclass(frozen=True)
class Run:
    runs: Runs
    folder: Path
    job: str

    @property
    def log(self) -> Path:
        return self.folder / "slurm" / f"{self.job}.out"

    def wait(self, is_so: Callable[[], bool]) -> None:
        wait_until(is_so, self.runs.patience, self.log)

    def goes_on(self, steps: int = 20) -> None:
        """Returns once it is so many steps further than it was."""
        before = last_logged_step(self.folder)
        self.wait(lambda: last_logged_step(self.folder) >= before + steps)

    def process(self, rank: int) -> int:
        return int(json.loads((self.folder / f"heartbeats/rank-{rank:05d}.json").read_text())["pid"])

    def story(self) -> list[tuple[str, str]]:
        """(cause, what came next) of each start that has ended."""
        return [(line["cause"], line["next"]) for line in history.read(self.folder) if line["event"] == "end"]

    def nodes(self) -> list[list[str]]:
        """Of each start."""
        return [line["nodes"] for line in history.read(self.folder) if line["event"] == "start"]

    def ended(self, starts: int) -> None:
        """Returns once so many have."""
        self.wait(lambda: len(self.story()) >= starts)

    def limit(self, minutes: float | None) -> None:
        """That the job may run in one go from now on, the minutes it has run included; None: as long as it likes."""
        time = "UNLIMITED" if minutes is None else str(math.ceil(minutes))
        self.runs.cluster.run("scontrol", "update", f"JobId={self.job}", f"TimeLimit={time}")

    def minutes(self) -> float:
        """That the job has run in this go."""
        hours, minutes, seconds = self.runs.cluster.details(self.job)["RunTime"].split(":")
        return int(hours) * MINUTE + int(minutes) + int(seconds) / MINUTE

    def over(self) -> dict[str, str]:
        """What Slurm says of the job, once it has ended for good."""
        return self.runs.cluster.wait_for_end(self.job, self.log, self.runs.patience)


@contextmanager
def virtual_nodes(
    folder: Path, config: str, patience: float, count: int = 3, rate: str | None = None, **variables: str
) -> Iterator[Runs]:
    """A cluster with a partition that preempts. config: text, where FOLDER stands for `folder`. rate: of the cable of
    each node; None: all nodes are this machine, without cables."""
    missing = _missing()
    if missing:
        pytest.skip(f"SLURM IS NOT TESTED: {missing}")
    home, path = folder / "cluster", folder / "a; touch canary $(touch canary).yaml"
    known = {
        "MOE_DIST_CLUSTER": str(home),
        "MOE_DIST_CLUSTER_PORT": str(_free_ports(count + 1)),
        "MOE_DIST_CLUSTER_GRACE": "120",  # where other tests use the cores too, a step can take long
        "SLURM_CONF": str(home / "slurm.conf"),
        "MOE_DIST_PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    environ = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    if rate is None:
        known["GLOO_SOCKET_IFNAME"] = "lo"
    cluster = Cluster(environ | known | variables)
    path.write_text(config.replace("FOLDER", str(folder)))
    cluster.run(SCRIPT, "start", str(count), "--preempt", *(() if rate is None else ("--rate", rate)))
    try:
        yield Runs(cluster, path, folder / "runs", count, patience)
    finally:
        cluster.run(SCRIPT, "stop")
        assert not home.exists() and not list(folder.rglob("canary")) and not (ROOT / "canary").exists()
