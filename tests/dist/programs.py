"""`python -m MODULE` as ranks forked from the nurseries, for tests that start many and are not about starting.

Such a rank saves the imports of the real one, 5 to 10 seconds, and runs the same command from its first line on. Tests
that are about the way to that line, and one of each kind of run, start their processes as a user does.
"""

import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from subprocess import DEVNULL, PIPE, STDOUT
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.dist.nodes import Network, Seat
from tests.dist.nursery import move_to, nursery_of


@dataclass(frozen=True)
class Program:
    """A module that runs as `__main__`, with its arguments."""

    module: str
    arguments: tuple[str, ...]
    working_directory: str
    environment: dict[str, str]
    seat: Seat | None

    def run(self) -> None:
        move_to(self.working_directory, self.environment, self.seat)
        sys.argv = [self.module, *self.arguments]
        runpy.run_module(self.module, run_name="__main__", alter_sys=True)


class ForkedRank:
    """What `Ranks` asks of `subprocess.Popen`, for `python -m MODULE ARGUMENTS` as the rank that `env` names."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], network: Network | None = None, **streams: Any
    ) -> None:
        assert list(command[:2]) == [sys.executable, "-m"]
        assert streams == dict(stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, process_group=0)
        ours, theirs = os.pipe()
        rank = int(env["RANK"])
        seat = None if network is None else network.seats(int(env["WORLD_SIZE"]))[rank]
        self._nursery, self._code = nursery_of(rank), None
        self._nursery.begin(Program(command[2], tuple(command[3:]), os.getcwd(), dict(env), seat), theirs)
        os.close(theirs)
        self.pid, self.stdout = self._nursery.child(), os.fdopen(ours, "rb")

    def poll(self) -> int | None:
        return self._code if self._code is None and not self._nursery.connection.poll() else self.wait()

    def wait(self) -> int:
        if self._code is None:
            self._code, _ = self._nursery.ended()
        return self._code


def forked_ranks(network: Network | None = None) -> AbstractContextManager[object]:
    """Within it the ranks of `moe_dist.chaos` are forked. network: whose nodes they are on, equally many on each."""
    made = SimpleNamespace(Popen=partial(ForkedRank, network=network), DEVNULL=DEVNULL, PIPE=PIPE, STDOUT=STDOUT)
    return mock.patch("moe_dist.chaos.ranks.subprocess", made)
