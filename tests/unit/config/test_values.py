"""Paths that open with ~ have one meaning."""

from pathlib import Path

import pytest

from moe_dist.config.load import load_config
from moe_dist.config.schema import RunConfig
from moe_dist.config.values import user_path
from moe_dist.generate.arguments import generate_arguments
from moe_dist.surgery.arguments import experts_arguments


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a") == tmp_path / "a"
    assert user_path("a/~") == Path("a/~")
    assert RunConfig(root="~/runs", name="x").folder == tmp_path / "runs/x"
    assert RunConfig(root="runs", name="x").folder == Path("runs/x")
    assert generate_arguments(["~/run", "--prompt", "x"]).run == tmp_path / "run"
    assert experts_arguments(["~/run", "add", "1", "--output=~/out"]).output == tmp_path / "out"
    (tmp_path / "a.yaml").write_text("train: {steps: 3}")
    assert load_config("~/a.yaml").train.steps == 3


def test_the_home_of_nobody() -> None:
    with pytest.raises(ValueError, match=r"~no-such-user/a: there is no such user's home folder"):
        user_path("~no-such-user/a")
