"""Virtual nodes of this machine with slow cables, for benchmarks that run as root (slurm/local_network.sh)."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "slurm" / "local_network.sh"


@contextmanager
def network(nodes: int, rate: str) -> Iterator[None]:
    """So many nodes, whose cables carry `rate` as tc writes it; they are gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOE_DIST_NETWORK"] = f"{folder}/network"
        subprocess.run([SCRIPT, "start", str(nodes), "--rate", rate], check=True, stdout=subprocess.DEVNULL)
        try:
            yield
        finally:
            subprocess.run([SCRIPT, "stop"], check=True, stdout=subprocess.DEVNULL)


def first_address() -> str:
    """Of node1, as the others reach it."""
    found = subprocess.run([SCRIPT, "address", "node1"], check=True, capture_output=True, encoding="utf-8")
    return found.stdout.strip()
