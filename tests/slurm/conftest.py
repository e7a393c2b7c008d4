"""A real Slurm with two virtual nodes on this machine for the tests of this folder, or a loud skip."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.dist.nodes import Network

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "local_cluster.sh"


@dataclass(frozen=True)
class Cluster:
    """Runs commands against the cluster; `env` makes jobs use this interpreter, with one thread a rank."""

    env: dict[str, str]

    def run(self, *command: str | Path, folder: Path = ROOT, refused: bool = False) -> str:
        """What the command printed. Raises AssertionError with all it said when it fails, or when it does not but was
        to be `refused`: then the complaint is returned. folder: to run it in."""
        words = [str(word) for word in command]
        done = subprocess.run(words, cwd=folder, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == (2 if refused else 0), f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return (done.stderr if refused else done.stdout).strip()

    def submit(self, log: Path, *arguments: str | Path) -> str:
        """Queue slurm/train.sbatch and return the number of the job, which writes to `log`."""
        return self.run("sbatch", "--parsable", f"--output={log}", "slurm/train.sbatch", *arguments)

    def details(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows: JobState, Restarts, ..."""
        return dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", job).split() if "=" in word)

    def wait_for_end(self, job: str, log: Path, seconds: float) -> dict[str, str]:
        """Details of the job once it has ended and will not start again."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        wait_until(lambda: self.details(job)["JobState"] in ended, seconds, log)
        return self.details(job)


def wait_until(is_so: Callable[[], bool], seconds: float, log: Path) -> None:
    """Raises AssertionError, with the job's log, when it does not become so in time."""
    end = time.monotonic() + seconds
    while not is_so():
        said = log.read_text() if log.exists() else "nothing"
        assert time.monotonic() < end, f"not so after {seconds} s; the job said:\n{said}"
        time.sleep(0.2)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes that are this machine, so ranks meet over loopback."""
    with started(tmp_path_factory.mktemp("slurm") / "cluster", {"GLOO_SOCKET_IFNAME": "lo"}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def slow_cluster(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes with an address and a slow cable each. network: of other nodes, beside these; where there can be none,
    it skips."""
    with started(tmp_path_factory.mktemp("slurm") / "cluster", {}, "--rate", network.rate) as cluster:
        yield cluster


@contextmanager
def started(home: Path, variables: dict[str, str], *flags: str) -> Iterator[Cluster]:
    """Two nodes by slurm/local_cluster.sh, in a folder of its own, and stopped by it. variables: of its jobs."""
    missing = _missing()
    if missing:
        pytest.skip(f"SLURM IS NOT TESTED: {missing}")
    env = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"} | {
        "MOE_DIST_CLUSTER": str(home),
        "MOE_DIST_CLUSTER_PORT": str(_free_ports(3)),
        "SLURM_CONF": str(home / "slurm.conf"),
        "MOE_DIST_PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    cluster = Cluster(env | variables)
    cluster.run(SCRIPT, "start", "2", *flags)
    try:
        yield cluster
    finally:
        cluster.run(SCRIPT, "stop")
        assert not home.exists()


def _missing() -> str | None:
    if os.geteuid() != 0:
        return "only root can start slurmd"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [tool for tool in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(tool, path=path) is None]
    return f"no {' '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge" if absent else None


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody listens on, below the range of outgoing connections."""
    for first in range(17000, 32000, count):
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise RuntimeError("no free ports between 17000 and 32000")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
