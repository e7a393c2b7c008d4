"""What the command line says when a user got something wrong: exit code 2, words that help, nothing on disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import moe_dist
from moe_dist.cli import main
from tests.dist.helpers import forget_process_group


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    forget_process_group()


def exit_code(*args: str) -> int | str | None:
    try:
        return main(args)
    except SystemExit as stopped:
        return stopped.code


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("train", "absent.yaml"), "absent.yaml: no such file"),
        (("train", "."), "is a folder"),
        (("train",), "moe-dist train needs a configuration: moe-dist train CONFIG, for example configs/tiny.yaml"),
        (("train", "--resume", "auto", "--device", "cpu"), "moe-dist train needs a configuration"),
        (("chaos",), "moe-dist chaos needs a configuration"),
        (("train", "--help", "model.mo"), "--help model.mo: no such section or key; did you mean model.moe?"),
        (("train", "--parallel.ep", "3", "--model.moe.num-experts", "6"), "ep=3 does not divide world size 1"),
        (("train", "--model.moe.top-k", "9"), "top_k=9 is larger than num_experts=8"),
        (("train", "--engine.zero-stage", "2"), "zero_stage=2 needs engine.name deepspeed"),
        (("train", "--run.name", "../elsewhere"), "is not a simple file name"),
        (("train", "--data.kind", "text"), "data.kind text needs paths"),
        (("train", "--data.kind", "text", "--data.paths", "absent.txt"), "absent.txt in data.paths is neither"),
        (("train", "--model.moe.top-kk", "1"), "model.moe.top_kk: unknown key; did you mean top_k?"),
        (("train", "--model.moe.top-k", "one"), "model.moe.top_k: 'one' is not an integer"),
        (("train", "--device", "abacus"), "abacus"),
        (("verify", "--layouts", "pp=2"), "unknown axis 'pp'"),
        (("verify", "--layouts", "zero=4"), "'4' is no value of zero"),
        (("verify", "--steps", "0"), "--steps=0"),
        (("trian",), "trian"),
        ((), "usage"),
    ],
)
def test_mistakes(args: tuple[str, ...], words: str, empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*args) == 2
    printed = capsys.readouterr()
    assert words in printed.err + printed.out
    assert "Traceback" not in printed.err
    assert list(empty_folder.iterdir()) == []


def test_unknown_keys_name_the_nearest_right_one(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = empty_folder / "run.yaml"
    config.write_text("model:\n  moe:\n    capacity_facto: 2.0\ntrain:\n  step: 5\n")
    assert exit_code("train", str(config)) == 2
    said = capsys.readouterr().err
    assert "model.moe.capacity_facto: unknown key; did you mean capacity_factor?" in said
    assert "train.step: unknown key; did you mean steps?" in said
    assert list(empty_folder.iterdir()) == [config]


def test_several_mistakes_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("train", "--parallel.tp", "2", "--train.global-batch", "0", "--optim.lr", "-1") == 2
    said = capsys.readouterr().err
    assert "tp=2 does not divide world size 1" in said and "lr=-1.0 is not above 0" in said


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("version") == 0
    assert capsys.readouterr().out.strip() == moe_dist.__version__
    assert exit_code("train", "--help") == 0
    shown = capsys.readouterr().out
    assert "--model.moe.top-k" in shown and "--resume" in shown
    assert len(shown.splitlines()) < 60 and "  model.attention.routed  " in shown
    assert exit_code("train", "--help", "model.moe") == 0
    assert "--model.moe.drop-policy  position | score | random  (position)" in capsys.readouterr().out
    assert exit_code("verify", "--help") == 0
    assert "--layouts" in capsys.readouterr().out
