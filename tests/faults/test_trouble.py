"""Full disks, flipped bits and losses that go off, through the real command: it says why, and nothing is lost."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_dist.chaos.damage import DAMAGES, corrupt, whole
from moe_dist.chaos.fault import Fault
from moe_dist.chaos.judge import losses
from moe_dist.chaos.series import Series
from moe_dist.train.exit_codes import DIVERGED, REPLICAS_DIFFER
from moe_dist.train.record.status import read_status
from tests.faults.helpers import ended_alone, native, series

pytestmark = pytest.mark.usefixtures("forked")

Reference = Callable[[int], Series]
FULL = "File too large"


def test_full_disks_and_a_flipped_bit(tmp_path: Path, reference: Reference) -> None:
    """Of a shard on rank 1, of the manifest and of metrics.jsonl on rank 0: the checkpoint before stays whole."""
    run = series(tmp_path, 40, guard={"check_replicas": 1})
    for fault in (
        Fault(kind="fill", rank=1, save=10, change="write .step-000010/rank-00001.safetensors"),
        Fault(kind="fill", rank=0, save=10, change="write .step-000010/manifest.json"),
        Fault(kind="fill", rank=0, step=8, phase="update"),
    ):
        start = run.start([fault])
        assert start.codes == [1, 1] and len(start.fired) == 1, start.said
        ended_alone(start)
        assert whole(run.checkpoints) == [5]
        status = read_status(run.run)
        assert status["state"] == "failed" and FULL in status["reason"], status
        said = {
            rank: "".join(line for line in start.said.splitlines() if line.startswith(f"[{rank}]")) for rank in (0, 1)
        }
        if fault.save is not None:  # a save fails on all ranks together, in a line
            assert all(f"rank {fault.rank}: [Errno 27] {FULL}" in text for text in said.values()), start.said
            assert "Traceback" not in start.said
        else:  # the other one only loses its peer
            assert FULL in said[0] and "moe-dist: rank 1 lost another rank, which has ended; last here: " in said[1]
            assert "Traceback" not in start.said, start.said
    start = run.start([Fault(kind="flip", rank=1, step=8, phase="update")])
    assert start.codes == [REPLICAS_DIFFER] * 2, start.said
    assert "after step 8, rank 1 is unlike the optimizer's masters in " in read_status(run.run)["reason"]
    assert whole(run.checkpoints) == [5]
    assert run.start().codes == [0, 0], run.starts[-1].said
    assert [start.first_step() for start in run.starts] == [1, 6, 6, 6, 6]
    assert losses(run, reference(40), 40) == []


def test_losses_that_go_off(tmp_path: Path) -> None:
    """One NaN is left out, a spike is noted, and NaNs in a row, that come again after going back, end the run."""
    run = series(tmp_path, 40, engine=native(2), guard={"spike_window": 10})
    faults = [Fault(kind="nan", rank=1, step=3, phase="forward"), Fault(kind="spike", rank=0, step=7, phase="forward")]
    faults += [Fault(kind="nan", rank=1, step=step, phase="forward", again=True) for step in (12, 13, 14)]
    start = run.start(faults)
    assert start.codes == [DIVERGED, DIVERGED] and len(start.fired) == 8, start.said
    lines = [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert [line["step"] for line in lines if "skipped" in line] == [3, 12, 13, 14]
    assert [line["step"] for line in lines if "spike" in line] == [7]
    status = read_status(run.run)
    assert status["code"] == DIVERGED and "at step 14 the run had gone back to a checkpoint already" in status["reason"]
    assert whole(run.checkpoints) == [5, 10]


@pytest.mark.slow
def test_damaged_checkpoints(tmp_path: Path, reference: Reference) -> None:
    """The newest in every way, each time that there is one before it: passed over, with what is wrong."""
    run, by = series(tmp_path, 40), random.Random(3)
    run.start([Fault(kind="kill", rank=0, step=12, phase="data")])
    for damage in DAMAGES:
        good = whole(run.checkpoints)
        assert len(good) == 2
        corrupt(run.checkpoints / f"step-{good[-1]:06d}", damage, by)
        start = run.start([Fault(kind="kill", rank=0, step=good[-1] + 2, phase="data")])
        assert start.first_step() == good[0] + 1
        assert f"passed over: {run.checkpoints}/step-{good[-1]:06d}/" in start.said, start.said
    assert run.start().codes == [0, 0]
    assert losses(run, reference(40), 40) == []
