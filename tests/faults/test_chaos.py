"""`moe-dist chaos`: a real run of it, and whether its judge sees what a run has lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from moe_dist.chaos.command import both, judged, show, undisturbed
from moe_dist.chaos.draw import kinds
from moe_dist.chaos.fault import Fault, Plan
from moe_dist.chaos.harass import Attack, Harassment, under_watch
from moe_dist.chaos.judge import losses
from moe_dist.chaos.ranks import End
from moe_dist.chaos.series import Series, Start
from moe_dist.checkpoint.layout import MANIFEST, Manifest
from moe_dist.checkpoint.reader import Reader
from moe_dist.checkpoint.shard import write_shard
from moe_dist.cli import main
from moe_dist.config.load import dump_config
from moe_dist.config.parse import parse_as
from tests.faults.helpers import series

ROOT = Path(__file__).parents[2]
Reference = Callable[[int], Series]


def tamper(checkpoint: Path) -> str:
    """Change one bit of one weight, and sign everything anew; its name."""
    reader = Reader(checkpoint)
    shard = reader.manifest.files[0]
    target = next(stored for stored in shard.ranges if stored.kind == "weight")
    values = {r.key: reader.read(r.kind, r.name, r.start, r.length).clone() for r in shard.ranges}
    values[target.key].view(torch.int32)[0] ^= 1
    (checkpoint / shard.file).unlink()
    written = write_shard(checkpoint / shard.file, [(stored, [values[stored.key]]) for stored in shard.ranges])
    manifest = replace(reader.manifest, files=[written, *reader.manifest.files[1:]])
    (checkpoint / MANIFEST).write_text(manifest.dumps())
    assert Reader(checkpoint).check_digests(0, 1) == [] and Manifest.load(checkpoint) == manifest
    return f"weight/{target.name}"


def copied(original: Series, folder: Path) -> Series:
    """As if it had been run again."""
    shutil.copytree(original.run, folder / "runs" / original.run.name)
    run = replace(original.config.run, root=str(folder / "runs"))
    copy = Series(replace(original.config, run=run), folder / "starts", original.world)
    copy.starts = list(original.starts)
    return copy


def test_the_judge_sees_what_is_lost(tmp_path: Path, reference: Reference) -> None:
    original = reference(40)
    same = copied(original, tmp_path / "same")
    assert losses(same, original, 40) == []
    name = tamper(same.checkpoints / "step-000040")
    (said,) = losses(same, original, 40)
    assert "1 of " in said and name in said

    records = copied(original, tmp_path / "records")
    path = records.run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:6], lines[5].replace('"step": 6', '"step": 6'), *lines[7:]]) + "\n")
    missing, unlike = losses(records, original, 40)
    assert "[7] are missing and [6] there twice" in missing and "step 6 first" in unlike

    samples = copied(original, tmp_path / "samples")
    journals = [[dict(entry) for entry in journal] for journal in original.starts[0].journals]
    entry = next(entry for entry in journals[1] if entry["what"] == "samples" and entry["step"] == 9)
    entry["starts"] = entry["starts"][::-1]
    samples.starts = [replace(original.starts[0], journals=journals)]
    assert losses(samples, original, 40) == [f"{samples.run}: 1 steps read other samples, step 9 first"]
    silent = [[entry for entry in journal if entry["what"] != "samples"] for journal in original.starts[0].journals]
    samples.starts = [replace(original.starts[0], journals=silent)]
    assert losses(samples, samples, 40) == [f"{samples.run}: of 40 steps nobody noted the samples, step 1 first"]

    damaged = copied(original, tmp_path / "damaged")
    (damaged.checkpoints / "step-000040" / MANIFEST).write_text("{}")
    assert "not a readable manifest" in losses(damaged, original, 40)[0]


def test_faults_are_drawn_from_the_seed_and_all_kinds_come() -> None:
    drawn = [kinds(3, number, 2, copies=True)[0] for number in range(22)]
    assert drawn == [kinds(3, number, 2, copies=True)[0] for number in range(22)]
    assert drawn != [kinds(4, number, 2, copies=True)[0] for number in range(22)]
    assert sorted(drawn[:11]) == sorted(drawn[11:]) and len(set(drawn)) == 9
    assert "flip" not in [kinds(3, number, 2, copies=False)[0] for number in range(22)]
    assert "stop" not in [kinds(3, number, 1, copies=False)[0] for number in range(22)]
    assert kinds(3, 5, 2, True)[1].random() == kinds(3, 5, 2, True)[1].random() != kinds(3, 6, 2, True)[1].random()


def test_faults_are_words_and_json() -> None:
    faults = [
        Fault(kind="kill", rank=1, step=12, phase="backward"),
        Fault(kind="kill", rank=0, save=20, change="rename .step-000020", later=0.01),
        Fault(kind="stop", rank=1, after=2.5),
        Fault(kind="delay", rank=1, step=3, phase="data", seconds=1.5),
    ]
    assert [str(fault) for fault in faults] == [
        "kill rank 1 at step 12, in backward",
        "kill rank 0 in the save of step 20, before rename .step-000020, 0.010 s later",
        "stop rank 1 2.50 s after the start",
        "delay rank 1 at step 3, in data for 1.5 s",
    ]
    plan = Plan(journal="j", checkpoints="c", faults=faults)
    assert parse_as(Plan, json.loads(json.dumps(asdict(plan))), "plan") == plan
    with pytest.raises(ValueError, match="knd"):
        parse_as(Plan, {"journal": "j", "checkpoints": "c", "faults": [{"knd": "kill"}]}, "plan")


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(dump_config(series(tmp_path, 40).config))
    (tmp_path / "runs" / "default-chaos" / "something").mkdir(parents=True)
    for flags, words in (
        (["--minutes", "0"], "--minutes=0 must be above 0"),
        (["--ranks", "0"], "--ranks=0 must be from 1 to 64"),
        (["--ranks", "3"], "ep=2"),
        (["--train.steps", "39"], "train.steps=39 leaves no room for a fault: make it 40 at least"),
        ([], "default-chaos is not empty: remove it, or choose another --run.name"),
    ):
        assert main(["chaos", str(config), *flags]) == 2
        assert words in capsys.readouterr().err
    for wrong in (
        {"kind": "kill", "rank": 0},
        {"kind": "kill", "rank": 0, "step": 3},
        {"kind": "flip", "rank": 0, "step": 3, "phase": "data"},
        {"kind": "hang", "rank": 0, "after": 1.0},
        {"kind": "kill", "rank": 0, "after": 1.0, "step": 3, "phase": "data"},
    ):
        with pytest.raises(ValueError, match=wrong["kind"]):
            Fault(**wrong)


def test_a_start_that_is_refused_later_is_a_loss_and_no_mistake_of_the_user(tmp_path: Path) -> None:
    """A start that found all checkpoints damaged ends with the code of a mistake."""
    broken = series(tmp_path, 400)
    (tmp_path / "log.txt").write_text("all checkpoints are damaged")
    refused = Start(0.0, [End(2, 1.0, False)] * 2, [[], []], tmp_path / "log.txt")
    broken.start = lambda *args, **how: refused  # type: ignore[method-assign]
    harassment, fault = Harassment(broken, 0, print), Fault(kind="kill", rank=0, after=1.0)
    with pytest.raises(ValueError, match="the run does not start: all checkpoints are damaged"):
        harassment._attack("kill", [fault], 0)
    harassment.attacks.append(Attack("kill", [fault], [1, -9], 20, 0, 1.0, True, None, []))
    harassment._attack("kill", [fault], 20)
    assert harassment.attacks[-1].problems == [
        "the fault never came: codes [2, 2]",
        "the newest whole checkpoint was of step 20, but now is of 0",
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_short_real_run_and_one_that_lost_something(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, said = under_watch(series(tmp_path, 400).config, 2)
    assert "guard.stall_seconds=5.0" in said and "guard.check_replicas=1" in said
    broken, whole = both(config, 2)
    harassment = Harassment(broken, 1, print)
    step = harassment.run(0.7)
    undisturbed(whole, step)
    report = judged(harassment, whole, step)
    assert report["lost"] == [] and report["problems"] == [], report
    assert sum(report["survived"].values()) >= 1 and report["goodput"] > 0
    trained = sum(len(start.updates()) for start in broken.starts)
    assert trained == step + report["steps_trained_again"]  # each is kept, or trained again
    name = tamper(broken.checkpoints / f"step-{step:06d}")
    report = judged(harassment, whole, step)
    assert len(report["lost"]) == 1 and name in report["lost"][0]
    show(report, Console())
    assert "NOTHING" not in capsys.readouterr().out.split("faults survived")[1]


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(dump_config(series(tmp_path, 400).config))
    command = [sys.executable, "-m", "moe_dist.cli", "chaos", str(config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--minutes", "0.1"], env=environment, capture_output=True, text=True, timeout=250, umask=0
    )
    assert done.returncode == 0 and "NOTHING: weights" in done.stdout, done.stdout + done.stderr
    report = json.loads((tmp_path / "runs" / "default-chaos" / "chaos.json").read_text())
    assert report["lost"] == [] and report["seed"] == 0 and len(report["starts"]) >= 2
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("runs/**/*") if path.is_file()}
    assert modes <= {0o644, 0o600}, "nothing that others may change, and nothing to execute"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_interrupted_it_leaves_no_rank_behind(tmp_path: Path, number: signal.Signals) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(dump_config(series(tmp_path, 400).config))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "moe_dist.cli", "chaos", str(config)], env=environment)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(ranks := children.read_text().split()) < 2:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(20) == 130
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
