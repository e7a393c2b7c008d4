"""What a run of two real ranks says of itself: where its time went, who was slow, a trace, how much of it counted."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from moe_dist.chaos.fault import Fault
from moe_dist.cli import main
from moe_dist.train.record.effective_time import effective_time_of
from moe_dist.train.record.step_clock import IN_STEP, PARTS
from tests.dist.programs import forked_ranks
from tests.faults.helpers import ZERO1, native, series

LATE = 0.5  # seconds


@pytest.mark.parametrize("engine", ["native", pytest.param("zero1", marks=pytest.mark.slow)])
def test_the_late_rank_is_named_and_only_the_steps_asked_for_are_traced(engine: str, tmp_path: Path) -> None:
    run = series(tmp_path, 6, engine=native(2) if engine == "native" else ZERO1, run={"save_every": 2, "eval_every": 2})
    late = Fault(kind="delay", rank=1, step=2, phase="data", seconds=LATE)
    killed = Fault(kind="kill", rank=0, step=6, phase="forward")
    with forked_ranks():
        start = run.start([late, killed], "--profile", "steps=4-5")
        assert start.codes[0] == -9 and start.codes[1] > 0, start.said
        records = [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]
        check_parts(records)
        check_traces(run.run, start.said)
        ended = effective_time_of(run.run)
        start = run.start([], "--resume", "--profile", "steps=4-5")
        assert start.codes == [0, 0] and "profile: nothing, steps 4 to 5 are done already" not in start.said, start.said
    assert ended is not None and ended.starts == 1 and ended.kept < ended.wall
    assert ended.kept == pytest.approx(
        sum(record["step_seconds"] for record in records[:4])
    )  # four are in a checkpoint
    check_started_again(run.run, records, start.said)


def check_parts(records: list[dict[str, Any]]) -> None:
    """Rank 0 waits where rank 1 was late."""
    assert [record.get("timing", {}).get("step") for record in records] == [None, 1, 2, 3, 4]
    for record, after in pairwise(records):
        timing = after["timing"]
        assert set(timing) == {"step", "slowest", *PARTS} - {"graph"}
        assert sum(timing[part] for part in IN_STEP if part != "graph") == pytest.approx(
            record["step_seconds"], abs=2e-3
        )
        assert all(timing[part] > 0 for part in ("data", "forward", "experts", "backward", "optimizer", "between"))
        assert timing["dispatch_wait"] > 0 and timing["other_wait"] > 0
        assert (timing["evaluation"] > 0) == (timing["save"] > 0) == (timing["step"] % 2 == 0)
    timing = records[2]["timing"]
    assert timing["dispatch_wait"] > 0.8 * LATE > 4 * timing["data"]
    slowest = timing["slowest"]
    assert (slowest["rank"], slowest["part"]) == (1, "data") and slowest["own"] > LATE
    assert slowest["median_own"] < slowest["own"] - 0.4 * LATE  # of two, their mean


def check_traces(run: Path, said: str) -> None:
    for rank in range(2):
        trace = json.loads((run / "profile" / f"rank-{rank:05d}.json").read_text())
        names = [event.get("name", "") for event in trace["traceEvents"]]
        assert sorted(name for name in names if name.startswith("step ")) == ["step 4", "step 5"], said
        assert any("all_to_all" in name or "alltoall" in name for name in names)
        held = [event["args"]["bytes"] for event in trace["traceEvents"] if event.get("name") == "memory of the host"]
        assert len(held) > 100 and max(held) > min(held)
    assert len(list((run / "profile").iterdir())) == 2


def check_started_again(run: Path, before: list[dict[str, Any]], said: str) -> None:
    """Step 5 was lost and trained, and traced, again."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 7)) and records[:4] == before[:4]
    kept, done = sum(record["step_seconds"] for record in records), effective_time_of(run)
    assert done is not None and done.kept == records[-1]["kept_seconds"] == pytest.approx(kept)
    assert done.starts == 2 and 0 < done.ratio < 1 and done.queued == 0
    assert f"{done.ratio:.1%} of" in said and "2 starts" in said, said
    names = [
        event.get("name", "") for event in json.loads((run / "profile/rank-00000.json").read_text())["traceEvents"]
    ]
    assert [name for name in names if name.startswith("step ")] == ["step 5"]


@pytest.mark.parametrize("text", ["10-12", "steps=", "steps=0-1", "steps=3-2", "steps=4-9", "steps=1,2", "steps=-1"])
def test_steps_that_are_none_are_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--run.root", str(tmp_path), "--train.steps", "8", "--device", "cpu"]
    assert main(["train", *flags, "--profile", text]) == 2
    assert f"--profile {text} " in capsys.readouterr().err and list(tmp_path.iterdir()) == []
