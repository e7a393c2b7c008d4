"""What a resumed run must agree on, and how to change it on purpose: by the real command, on one rank."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from moe_dist.checkpoint.reader import Reader
from moe_dist.cli import main
from tests.dist.helpers import TINY, forget_process_group

STEPS, BETA1 = 4, 0.9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a run of four steps."""
    (tmp_path / "text.txt").write_text(" ".join(str(number * number) for number in range(1000)))
    values = TINY | {
        "data": {"kind": "text", "paths": [str(tmp_path / "text.txt")]},
        "train": TINY["train"] | {"steps": STEPS, "threads": 1},
        "run": {"root": str(tmp_path / "runs"), "save_every": 2, "eval_sequences": 2, "tensorboard": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert train(tmp_path) == 0
    return tmp_path


def train(folder: Path, *flags: str) -> int:
    try:
        return main(["train", str(folder / "run.yaml"), "--device", "cpu", *flags])
    finally:
        forget_process_group()


def losses(folder: Path) -> list[float]:
    lines = (folder / "runs" / "default" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [json.loads(line)["loss"] for line in lines]


def weight(folder: Path, step: int, kind: str = "weight") -> dict[str, torch.Tensor]:
    reader = Reader(folder / "runs" / "default" / "checkpoints" / f"step-{step:06d}")
    sizes = {name: torch.Size(shape).numel() for name, shape in reader.manifest.shapes.items()}
    return {
        name: reader.read(kind, name, 0, size) for name, size in sizes.items() if name not in reader.manifest.buffers
    }


def test_what_differs_is_refused_by_name_and_allowed_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--resume", "--train.steps", "6", "--optim.lr", "1e-30")
    changed = (*more, "--train.seed", "7", "--train.global-batch", "4")
    before = losses(folder)
    for flags in ((), ("--override", "seed"), ("--override", "global_batch,data")):
        assert train(folder, *changed, *flags) == 2
        said = capsys.readouterr().err
        assert ("seed=0, not 7" in said) is ("seed" not in flags)
        assert ("global_batch=8, not 4" in said) is ("global_batch,data" not in flags)
        assert "--override seed,global_batch\n" in said
    assert losses(folder) == before
    assert train(folder, *changed, "--override", "seed,global_batch") == 0
    said = capsys.readouterr().out
    assert "overridden: seed=0, not 7\noverridden: global_batch=8, not 4\n" in said
    assert losses(folder)[:STEPS] == before and len(losses(folder)) == 6
    for name, values in weight(folder, 6).items():
        torch.testing.assert_close(values, weight(folder, 4)[name], rtol=0, atol=1e-20)  # at that learning rate
    # From here on the new values are those of the run.
    assert train(folder, *changed[:2], "8", *changed[3:]) == 0
    assert train(folder, "--resume", "--train.steps", "10") == 2
    assert "seed=7, not 0" in capsys.readouterr().err


def test_changed_data_is_refused_and_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "text.txt").open("a") as file:
        file.write("one more line\n")
    assert train(folder, "--resume", "--train.steps", "6") == 2
    said = capsys.readouterr().err
    assert "was trained with data=" in said and "--override data\n" in said
    assert train(folder, "--resume", "--train.steps", "6", "--override", "data") == 0
    assert len(losses(folder)) == 6


def test_another_shape_begins_anew_where_it_differs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deeper = ("--resume", "--model.num-layers", "3", "--train.steps", "5", "--optim.lr", "1e-30")
    assert train(folder, *deeper) == 2
    assert "model.num_layers=2, not 3" in capsys.readouterr().err
    assert train(folder, *deeper, "--override", "model") == 0
    said = capsys.readouterr().out
    before, after, moment = weight(folder, 4), weight(folder, 5), weight(folder, 5, "exp_avg")
    new = after.keys() - before.keys()
    assert new and all(name.startswith("blocks.2.") for name in new)
    for name in new:
        assert f"not loaded: parameter {name} is absent in the checkpoint, but has shape" in said
    for name, values in before.items():
        torch.testing.assert_close(after[name], values, rtol=0, atol=1e-20)
    for name, values in weight(folder, 4, "exp_avg").items():  # which the one step has moved, and not begun anew
        step = (moment[name] - BETA1 * values).abs().max()
        assert 0 < step < values.abs().max(), name


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--resume", "--override", "sed"), "--override 'sed' is none of data, tokenizer, seed"),
        (("--override", "seed"), "give --resume too"),
    ],
)
def test_wrong_names_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: str
) -> None:
    assert train(folder, *flags) == 2
    assert words in capsys.readouterr().err
