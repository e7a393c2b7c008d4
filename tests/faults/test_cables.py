"""Ranks on two hosts whose cable is pulled: for a moment, which costs that moment, and for good, which ends the run."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_dist.chaos.judge import losses
from moe_dist.train.exit_codes import STALLED
from moe_dist.train.record.status import read_status
from tests.dist.nodes import Network
from tests.dist.programs import forked_ranks
from tests.faults.helpers import ended_alone, native, series

STALL, MOMENT, STEPS = 8.0, 2.0, 20


class Hand:
    """Pulls node2's cable when rank 0 begins a step, and plugs it in again after `seconds`. when: it pulled."""

    def __init__(self, network: Network, journal: Path, step: int, seconds: float) -> None:
        self.network, self.journal, self.step, self.seconds = network, journal, step, seconds
        self.when, self._plugged = 0.0, False

    def __call__(self) -> None:
        if not self.when:
            if self._begun():
                self.network.do("cable", "node2", "down")
                self.when = time.time()
        elif not self._plugged and time.time() - self.when > self.seconds:
            self.network.do("cable", "node2", "up")
            self._plugged = True

    def _begun(self) -> bool:
        lines = self.journal.read_bytes().splitlines() if self.journal.exists() else []
        return any(entry.get("step") == self.step for entry in map(json.loads, lines))


@pytest.fixture
def hand(network: Network) -> Iterator[Callable[..., Hand]]:
    yield lambda *how: Hand(network, *how)
    network.heal()


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_a_pulled_cable(tmp_path: Path, network: Network, hand: Callable[..., Hand]) -> None:
    """Nobody's process is to blame, so both ranks are named; plugged in, the run goes on as if nothing had been."""
    whole = series(tmp_path / "whole", STEPS, engine=native(2))
    run = series(tmp_path / "pulled", STEPS, engine=native(2), guard={"stall_seconds": STALL})
    with forked_ranks():
        assert whole.start().codes == [0, 0], whole.starts[0].said
    with forked_ranks(network):
        out = hand(run.folder / "start-001" / "rank-0.jsonl", 7, 1e9)
        start = run.start(watch=out)
        assert start.codes == [STALLED, STALLED], start.said
        ended_alone(start)
        reason = read_status(run.run)["reason"]
        for rank in range(2):
            assert f"rank {rank} (node{rank + 1}, pid " in reason, reason
        assert f"has made no progress for {STALL:.0f} s, its process runs; last: all_" in reason
        assert all(STALL <= end.time - out.when < STALL + 10 for end in start.ends), (out.when, start.ends)
        network.heal()
        again = hand(run.folder / "start-002" / "rank-0.jsonl", 12, MOMENT)
        assert run.start(watch=again).codes == [0, 0], run.starts[-1].said
    assert run.starts[-1].first_step() == 6 and again.when > 0
    assert losses(run, whole, STEPS) == []
