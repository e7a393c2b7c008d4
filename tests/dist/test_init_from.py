"""`train.init_from`: weights alone, in another layout, from models that agree; and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moe_dist.chaos.ranks import Ranks
from moe_dist.checkpoint.reshard import Reader
from moe_dist.cli import main
from tests.dist.helpers import TINY, forget_process_group
from tests.dist.programs import forked_ranks

NEW = ("--train.steps", "3", "--optim.lr", "2e-3", "--train.seed", "5", "--train.seq-len", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the run `base`, of four steps; its routers have a balancing bias."""
    folder = tmp_path_factory.mktemp("init_from")
    (folder / "text.txt").write_text(" ".join(str(number * number) for number in range(2000)))
    moe = {"num_experts": 4, "router": "sigmoid", "capacity_factor": None, "bias_update_rate": 0.01}
    values: dict[str, Any] = TINY | {
        "model": TINY["model"] | {"moe": moe},
        "data": {"kind": "text", "paths": [str(folder / "text.txt")]},
        "optim": TINY["optim"] | {"lr": 1e-2},
        "train": TINY["train"] | {"steps": 4, "threads": 1},
        "run": {"root": str(folder / "runs"), "name": "base", "eval_sequences": 2, "tensorboard": False},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(values))
    assert train(folder, "base") == 0
    return folder


def train(folder: Path, name: str, *flags: str) -> int:
    command = ["train", str(folder / "base.yaml"), "--device", "cpu", "--run.name", name, *flags]
    try:
        return main(command)
    finally:
        forget_process_group()


def weights(folder: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    reader = Reader(folder / "runs" / name / "checkpoints" / f"step-{step:06d}")
    sizes = {name: size for kind, name, size in reader.manifest.tensors() if kind == "weight"}
    return {name: reader.read("weight", name, 0, size) for name, size in sizes.items()}


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_run_begins_with_another_ones_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And with nothing else of it: no step, no moments. A learning rate of nothing shows the weights."""
    source = folder / "runs" / "base"
    begin = ("--train.init-from", str(source), "--model.moe.balance", "none", "--model.moe.bias-update-rate", "0.001")
    assert train(folder, "still", *NEW, *begin, "--optim.lr", "1e-30", "--train.steps", "1") == 0
    said = capsys.readouterr().out
    assert f"begins    with the weights of {source}/checkpoints/step-000004, step 4; step, optimizer and data" in said
    assert "note      model.moe.balance=auto there, none here: the same weights" in said
    before, after = weights(folder, "base", 4), weights(folder, "still", 1)
    assert before["blocks.0.feed_forward.router.bias_E"].abs().max() > 0
    for name, values in before.items():
        torch.testing.assert_close(after[name], values, rtol=0, atol=1e-20)
    reader = Reader(folder / "runs" / "still" / "checkpoints" / "step-000001")
    mean, square = (reader.read(kind, "output.norm.weight", 0, 32) for kind in ("exp_avg", "exp_avg_sq"))
    torch.testing.assert_close((mean / 0.1) ** 2, square / 0.05, rtol=1e-3, atol=0)  # of one gradient
    record = json.loads((folder / "runs" / "still" / "init_from.json").read_text())
    assert record["checkpoint"] == str(source / "checkpoints" / "step-000004") and record["step"] == 4
    # It is resumed without what it began with.
    away = folder / "runs" / "gone"
    source.rename(away)
    try:
        assert train(folder, "still", *NEW, *begin, "--resume", "--train.steps", "2") == 0
    finally:
        away.rename(source)


def test_two_ranks_begin_as_one(folder: Path) -> None:
    """From a checkpoint of one process, ep 2 trains as a single process does."""
    begin = (*NEW, "--train.init-from", str(folder / "runs" / "base" / "checkpoints" / "step-000004"))
    assert train(folder, "one", *begin) == 0
    program = ["moe_dist.cli", "train", str(folder / "base.yaml"), "--run.name", "two", "--parallel.ep", "2"]
    with forked_ranks(), Ranks([*program, *begin, "--device", "cpu"], 2, folder / "two.log") as started:
        assert [end.code for end in started.wait(200, lambda: 20.0)] == [0, 0], (folder / "two.log").read_text()
    assert len(losses(folder, "one")) == 3
    for one, two in zip(losses(folder, "one"), losses(folder, "two"), strict=True):
        assert abs(one - two) < 1e-5
    assert losses(folder, "one")[0] < losses(folder, "base")[0] - 0.1  # weights that have learned
    both = weights(folder, "one", 3), weights(folder, "two", 3)
    for name, values in both[0].items():
        torch.testing.assert_close(both[1][name], values, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model.moe.num-experts", "8"), ["model.moe.num_experts=4 there, 8 here", "router.weight has shape"]),
        (("--model.d-ff", "64", "--model.moe.d-ff", "48"), ["model.d_ff=48 there, 64 here"]),
        (("--model.activation", "geglu", "--model.norm-eps", "1e-6"), ["model.activation=swiglu there, geglu here",
         "model.norm_eps=1e-05 there, 1e-06 here"]),
        (("--model.tie-embeddings", "false"), ["model.tie_embeddings=true there, false here"]),
        (("--train.freeze", "blocks.*.ff.*"), ["'blocks.*.ff.*' matches no parameter; did you mean"]),
        (("--train.freeze", "*"), ["leaves nothing to train"]),
        (("--train.init-from", "/nowhere"), ["/nowhere is neither a checkpoint nor a run with one"]),
    ],
)  # fmt: skip
def test_refusals(folder: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: list[str]) -> None:
    begin = () if "--train.init-from" in flags else ("--train.init-from", str(folder / "runs" / "base"))
    assert train(folder, "refused", *begin, *flags) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not (folder / "runs" / "refused" / "config.yaml").exists()


def test_what_computes_otherwise_is_noted_or_free(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free = ("--model.moe.capacity-factor", "2.0", "--model.recompute", "block", "--model.attention.dropout", "0.1")
    free += ("--model.attention.backend", "torch")
    noted = ("--model.moe.top-k", "1", "--model.rope-theta", "500.0")
    begin = ("--train.init-from", str(folder / "runs" / "base"), "--train.steps", "1")
    assert train(folder, "otherwise", *begin, *free, *noted) == 0
    said = capsys.readouterr().out
    assert "model.moe.top_k=2 there, 1 here" in said and "model.rope_theta=10000.0 there, 500.0 here" in said
    assert all(word not in said for word in ("capacity_factor=", "recompute=", "dropout="))
