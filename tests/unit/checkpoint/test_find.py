"""From a name to a run, also where folders are links."""

from pathlib import Path

import pytest

from moe_dist.checkpoint.find import run_config, run_of
from moe_dist.checkpoint.layout import MANIFEST


def make_run(folder: Path, seed: int) -> Path:
    """Returns its checkpoint."""
    checkpoint = folder / "checkpoints" / "step-000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).touch()
    (folder / "config.yaml").write_text(f"train: {{seed: {seed}}}")
    return checkpoint


def test_checkpoints_on_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "a"
    make_run(run, 5)
    (tmp_path / "scratch").mkdir()
    (run / "checkpoints").rename(tmp_path / "scratch" / "17")
    (run / "checkpoints").symlink_to(tmp_path / "scratch" / "17")
    (tmp_path / "linked").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    inside = ("runs/a/checkpoints", "runs/a/checkpoints/step-000003")
    for name in ("runs/a", "runs/../runs/a", "linked", str(run), *inside):
        assert run_config(Path(name)).train.seed == 5, name
    monkeypatch.chdir(run)
    assert run_config(Path()).train.seed == 5


def test_a_link_to_one_checkpoint(tmp_path: Path) -> None:
    real = make_run(tmp_path / "runs" / "a", 5)
    best = tmp_path / "here" / "best"
    best.parent.mkdir()
    best.symlink_to(real)
    assert run_of(best) == tmp_path / "runs" / "a"
    adopted = make_run(tmp_path / "runs" / "b", 6).parent / "step-000009"
    adopted.symlink_to(real)
    assert run_of(adopted) == tmp_path / "runs" / "b"  # the run by which it was named


def test_a_checkpoint_without_its_run(tmp_path: Path) -> None:
    checkpoint = make_run(tmp_path / "a", 5)
    (tmp_path / "a" / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"a/config\.yaml, which says what model .*step-000003 holds, is not there"):
        run_config(checkpoint)
