"""What a terminal shows of a run and of a study, and of a study that runs in it."""

import io
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_dist.cli import main
from moe_dist.config import Config
from moe_dist.config.load import dump_config
from moe_dist.config.parse import parse_dict
from moe_dist.disk import locked
from moe_dist.study.design.grid import load_study
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.study.run.live import Row, left_seconds, work
from moe_dist.study.run.runner import Runner
from moe_dist.study.run.watch import RunFrames, newest_run
from moe_dist.study.run.whereabouts import lock_of
from moe_dist.train.record.status import write_status
from tests.unit.study.helpers import Pretend, toy_study, write_study


def record(step: int, **more: Any) -> str:
    layers = [{"layer": 0, "kind": "feed_forward", "drop_rate": 0.25, "load": [30, 10, 0, 40]}]
    values = {"step": step, "loss": 5.0 - step / 100, "step_seconds": 0.5, "drop_rate": 0.25, "layers": layers}
    return json.dumps(values | more) + "\n"


def write_run(folder: Path, steps: int, state: str = "running", **status: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(parse_dict({"train": {"steps": 100}}, "test")))
    (folder / "metrics.jsonl").write_text("".join(record(step) for step in range(1, steps + 1)))
    (folder / "status.json").write_text(json.dumps({"state": state} | status))
    return folder


def shown(frames: RunFrames, width: int = 90, plain: bool = False) -> tuple[str, bool]:
    console = Console(file=io.StringIO(), width=width)
    frame, _, ended = frames(width, plain)
    console.print(frame)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    head, blank, drawn = text.partition("\n\n")
    return " ".join(head.split()) + blank + drawn, ended


def test_a_run_while_it_runs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", 20)
    frames = RunFrames(run)
    with locked(run / "run.lock"):
        text, ended = shown(frames)
        assert not ended and "running step 20/100" in text and "loss 4.8000" in text and "dropped 25.0%" in text
        assert "500.0 ms a step left 40s" in text and "validation" not in text
        assert "0 feed_forward ▇▃▁█  0.00 to 2.00, dropped 25.0%" in text  # 1.5, 0.5, 0 and 2 times the mean
        assert "\n4.99 │" in text and "\n 4.8 │" in text
        with (run / "metrics.jsonl").open("a") as file:
            file.write(record(21, validation_loss=4.5) + record(22, validation_loss=4.25) + '{"step": 23, "lo')
        text, ended = shown(frames, plain=True)
        assert "step 22/100" in text and "validation 4.2500" in text and "validation loss\n" in text
        assert text.isascii()
        (run / "metrics.jsonl").write_text(record(1) + record(2))  # it went back to a checkpoint
        assert "step 2/100" in shown(frames)[0] and "validation" not in shown(frames)[0]
    text, ended = shown(frames)
    assert ended and "interrupted" in text  # nobody holds its lock
    write_run(run, 100, "failed", reason="loss is\nnan")
    assert "failed" in shown(frames)[0] and "loss is nan" in " ".join(shown(frames)[0].split())


def test_a_long_run_is_thinned_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its validation losses stay, and the last step is that of the file."""
    monkeypatch.setattr("moe_dist.study.run.watch._KEPT", 64)
    run = write_run(tmp_path / "r", 1000)
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(
            record(step, **({"validation_loss": 1.0} if step == 1205 else {})) for step in range(1001, 1302)
        )
    frames = RunFrames(run)
    assert "step 1301/100" in shown(frames)[0]
    history = frames._history
    assert 32 <= len(history.loss) <= 64 + 2 and history.validation == [(1205, 1.0)]
    assert (
        history.loss[0][0] == 1 and max(b[0] - a[0] for a, b in zip(history.loss, history.loss[1:], strict=False)) < 64
    )


def test_the_command_finds_runs_and_studies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*what: Any) -> str:
        code = main(["watch", "--once", *map(str, what)])
        told = capsys.readouterr()
        assert code == (2 if told.err else 0)
        return told.err + told.out

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")  # a long folder's name stays in one line
    assert "no run under" in said()
    old, new = (write_run(tmp_path / "runs" / name, 5, "finished", step=5) for name in ("old", "deep/new"))
    for name in ("status.json", "config.yaml"):
        os.utime(old / name, (1e9, 1e9))
    assert newest_run(tmp_path / "runs") == new and "runs/deep/new  finished" in said()
    assert "runs/old  finished" in said(old) and "step 5/100" in said(old)
    config = tmp_path / "old.yaml"
    config.write_text("run: {name: old}\n")
    assert "runs/old  finished" in said(config)
    config.write_text("run: {name: none}\n")
    assert "no such run yet; start it with moe-dist train" in said(config)
    assert "holds no config.yaml" in said(tmp_path / "runs")

    study = toy_study(tmp_path)
    assert said(study.path).startswith("toy  0 of 4 finished, 0 running, 4 left\n")
    Runner(study, Pretend(tmp_path)).run(study.points[:3])
    capsys.readouterr()
    monkeypatch.chdir("/")
    write_run(study.points[3].run, 7)
    with locked(lock_of(study.points[3])):
        for what in (study.path, study.folder):
            lines = said(what).splitlines()
            assert lines[0] == "toy  3 of 4 finished, 1 running, 0 left  time left 0s"  # 8 steps, all but one
            assert lines[2].split() == [study.points[3].name, "7/8", "4.9300", "500.0", "0s"]
    study.path.unlink()
    assert "is not there any more" in said(study.folder)


def test_it_ends_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a terminal: a line when there is news, the whole frame in the end."""
    run = write_run(tmp_path / "r", 3)

    def goes_on() -> None:
        with (run / "metrics.jsonl").open("a") as file:
            file.write(record(4))

    meanwhile = [goes_on, lambda: None, lambda: write_status(run, "finished", step=4)]
    now = iter(range(0, 1000, 20))
    monkeypatch.setattr("moe_dist.study.run.watch.time.monotonic", lambda: next(now))
    monkeypatch.setattr("moe_dist.study.run.watch.time.sleep", lambda seconds: meanwhile.pop(0)())
    with locked(run / "run.lock"):
        assert main(["watch", str(run)]) == 0
    first, second, end = capsys.readouterr().out.split(str(run))[1:]
    assert first.split()[:3] == ["running", "step", "3/100"] and first.count("\n") == 1
    assert second.split()[:3] == ["running", "step", "4/100"] and second.count("\n") == 1  # the third says no more
    assert end.split()[:3] == ["finished", "step", "4/100"] and "training loss" in end


def test_time_left_by_hand(tmp_path: Path) -> None:
    study = toy_study(tmp_path)
    flops = {point.name: work(point) for point in study.points}
    assert len(set(flops.values())) == 1  # the capacity changes none of it
    names = list(flops)
    works = {names[0]: 10.0, names[1]: 20.0, names[2]: 30.0, names[3]: 40.0}
    done = {"status": "finished", "seconds": 5.0}
    assert left_seconds(works, {}, [], 1) is None
    assert left_seconds(works, {names[0]: done}, [], 1) == 45.0  # 0.5 s a FLOP
    assert left_seconds(works, {names[0]: done}, [], 2, besides=2.0) == (45.0 + 3 * 2.0) / 2
    running = [Row(study.points[3], 2, 1.0, 10.0)]  # of 8 steps
    assert left_seconds(works, {names[0]: done}, running, 1) == 60.0 + 25.0
    assert left_seconds(works, {names[0]: done}, running, 9) == 60.0
    assert left_seconds(works, {}, running, 1) == 60.0 + 60.0 * 80 / 40  # at the pace of the one that runs
    assert left_seconds(works, {}, [Row(study.points[3], 0, None, None)], 1) is None
    assert left_seconds(works, dict.fromkeys(names, done), [], 1) == 0.0


def test_a_study_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is drawn anew below the lines; also on one that goes away."""
    path, train = write_study(tmp_path), Pretend(tmp_path, "time.sleep(0.05)")
    screen = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("moe_dist.study.run.live.Console", lambda: Console(file=screen, force_terminal=True, width=100))
    monkeypatch.setattr("moe_dist.study.run.live._EVERY", 0.0)
    monkeypatch.setattr("moe_dist.study.run.runner.Runner", partial(Runner, command=train))
    assert main(["study", "run", str(path)]) == 0
    text, study = screen.getvalue(), load_study(path)
    assert "toy  0 of 4 finished, 1 running, 3 left" in text and "toy  3 of 4 finished, 1 running, 0 left" in text
    assert "\x1b[2K" in text and text.count("finished 8 steps in 9 s") == 4

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    study.ledger.unlink()
    monkeypatch.setattr("moe_dist.study.run.live.Console", lambda: Console(force_terminal=True, width=100))
    monkeypatch.setattr("sys.stdout", Gone())
    assert main(["study", "run", str(path)]) == 0
    assert len(Ledger(study.ledger).latest()) == 4


def test_the_defaults_have_a_run_that_may_be_watched() -> None:
    assert Config().run.folder == Path("runs") / Config().run.name  # where `moe-dist watch` looks without an argument
