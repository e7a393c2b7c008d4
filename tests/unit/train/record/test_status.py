import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from moe_dist.cli import main
from moe_dist.config import Config
from moe_dist.config.load import dump_config
from moe_dist.config.schema import DataConfig, EngineConfig
from moe_dist.disk import locked, remove_drafts
from moe_dist.train.record.status import LOCK, describe_status, is_finished, read_status, write_status
from moe_dist.train.resume import as_configured


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert read_status(tmp_path) == {"state": "none"}
    write_status(tmp_path, "preempted", step=40, signal="SIGUSR2")
    status = read_status(tmp_path)
    assert status == {"state": "preempted", "step": 40, "signal": "SIGUSR2"}
    assert describe_status(status) == "preempted step=40 signal=SIGUSR2"
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_status(tmp_path, "running")

    def killed(old: Path, new: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_status(tmp_path, "failed", reason="none")
    monkeypatch.undo()
    (draft,) = tmp_path.glob(".*")
    draft.rename(draft.with_name(draft.name.removesuffix(str(os.getpid())) + "0"))  # of another process
    remove_drafts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"] and read_status(tmp_path)["state"] == "running"


def test_a_reason_of_several_lines_stays_one() -> None:
    assert describe_status({"state": "failed", "reason": "one\ntwo"}) == "failed reason=one two"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"state": "finished", "step": null}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(ValueError, match=r"status\.json.* remove it"):
        read_status(tmp_path)


def test_finished_means_all_steps_of_this_configuration(tmp_path: Path) -> None:
    assert not is_finished(tmp_path, 40)
    write_status(tmp_path, "preempted", step=40)
    assert not is_finished(tmp_path, 40)
    write_status(tmp_path, "finished", step=40)
    assert is_finished(tmp_path, 40)
    assert not is_finished(tmp_path, 80), "the user has asked for more"


def said(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> str:
    assert main(["status", *args]) == code
    printed = capsys.readouterr()
    return printed.err if code else printed.out


def test_the_command_tells_how_far_a_run_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its configuration as `train` finds it, or by its folder; while it lives, and when it is gone."""
    run = tmp_path / "mine"
    run.mkdir()
    flags = ["--run.root", str(tmp_path), "--run.name", "mine", "--resume", "auto", "--device", "cpu"]
    assert said(capsys, *flags) == "none\n"
    write_status(run, "running")
    with locked(run / LOCK):
        assert said(capsys, *flags) == "running\n"
        lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.34567}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
        assert said(capsys, *flags) == "running step=2 loss=2.3457\n"
    (run / "config.yaml").touch()
    for args in (flags, [str(run)]):  # no process holds the lock: whoever wrote `running` has ended
        assert said(capsys, *args).startswith("interrupted step=2 loss=2.3457 reason=its process is gone")
    write_status(run, "failed", reason="went off", code=76)
    assert said(capsys, str(run)) == "failed step=2 loss=2.3457 reason=went off code=76\n"
    write_status(run, "finished", step=2)
    assert said(capsys, str(run)) == "finished step=2\n"
    assert said(capsys, str(tmp_path)).splitlines()[1].split() == ["mine", "finished", "2/1000", "2.3457"]
    (tmp_path / "empty").mkdir()
    assert "holds no config.yaml, so no run" in said(capsys, str(tmp_path / "empty"), code=2)
    assert "takes no --run.name" in said(capsys, str(run), "--run.name", "x", code=2)


def test_auto_leaves_a_finished_run_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    write_status(run, "finished", step=5)
    flags = ["--run.root", str(tmp_path), "--run.name", "mine", "--train.steps", "5", "--resume", "auto"]
    assert main(["train", *flags]) == 0
    assert "finished its 5 steps already" in capsys.readouterr().out
    assert [path.name for path in run.iterdir()] == ["status.json"]


def test_auto_does_not_take_another_run_for_the_finished_one(tmp_path: Path) -> None:
    config = Config(data=DataConfig(kind="text", paths=["a"]))
    assert as_configured(tmp_path, config), "nothing speaks against it"
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert as_configured(tmp_path, replace(config, engine=EngineConfig(name="deepspeed", zero_stage=1)))
    for other in (
        replace(config, train=replace(config.train, seed=7)),
        replace(config, train=replace(config.train, global_batch=2 * config.train.global_batch)),
        replace(config, model=replace(config.model, d_ff=2 * config.model.d_ff)),
        replace(config, data=replace(config.data, paths=["b"])),
    ):
        assert not as_configured(tmp_path, other)
    (tmp_path / "config.yaml").write_text("train: [")
    assert not as_configured(tmp_path, config)
