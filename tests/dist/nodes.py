"""Virtual nodes of slurm/local_network.sh for tests: ranks that live on different hosts and meet over cables.

A rank that a nursery has forked takes its seat before it does anything else, so such ranks start as fast as others.
"""

import ctypes
import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "local_network.sh"
NEW_HOST_NAME, NEW_NETWORK = 0x04000000, 0x40000000  # CLONE_NEWUTS, CLONE_NEWNET of <sched.h>
CANNOT = 3  # the script's exit code
PORT = "29500"  # each network has all of its own


class CannotError(Exception):
    """This machine lets nobody make networks; the message says why."""


@dataclass(frozen=True)
class Seat:
    """Where a rank runs: a node by its name, the namespace of its network, and what torchrun would set there."""

    node: str
    namespace: str
    variables: dict[str, str]

    def take(self) -> None:
        """From here on this process, which must have no other thread, is on that node. Raises OSError."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.namespace}") as namespace:
            if libc.setns(namespace.fileno(), NEW_NETWORK) or libc.unshare(NEW_HOST_NAME):
                raise OSError(ctypes.get_errno(), f"cannot move to {self.node}")
        socket.sethostname(self.node)
        os.environ.update(self.variables)


class Network:
    """Nodes node1, node2, ...; within `with`, afterwards nothing is left of them. folder: not there yet. rate: what
    each cable carries, `100mbit` or `none`. Entering raises CannotError."""

    def __init__(self, folder: Path, nodes: int, rate: str) -> None:
        self.folder, self.rate = folder, rate
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]

    def __enter__(self) -> Self:
        self.do("start", str(len(self.nodes)), "--rate", self.rate)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.do("stop")

    def do(self, *words: str, refused: bool = False) -> str:
        """What the script printed. Raises AssertionError with all that it said when it fails, or when it does not but
        was to be `refused`: then the complaint is returned."""
        done = subprocess.run(self.command(*words), capture_output=True, text=True, check=False)
        if done.returncode == CANNOT:
            raise CannotError(done.stderr.strip())
        assert done.returncode == (1 if refused else 0), f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return (done.stderr if refused else done.stdout).strip()

    def command(self, *words: str) -> list[str]:
        return ["env", f"MOE_DIST_NETWORK={self.folder}", str(SCRIPT), *words]

    def heal(self) -> None:
        """Every cable plugged in, at the rate of the beginning."""
        self.do("rate", self.rate)
        for node in self.nodes:
            self.do("cable", node, "up")

    def seats(self, ranks: int) -> list[Seat]:
        """Equally many ranks on each node, neighbours together."""
        each = ranks // len(self.nodes)
        assert each * len(self.nodes) == ranks, f"{ranks} ranks on {len(self.nodes)} nodes"
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(each), "GLOO_SOCKET_IFNAME": "eth0"}
        shared |= {"MASTER_ADDR": self.do("address", self.nodes[0]), "MASTER_PORT": PORT}
        spaces = [self.do("space", node) for node in self.nodes]
        return [
            Seat(
                self.nodes[rank // each],
                spaces[rank // each],
                shared | {"RANK": str(rank), "LOCAL_RANK": str(rank % each)},
            )
            for rank in range(ranks)
        ]
