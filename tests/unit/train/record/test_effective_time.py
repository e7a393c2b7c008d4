"""Histories written by hand, beside ratios worked out by hand."""

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from moe_dist.cli import main
from moe_dist.disk import locked
from moe_dist.train.record import effective_time as module
from moe_dist.train.record.effective_time import (
    EffectiveTime,
    effective_time,
    effective_time_of,
    kept_seconds,
    process_began,
    read_events,
    tell_end,
    tell_start,
)
from moe_dist.train.record.metrics import MetricsWriter
from moe_dist.train.record.status import LOCK, write_status


def at(second: float, event: str, **details: Any) -> dict[str, Any]:
    return {
        "time": datetime.fromtimestamp(1e9 + second, UTC).isoformat(timespec="milliseconds"),
        "event": event,
    } | details


JOB = {"job": "7", "requeued": 0}


@pytest.mark.parametrize(
    ("events", "until", "wall", "queued", "starts"),
    [
        pytest.param([at(0, "start")], 50, 50, 0, 1, id="goes on"),
        pytest.param([at(0, "start"), at(40, "end")], 50, 40, 0, 1, id="has ended"),
        pytest.param([at(0, "submitted"), at(30, "start"), at(100, "end")], 999, 100, 30, 1, id="queued first"),
        pytest.param(  # nothing has been in a queue: a shell loop, or a restart in the allocation
            [at(0, "start"), at(40, "end", next="restart"), at(45, "start"), at(100, "end")],
            999,
            100,
            0,
            2,
            id="restart",
        ),
        pytest.param(
            [at(0, "start"), at(40, "end", next="requeue"), at(70, "start"), at(100, "end")], 999, 100, 30, 2, id="told"
        ),
        pytest.param(  # nobody has told why, but it is another start of the job
            [at(0, "start", **JOB), at(40, "end", **JOB), at(70, "start", **JOB | {"requeued": 1}), at(100, "end")],
            *(999, 100, 30, 2),
            id="requeued",
        ),
        pytest.param(
            [at(0, "start", **JOB), at(40, "end"), at(50, "start", **JOB), at(90, "end"), at(95, "start", job="8")],
            *(100, 100, 5, 3),
            id="the same job, then another",
        ),
        pytest.param(  # idle until somebody hands it in again, then in the queue
            [at(0, "start"), at(40, "end"), at(60, "submitted"), at(90, "start")], 100, 100, 30, 2, id="handed in again"
        ),
        pytest.param(
            [at(0, "start"), at(40, "end", next="requeue")],
            100,
            40,
            0,
            1,
            id="in the queue now",
        ),
    ],
)
def test_the_queue_is_apart(events: list[Any], until: float, wall: float, queued: float, starts: int) -> None:
    found = effective_time(20.0, events, 1e9 + until)
    assert found == EffectiveTime(20.0, wall, queued, starts)
    assert found.ratio == 20.0 / (wall - queued)


def test_nothing_is_said_where_nothing_has_started(tmp_path: Path) -> None:
    assert effective_time(0.0, [], 0.0) is None and effective_time(0.0, [at(0, "submitted")], 1e9) is None
    assert effective_time_of(tmp_path) is None


def test_steps_that_were_gone_back_over_do_not_count(tmp_path: Path) -> None:
    """As a run that rolls back and one that is started again log them; a skipped step is none, nor what an earlier
    version has trained, whose starts are not known."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "step_seconds": 100.0}\n')  # of an earlier version
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.log({"step": 2, "step_seconds": 10.0})
    writer.log({"step": 3, "step_seconds": 1.0})
    writer.rewind(2)
    writer.log({"step": 3, "step_seconds": 2.0, "skipped": "spike"})
    writer.log({"step": 4, "step_seconds": 3.0})
    writer.log({"step": 5, "step_seconds": 1000.0})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "step_sec')
    assert [kept_seconds(tmp_path, last) for last in (None, 4, 1)] == [1013.0, 13.0, 0.0]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("kept_seconds") for line in lines[:-1]] == [None, 10.0, 10.0, 13.0, 1013.0]
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.rewind(4)
    writer.log({"step": 5, "step_seconds": 5.0})
    writer.close()
    assert kept_seconds(tmp_path) == 18.0


def test_starts_tell_of_those_before_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was killed has told no end: it lasted until its last sign of life."""
    began = time.time()
    monkeypatch.setattr(module, "process_began", lambda: began)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    tell_start(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "kept_seconds": 30.0}\n{"step": 6, "kept_seconds": 70.0}\n')
    os.utime(tmp_path / "metrics.jsonl", (began + 80, began + 80))
    (tmp_path / "checkpoints" / "step-000003").mkdir(parents=True)
    os.utime(tmp_path / "checkpoints", (began + 50, began + 50))
    write_status(tmp_path, "running")
    os.utime(tmp_path / "status.json", (began + 1, began + 1))
    found = effective_time_of(tmp_path)  # nobody holds its lock: killed, and the steps after the checkpoint lost
    assert found is not None and (found.kept, found.queued, found.starts) == (30.0, 0.0, 1)
    assert found.wall == pytest.approx(80, abs=0.01)

    monkeypatch.setattr(module, "process_began", lambda: began + 100)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    tell_start(tmp_path)
    assert [event["event"] for event in read_events(tmp_path / "starts.jsonl")] == ["start", "end", "start"]
    monkeypatch.setattr(time, "time", lambda: began + 150)
    with locked(tmp_path / LOCK):
        running = effective_time_of(tmp_path)
    assert running is not None and (running.kept, running.starts) == (70.0, 2)
    assert (running.wall, running.queued) == (pytest.approx(150, abs=0.01), pytest.approx(20, abs=0.01))
    write_status(tmp_path, "finished", step=6)
    tell_end(tmp_path)
    os.utime(tmp_path / "status.json", (began + 9999, began + 9999))  # touched later: nothing goes on
    done = effective_time_of(tmp_path)
    assert done is not None and done.wall == pytest.approx(150, abs=0.01)
    assert done.ratio == pytest.approx(70 / 130, abs=1e-3)


def test_status_says_it_in_a_second_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A supervisor's history, which knows of the submission, is read in place of the run's own."""
    (tmp_path / "config.yaml").touch()
    write_status(tmp_path, "finished", step=2)
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "kept_seconds": 90.0}\n')
    (tmp_path / "starts.jsonl").write_text(json.dumps(at(5, "start")) + "\n" + json.dumps(at(125, "end")) + "\n")
    assert main(["status", str(tmp_path)]) == 0
    kept = "in steps that were kept"
    assert capsys.readouterr().out == f"finished step=2\neffective training time: 75.0% of 2m00s {kept}, 1 start\n"
    history = [at(-60, "submitted"), at(0, "start"), at(40, "end", next="restart"), at(45, "start"), at(150, "end")]
    torn = '{"time": "2001-09-09T01:49:'
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(event) + "\n" for event in history) + torn)
    assert main(["status", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()[1]
    assert said == f"effective training time: 60.0% of 2m30s {kept}, 2 starts; 1m00s in the queue apart"


def test_a_process_began_before_now() -> None:
    assert 0 <= time.time() - process_began() < 3600
