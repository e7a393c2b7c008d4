"""Folders that cannot be read or written to: one line that says so, on every rank the same end, nothing half written.

The suite may run as root, whom no rights keep out. So a full disk is /dev/full, what may not be made lies under /proc,
and what cannot be read is a link to itself, or a file where a folder should be.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_dist.chaos.harass import Harassment
from moe_dist.chaos.ranks import End
from moe_dist.chaos.series import Series, Start
from moe_dist.cli import main
from moe_dist.process import STOP_SIGNALS
from moe_dist.study.design.grid import load_study
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.study.run.runner import Runner
from moe_dist.train import arguments
from moe_dist.train.record.status import read_status
from moe_dist.verify.cases import LayoutCase, Options, Setting
from moe_dist.verify.command import _worker
from tests.dist.helpers import TINY, forget_process_group
from tests.unit.checkpoint.helpers import alone
from tests.unit.study.helpers import Pretend, write_study

ROOT = Path(__file__).parents[2]


def write_config(folder: Path, **run: Any) -> str:
    (folder / "text.txt").write_text(" ".join(str(number * number) for number in range(1000)))
    values = TINY | {
        "data": {"kind": "text", "paths": [str(folder / "text.txt")]},
        "train": TINY["train"] | {"steps": 2, "threads": 1},
        "run": {"root": str(folder / "runs"), "name": "run", "eval_sequences": 2, "tensorboard": False} | run,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def draft(folder: Path, name: str) -> Path:
    """What this process writes before it is `name`."""
    return folder / f".draft-{name}-{os.uname().nodename}-{os.getpid()}"


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "status.json", "restarts.json"])
def test_a_full_disk_at_the_start(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, run = write_config(tmp_path), tmp_path / "runs/run"
    run.mkdir(parents=True)
    draft(run, name).symlink_to("/dev/full")
    assert main(["train", config, "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        f"moe-dist: {run} cannot be written to: rank 0: [Errno 28] No space left on device; make room"
    )
    assert said.count("\n") == 1
    assert not (run / name).exists() or read_status(run)["state"] == "failed"
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []
    assert not (run / "metrics.jsonl").exists()
    forget_process_group()
    assert main(["train", config, "--device", "cpu"]) == 0  # there is room again: nothing is in the way
    assert read_status(run) == {"state": "finished", "step": 2}


def test_a_root_where_nothing_can_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", write_config(tmp_path, root="/proc/runs"), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("moe-dist: /proc/runs/run cannot be written to: [Errno 2]") and "--run.root" in said
    assert said.count("\n") == 1


def test_checkpoints_that_cannot_be_looked_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No new run begins over them. One that cannot be read is passed over, and stays."""
    config, run = write_config(tmp_path, save_every=1), tmp_path / "runs/run"
    assert main(["train", config, "--device", "cpu"]) == 0
    checkpoints, aside = run / "checkpoints", tmp_path / "aside"
    checkpoints.rename(aside)
    checkpoints.touch()
    for command in (
        ["train", config, "--device", "cpu", "--resume", "auto", "--train.steps", "4"],
        ["generate", str(run), "--prompt", "a"],
        ["checkpoint", "verify", str(run)],
    ):
        capsys.readouterr()
        forget_process_group()
        assert main(command) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"moe-dist: {checkpoints} cannot be listed: Not a directory; make it readable"), said
        assert said.count("\n") == 1
    checkpoints.unlink()
    aside.rename(checkpoints)
    manifest = checkpoints / "step-000002/manifest.json"
    manifest.unlink()
    manifest.symlink_to(manifest)
    forget_process_group()
    assert main(["train", config, "--device", "cpu", "--resume", "auto", "--train.steps", "3"]) == 0
    printed = capsys.readouterr().out
    assert f"passed over: {manifest}: not a readable manifest: [Errno 40] Too many levels of symbolic links" in printed
    assert "step-000001, step 1" in printed
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_an_old_checkpoint_that_cannot_be_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told once, whatever the number of saves; removed when it can be."""
    config, run = write_config(tmp_path, save_every=1, keep_last=1), tmp_path / "runs/run"
    true_rmtree, stuck = shutil.rmtree, run / "checkpoints/step-000001"

    def rmtree(path: Path, *args: Any, **how: Any) -> None:
        if path == stuck:
            raise OSError(16, "Device or resource busy", str(path))
        true_rmtree(path, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", rmtree)
        assert main(["train", config, "--device", "cpu", "--train.steps", "4"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"warning: {stuck} cannot be removed (Device or resource busy); trying again") == 1, printed
    assert read_status(run) == {"state": "finished", "step": 4}
    assert sorted(path.name for path in stuck.parent.iterdir()) == ["step-000001", "step-000004"]
    forget_process_group()
    assert main(["train", config, "--device", "cpu", "--resume", "--train.steps", "5"]) == 0
    assert [path.name for path in stuck.parent.iterdir()] == ["step-000005"]


@contextmanager
def speaking_to(gone: str) -> Iterator[None]:
    """Standard output and error to a pipe whose reader has ended, or to a full disk."""
    if gone == "reader":
        reader, writer = os.pipe()
        os.close(reader)
        stream = open(writer, "w", buffering=1, encoding="utf-8")  # noqa: SIM115  (closing it would raise)
    else:
        stream = open("/dev/full", "w", buffering=1, encoding="utf-8")  # noqa: SIM115
    with pytest.raises(OSError):
        os.write(stream.fileno(), b"it fails")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        yield
    stream.close()  # what it still held has gone nowhere


@pytest.mark.parametrize("gone", ["reader", "room"])
def test_output_that_goes_nowhere_ends_no_run(gone: str, tmp_path: Path) -> None:
    """Nor its save, its summary or its sample."""
    config = write_config(tmp_path, sample_tokens=4, log_every=1)
    with speaking_to(gone):
        code = main(["train", config, "--device", "cpu"])
    assert code == 0 and read_status(tmp_path / "runs/run") == {"state": "finished", "step": 2}
    assert (tmp_path / "runs/run/checkpoints/step-000002/manifest.json").is_file()


@pytest.mark.parametrize("gone", ["reader", "room"])
def test_output_that_goes_nowhere_ends_no_study(gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All points are trained and in the ledger."""
    path, train = write_study(tmp_path), Pretend(tmp_path)
    monkeypatch.setattr("moe_dist.study.run.runner.Runner", partial(Runner, command=train))
    with speaking_to(gone):
        code = main(["study", "run", str(path)])
    study = load_study(path)
    assert code == 0 and train.trained() == [point.name for point in study.points]
    assert [record["status"] for record in Ledger(study.ledger).records()] == ["finished"] * 4


@pytest.mark.parametrize("gone", ["reader", "room"])
def test_output_that_goes_nowhere_ends_no_chaos(gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on to its report, that of ranks which only pretend, and so lost everything."""

    def pretended(series: Series, *args: Any, **how: Any) -> Start:
        series.starts.append(Start(0.0, [End(75, 1.0, False)], [[]], tmp_path))
        return series.starts[-1]

    monkeypatch.setattr(Series, "start", pretended)
    monkeypatch.setattr(Harassment, "_newest", lambda self: len(self.attacks))
    config = write_config(tmp_path)
    with speaking_to(gone):
        code = main(["chaos", config, "--ranks", "1", "--minutes", "0.00001", "--train.steps", "60"])
    report = json.loads((tmp_path / "runs/run-chaos/chaos.json").read_text())
    assert code == 1 and len(report["starts"]) == report["step"] > 0
    assert f"step-{report['step']:06d}" in report["lost"][0]


@pytest.mark.parametrize("gone", ["reader", "room"])
def test_output_that_goes_nowhere_leaves_verify_its_verdict(gone: str, tmp_path: Path) -> None:
    options = Options((Setting(),), (LayoutCase(),), steps=1)
    with alone(), speaking_to(gone):
        _worker(options, "cpu", str(tmp_path / "verdict"))
    assert (tmp_path / "verdict").read_text() == "agreed"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_before_the_imports_is_heard(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run is left before its first step, in order, and goes on from there."""
    config, parsed = write_config(tmp_path), arguments.run_arguments

    def signalled(*args: Any) -> Any:
        os.kill(os.getpid(), number)  # where a user's Ctrl-C falls into the imports
        return parsed(*args)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(arguments, "run_arguments", signalled)
        assert main(["train", config, "--device", "cpu"]) == 75  # what scripts know it by
    assert read_status(tmp_path / "runs/run") == {"state": "preempted", "step": 0, "signal": number.name}
    said = capfd.readouterr()
    assert f"moe-dist: {number.name}: leaving before the first step" in said.err and "Traceback" not in said.err
    assert f"stopped by {number.name} after step 0, saved" in said.out and signal.getsignal(number) == before
    forget_process_group()
    assert main(["train", config, "--device", "cpu", "--resume"]) == 0
    assert read_status(tmp_path / "runs/run") == {"state": "finished", "step": 2}


def test_every_rank_ends_when_one_cannot_write(tmp_path: Path) -> None:
    """The log of rank 1 is where its disk is full. Rank 0 says so, in one line, and the status too."""
    run = tmp_path / "runs/run"
    (run / "logs/rank-00001.log").mkdir(parents=True)
    command = ["-m", "moe_dist.parallel.torchrun", "--nproc_per_node", "2", "-m", "moe_dist.cli", "train"]
    ended = subprocess.run(
        [sys.executable, *command, write_config(tmp_path), "--device", "cpu"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    lines = [line for line in ended.stderr.splitlines() if line.startswith("moe-dist: ")]
    assert f"{run} cannot be written to: rank 1: [Errno 21] Is a directory" in lines[0], ended.stderr
    assert len(lines) == 2 and ended.stderr.count("\n") == 2, ended.stderr
    assert lines[1].endswith(f" on {socket.gethostname()} ended with exit code 1")
    assert "rank 1: [Errno 21]" in read_status(run)["reason"] and not (run / "metrics.jsonl").exists()
