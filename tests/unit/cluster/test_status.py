"""`moe-dist status` of a folder: each run has a line, each study one for all of its points."""

from pathlib import Path

import pytest

from moe_dist.cli import main
from tests.unit.study.made_runs import write_run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two runs, and a study of three points."""
    write_run(tmp_path / "runs/alone")
    write_run(tmp_path / "runs/zebra", 12, state="preempted")
    for point, state in (("a", "finished"), ("b", "finished"), ("c", "failed")):
        write_run(tmp_path / f"runs/capacity/{point}/run", state=state)
    (tmp_path / "runs/capacity/study.json").write_text('{"study": "capacity.yaml"}')
    return tmp_path / "runs"


def shown(capsys: pytest.CaptureFixture[str], *words: str | Path) -> list[str]:
    assert main(["status", *map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_study_is_one_line(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    for words in ((root,), ("runs",), ()):
        head, alone, study, zebra, told = shown(capsys, *words)
        assert head.split()[:3] == ["run", "state", "step"]
        assert alone.split()[:3] == ["alone", "finished", "40/40"]
        assert zebra.split()[:3] == ["zebra", "preempted", "12/40"]
        assert study.split(maxsplit=1) == ["capacity", "points: 2 finished, 1 failed"]
        assert "--all" in told


def test_its_points_are_shown_when_asked_for(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = {"a/run": "finished", "b/run": "finished", "c/run": "failed"}
    rows = dict(line.split()[:2] for line in shown(capsys, root, "--all")[1:])
    assert rows == {f"capacity/{name}": state for name, state in points.items()} | {
        "alone": "finished",
        "zebra": "preempted",
    }
    assert dict(line.split()[:2] for line in shown(capsys, root / "capacity")[1:]) == points
    (line,) = shown(capsys, root / "capacity/a/run")
    assert line == "finished step=40"


def test_flags_go_with_a_configuration(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(root / "alone"), "--resume"]) == 2
    assert "takes no --resume: flags go with a configuration" in capsys.readouterr().err
    assert shown(capsys, "--run.root", root, "--run.name", "zebra", "--resume") == ["preempted step=12"]
    assert shown(capsys, "--run.root", root, "--run.name", "none") == ["none"]
    with pytest.raises(SystemExit):
        main(["status", "--help"])
    told = capsys.readouterr().out
    assert told.startswith("usage: moe-dist status [RUN | ROOT | CONFIG] [--all]") and "--resume" not in told
