"""The classifier in any layout, and `moe-dist train` with task: classification from end to end."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from moe_dist.checkpoint.find import whole_checkpoint
from moe_dist.checkpoint.reshard import Reader
from moe_dist.cli import main
from moe_dist.config import Config, validate
from moe_dist.config.load import load_config
from moe_dist.config.parse import parse_dict
from moe_dist.engine.base import Engine
from moe_dist.engine.make import make_engine
from moe_dist.models.backends import resolve_backends
from moe_dist.models.classifier import Classifier
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Mesh, create_mesh, single_process_mesh
from moe_dist.step import StepContext
from moe_dist.surgery.checkpoints import read_model
from moe_dist.train.record.confusion import accuracy, draw_confusion, f1_scores, macro_f1
from tests.dist.helpers import KEY, assert_same, forget_process_group, logical, run_checks
from tests.dist.test_train import deterministic, records, start, stored

STEPS = 3
DROPS = ("dropped_E", "dropped_S", "dropped_M", "dropped_F", "load_F")  # 4 + 16 + 16 + 8 + 8 counts
SETTINGS: dict[str, Any] = {
    "task": "classification",
    "model": {
        **dict(vocab_size=128, d_model=32, num_layers=2, num_heads=4, d_ff=48, activation="gelu", num_classes=3),
        "dropout": 0.2,
        "token_dropout": 0.1,
        "moe": {"num_experts": 4, "top_k": 2, "capacity_factor": 0.8, "jitter": 0.1},
    },
    # A large eps keeps Adam from turning the rounding noise of a tiny gradient into a full step.
    "optim": {"lr": 3e-3, "eps": 1e-4, "schedule": "constant", "warmup_steps": 0},
    "train": {"steps": 12, "seq_len": 16, "global_batch": 8, "accumulation": 2, "seed": 3},
}


def batch(step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four texts of unequal length, the first half much shorter, so that ranks hold unequal numbers of tokens."""
    ids_BS = 1 + (KEY.fold(step, micro).uniform(torch.arange(64)) * 127).long().view(4, 16)
    lengths_B = torch.tensor([2, 3, 16, 11])
    ids_BS = ids_BS.masked_fill(torch.arange(16) >= lengths_B[:, None], 0)
    return ids_BS, ids_BS[:, 0] % 3


def trained(
    config: Config, mesh: Mesh, steps: int = STEPS, dtype: torch.dtype = torch.float64
) -> tuple[list[tuple[float, ...]], Engine]:
    """[(loss, kept assignments, where each layer dropped the others)] of each step, and the engine."""
    shape = validate(config, mesh.layout.world)
    model = resolve_backends(config.model, config.parallel.expert_ranks)
    built = Classifier(model, mesh, config.train.seq_len, config.train.seed).to(dtype)
    engine = make_engine(built, mesh, config.engine, config.optim, shape.micro_batch, shape.accumulation)
    rows = slice(mesh.dp.rank * shape.micro_batch, (mesh.dp.rank + 1) * shape.micro_batch)
    seen = []
    for step in range(steps):
        total, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, 52, dtype=torch.int64)
        for micro in range(shape.accumulation):
            ids_BS, labels_B = batch(step, micro)
            context = StepContext(KEY.fold(step, micro), step=step, frequency_V=torch.arange(128) % 8)
            output = engine.micro_step(ids_BS[rows], labels_B[rows], context)
            counts += torch.stack([torch.cat([getattr(stats, name) for name in DROPS]) for stats in output.stats])
            kept = sum(int(stats.kept_E.sum()) for stats in output.stats)
            total += torch.stack((output.nll, torch.tensor(float(kept), dtype=torch.float64)))
        loss, kept_mean = (all_reduce(total, mesh.dp) / mesh.layout.dp).tolist()
        seen.append((loss / shape.accumulation, kept_mean, *all_reduce(counts, mesh.world).flatten().tolist()))
        engine.update(config.optim.lr)
    return seen, engine


ROUTING: list[dict[str, Any]] = [
    {},
    dict(drop_policy="score", overflow="reroute"),
    dict(router="sigmoid", jitter=0.0, capacity_factor=None),
]


def check_layouts_agree() -> None:
    for changes in ROUTING:
        check_layouts_agree_with(changes)


def check_layouts_agree_with(changes: dict[str, Any]) -> None:
    """float64, so that rounding is no excuse: losses, numbers dropped and all weights of two ranks and of one."""
    settings = SETTINGS | {"model": SETTINGS["model"] | {"moe": SETTINGS["model"]["moe"] | changes}}
    config = parse_dict(settings, "test")
    expected, alone = trained(config, single_process_mesh())
    # 4 texts a micro-step with 32 tokens, 2 experts each: some are dropped
    assert "capacity_factor" in changes or all(kept < 2 * 2 * 2 * 32 for _, kept, *_ in expected)
    whole = {piece.name: piece.values.view(piece.logical_shape) for piece in alone.held("weight")}
    for cut in ({"ep": 2}, {"tp": 2}, {"ep": 2, "tp": 2}, {}):
        parallel = replace(config.parallel, **cut)
        mesh = create_mesh(parallel.ep, parallel.tp)
        seen, engine = trained(replace(config, parallel=parallel), mesh)
        np.testing.assert_allclose(seen, expected, rtol=1e-9, err_msg=str(cut))
        assert_same(logical(engine, "weight"), whole, rtol=1e-6, atol=1e-8)


def check_every_stage_agrees() -> None:
    """Also for parameters that no layer holds but the model itself: positions and head. Stage 3 cuts those too."""
    for ep in (1, 2):
        config = parse_dict(SETTINGS | {"parallel": {"ep": ep}}, "test")
        mesh = create_mesh(ep, 1)
        expected, native = trained(config, mesh, dtype=torch.float32)
        for stage in range(4):
            engine = replace(config.engine, name="deepspeed", zero_stage=stage)
            seen, zero = trained(replace(config, engine=engine), mesh, dtype=torch.float32)
            np.testing.assert_allclose(seen, expected, rtol=1e-4, err_msg=f"ep={ep} ZeRO-{stage}")
            assert_same(logical(zero, "weight"), logical(native, "weight"), rtol=1e-3, atol=1e-5)


def test_every_layout_and_engine_trains_the_same() -> None:
    run_checks(2, [check_layouts_agree, check_every_stage_agrees])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A configuration and its data; and no trace of the rank that ran in this process."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    words = {"fruit": "apple pear plum fig", "metal": "iron tin lead zinc", "tree": "oak elm ash yew"}
    rows = []
    for number in range(240):
        label = list(words)[number % 3]
        named = words[label].split()
        rows.append({"text": f"item {number} is {named[number % 4]} and {named[number % 5 % 4]}", "label": label})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = SETTINGS | {
        "model": {k: v for k, v in SETTINGS["model"].items() if k != "num_classes"},
        "data": {"kind": "jsonl", "paths": [str(tmp_path / "data.jsonl")], "test_fraction": 0.2},
        "train": SETTINGS["train"] | {"steps": 30, "global_batch": 16, "threads": 1},
        "run": {"root": str(tmp_path / "runs"), "save_every": 10, "eval_every": 10, "tensorboard": False},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    yield tmp_path
    forget_process_group()


def check_run_folder(run: Path) -> None:
    last = records(run)[-1]
    confusion = json.loads((run / "confusion.json").read_text())
    counts_CC = np.array(confusion["counts"])
    assert confusion["labels"] == ["fruit", "metal", "tree"]
    assert confusion["accuracy"] == last["test_accuracy"] == np.trace(counts_CC) / counts_CC.sum() > 0.9
    assert confusion["macro_f1"] == last["test_macro_f1"]
    assert last["validation_accuracy"] > 0.9 and last["validation_loss"] < 0.7 and last["validation_macro_f1"] > 0.9
    assert (run / "confusion.png").read_bytes().startswith(b"\x89PNG") and (run / "tokenizer.json").is_file()
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["num_classes"] == 3
    assert [line["step"] for line in records(run) if "validation_accuracy" in line] == [10, 20, 30]


def whole_model(run: Path) -> Classifier:
    model = read_model(load_config(run / "config.yaml"), Reader(whole_checkpoint(run, print)), "weight")
    assert isinstance(model, Classifier)
    return model


def check_surgery_on_checkpoints(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Added and removed again: the same bits. Opened, the run goes on with them."""

    def experts(run: str, *args: str) -> str:
        code = main(["experts", str(runs / run), *args])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    def logits(run: str) -> torch.Tensor:
        with torch.no_grad():
            return whole_model(runs / run)(batch(0, 0)[0], None, StepContext(KEY, "dropless"), "logits")

    before, original = logits("alone"), Reader(whole_checkpoint(runs / "alone", print))
    assert experts("alone", "list").count("4 experts of width 48, top 2; all open; load ") == 2
    experts("alone", "add", "2", "--output", str(runs / "more"))
    assert "6 experts of width 48, top 2; closed 4-5" in experts("more", "list")
    assert logits("more").equal(before)
    grown = Reader(whole_checkpoint(runs / "more", print))
    name, size = "blocks.1.feed_forward.experts.w_up", 48 * 32
    for kind in ("exp_avg", "exp_avg_sq"):
        assert grown.read(kind, name, 4 * size, 2 * size).eq(0).all()
        assert grown.read(kind, name, 0, 4 * size).equal(original.read(kind, name, 0, 4 * size))
        assert grown.read(kind, name, 0, 4 * size).ne(0).any()
    experts("more", "remove", "4,5", "--output", str(runs / "same"))
    assert stored(runs / "same", 30) == stored(runs / "alone", 30)
    experts("more", "open", "4,5", "--output", str(runs / "open"))
    assert not logits("open").equal(before)
    assert main(["train", str(runs / "open" / "config.yaml"), "--resume", "--train.steps", "32"]) == 0
    assert [line["step"] for line in records(runs / "open")] == [31, 32]
    assert all(len(layer["load"]) == 6 and layer["load"][4] for layer in records(runs / "open")[-1]["layers"])
    for args, words in (
        ((str(runs / "alone"), "add", "2", "--output", str(runs / "more")), "must name a folder that is not there"),
        ((str(runs), "list"), "is neither a checkpoint nor a run with one"),
        ((str(runs / "alone"), "remove", "0,1,2", "--output", str(runs / "x")), "leaves 1 open experts, but top_k=2"),
        ((str(runs / "alone"), "remove", "first", "--output", str(runs / "x")), "names no experts: write 3"),
    ):
        assert main(["experts", *args]) == 2
        assert words in capsys.readouterr().err
    assert not (runs / "x").exists()


def test_a_run_and_surgery_on_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(folder / "tiny.yaml"), "--run.name", "alone", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"validation \(\d+\.\d%\) and \d+ test \(\d+\.\d%\) texts of 3 classes", printed)
    assert "macro-F1" in printed
    check_run_folder(folder / "runs" / "alone")
    check_surgery_on_checkpoints(folder / "runs", capsys)


@pytest.mark.slow
def test_two_ranks_killed_and_resumed(folder: Path) -> None:
    """The same numbers in metrics.jsonl and checkpoints as without; and those of one rank up to rounding."""
    assert main(["train", str(folder / "tiny.yaml"), "--run.name", "alone", "--device", "cpu"]) == 0
    runs, flags = folder / "runs", ("--parallel.ep", "2")
    start(2, folder, "whole", *flags)
    start(2, folder, "killed", *flags, killed_at=13, works=False)
    start(2, folder, "killed", *flags, "--resume")
    check_run_folder(runs / "killed")
    assert deterministic(runs / "killed") == deterministic(runs / "whole")
    assert stored(runs / "killed", 30) == stored(runs / "whole", 30)
    for name in ("loss", "aux_loss", "drop_rate"):
        values = [[line[name] for line in records(runs / run)] for run in ("alone", "whole")]
        np.testing.assert_allclose(*values, rtol=2e-3, err_msg=name)


def test_what_does_not_go_together_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(folder / "tiny.yaml")
    for flags, words in (
        (["--data.kind", "indexed"], "data.kind indexed has no labels for task=classification"),
        (["--model.num-classes", "4"], "num_classes=4, but"),
        (["--run.sample-tokens", "5"], "sample_tokens=5 needs a language model"),
        (["--model.moe.router", "sinkhorn", "--model.moe.jitter", "0"], "router=sinkhorn counts padding"),
        (["--model.moe.balance-scope", "sequence"], "balance_scope=sequence counts padding"),
        (["--model.attention.window", "4"], "attention.window=4 is of language models"),
        (["--data.test-fraction", "0.95"], "test_fraction=0.95 must be above 0, and with"),
    ):
        os.environ.pop("RANK", None)
        assert main(["train", config, *flags, "--device", "cpu"]) == 2
        assert words in capsys.readouterr().err
        forget_process_group()
    assert not (folder / "runs").exists()


def test_scores_are_those_of_scikit_learn(tmp_path: Path) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    truth, guess = random.integers(0, 5, 200), random.integers(0, 4, 200)  # class 4 is never predicted, 5 never there
    counts_CC = np.zeros((6, 6), np.int64)
    np.add.at(counts_CC, (truth, guess), 1)
    assert accuracy(counts_CC) == metrics.accuracy_score(truth, guess)
    assert macro_f1(counts_CC) == pytest.approx(metrics.f1_score(truth, guess, average="macro"), rel=1e-12)
    assert np.isnan(f1_scores(counts_CC)[5])
    draw_confusion(tmp_path / "c.png", counts_CC, list("abcdef"), "title")


def test_scores_by_hand() -> None:
    counts_CC = np.array([[3, 1], [2, 4]])
    assert accuracy(counts_CC) == 0.7
    assert f1_scores(counts_CC).tolist() == pytest.approx([2 * 3 / (2 * 3 + 2 + 1), 2 * 4 / (2 * 4 + 1 + 2)])
