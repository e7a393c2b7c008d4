"""`moe-dist experts` on the checkpoints of language models: functions kept, moments by their rules, trained on."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from moe_dist.checkpoint.reshard import Reader
from moe_dist.cli import main
from moe_dist.config.load import load_config
from moe_dist.engine.base import STATE_KINDS
from moe_dist.surgery import checkpoints
from moe_dist.surgery.checkpoints import read_model
from tests.dist.helpers import TINY, forget_process_group
from tests.unit.helpers import context

D, F, LAYER = 32, 48, "blocks.1.feed_forward."
Tensors = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run of four steps, and one of four experts."""
    folder = tmp_path_factory.mktemp("surgery")
    (folder / "text.txt").write_text(" ".join(str(number * number) for number in range(2000)))
    for name, experts in (("dense", 0), ("moe", 4)):
        values: dict[str, Any] = TINY | {
            "model": TINY["model"] | {"moe": {"num_experts": experts, "capacity_factor": None}},
            "data": {"kind": "text", "paths": [str(folder / "text.txt")]},
            "train": TINY["train"] | {"steps": 4, "threads": 1},
            "run": {"root": str(folder / "runs"), "name": name, "eval_sequences": 5, "tensorboard": False},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
        assert main(["train", str(folder / f"{name}.yaml"), "--device", "cpu"]) == 0
        forget_process_group()
    return folder / "runs"


def step_of(run: Path) -> Path:
    return run / "checkpoints" / "step-000004"


def tensors(run: Path) -> Tensors:
    """Everything in its checkpoint, by kind and name."""
    reader = Reader(step_of(run))
    found: Tensors = {kind: {} for kind in STATE_KINDS}
    for kind, name, size in reader.manifest.tensors():
        found[kind][name] = reader.read(kind, name, 0, size).view(reader.manifest.shapes[name])
    return found


def logits(run: Path) -> Tensor:
    model = read_model(load_config(run / "config.yaml"), Reader(step_of(run)), "weight")
    ids = torch.randint(256, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids, None, context(phase="dropless"), "logits")


def surgery(capsys: pytest.CaptureFixture[str], runs: Path, source: str, target: str, *words: str) -> str:
    """What it printed."""
    capsys.readouterr()
    first = next((at for at, word in enumerate(words) if word.startswith("--")), len(words))
    code = main(["experts", str(runs / source), *words[:first], "--output", str(runs / target), *words[first:]])
    forget_process_group()
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


def losses(said: str) -> tuple[float, float]:
    words = next(line for line in said.splitlines() if line.startswith("loss")).split()
    return float(words[1]), float(words[3])


def train(runs: Path, config: Path, *flags: str) -> list[dict[str, Any]]:
    """Its records."""
    assert main(["train", str(config), "--device", "cpu", *flags]) == 0
    forget_process_group()
    name = flags[flags.index("--run.name") + 1] if "--run.name" in flags else config.parent.name
    return [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]


def test_upcycling_keeps_the_function_and_is_trained_on(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All copies chosen, and few: the dense logits to 1e-5. Moments: a quarter, a sixteenth; then two steps more."""
    dense, expected = tensors(runs / "dense"), logits(runs / "dense")
    recorded = json.loads((runs / "dense" / "metrics.jsonl").read_text().splitlines()[-1])["validation_loss"]
    top = ("--model.moe.capacity-factor", "null", "--model.moe.top-k")
    for name, k in (("every", "4"), ("two", "2")):
        said = surgery(capsys, runs, "dense", name, "upcycle", "4", *top, k)
        assert "dense, d_ff 48" in said and "a copy's share of the dense layer's" in said
        before, after = losses(said)
        assert abs(before - recorded) < 1e-5 and abs(after - before) < 1e-5
        torch.testing.assert_close(logits(runs / name), expected, rtol=1e-5, atol=1e-5)
        for kind, power in zip(STATE_KINDS, (0, 1, 2), strict=True):
            held = tensors(runs / name)[kind]
            for matrix, linear in (("w_gate", "gate"), ("w_up", "up"), ("w_out", "down")):
                for value in held[f"{LAYER}experts.{matrix}"]:
                    torch.testing.assert_close(value, dense[kind][f"{LAYER}{linear}.weight"] / 4**power)
            same = [name for name in dense[kind] if "feed_forward." not in name]
            assert len(same) > 8 and all(torch.equal(held[name], dense[kind][name]) for name in same)
            assert power == 0 or bool((held[f"{LAYER}router.weight"] == 0).all())
        steps = [line["step"] for line in train(runs, runs / name / "config.yaml", "--resume", "--train.steps", "6")]
        assert steps == [5, 6]
    said = surgery(capsys, runs, "dense", "fine", "upcycle", "8", "--granularity", "2", "--moments", "zero", *top, "2")
    torch.testing.assert_close(logits(runs / "fine"), expected, rtol=1e-5, atol=1e-5)
    assert "8 experts, top 2" in said and "in changed layers are 0" in said
    held = tensors(runs / "fine")
    assert held["weight"][f"{LAYER}experts.w_up"].shape == (8, F // 2, D)
    assert bool((held["exp_avg"][f"{LAYER}experts.w_up"] == 0).all())
    assert torch.equal(held["exp_avg"]["embedding.weight"], dense["exp_avg"]["embedding.weight"])
    said = surgery(capsys, runs, "dense", "noisy", "upcycle", "4", "--noise", "0.3", *top, "2")
    before, after = losses(said)
    assert 1e-4 < abs(after - before) < 1.0


def test_split_merge_open_and_remove(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start, expected = tensors(runs / "moe"), logits(runs / "moe")
    said = surgery(capsys, runs, "moe", "split", "split", "2")
    before, after = losses(said)
    assert abs(before - after) < 1e-5 and "8 experts, top 4" in said
    torch.testing.assert_close(logits(runs / "split"), expected, rtol=1e-5, atol=1e-5)
    for kind, power in zip(STATE_KINDS[1:], (1, 2), strict=True):
        held, old = tensors(runs / "split")[kind], start[kind]
        parts = old[f"{LAYER}experts.w_up"].view(8, F // 2, D), old[f"{LAYER}experts.w_out"].view(8, F // 2, D)
        assert torch.equal(held[f"{LAYER}experts.w_up"], parts[0])
        torch.testing.assert_close(held[f"{LAYER}experts.w_out"], parts[1] / 2**power)
        rows = old[f"{LAYER}router.weight"].repeat_interleave(2, 0)
        torch.testing.assert_close(held[f"{LAYER}router.weight"], rows / 2**power)
    (record,) = train(runs, runs / "split" / "config.yaml", "--resume", "--train.steps", "5")
    assert record["step"] == 5

    surgery(capsys, runs, "moe", "merged", "merge", "0:0,2", "1:1,3", "--no-loss")
    for kind in STATE_KINDS:
        held, old = tensors(runs / "merged")[kind], start[kind]
        for block, (one, other), left in ((0, (0, 2), (1, 3)), (1, (1, 3), (0, 2))):
            name = f"blocks.{block}.feed_forward.experts.w_up"
            place = min(one, other)
            torch.testing.assert_close(held[name][place], (old[name][one] + old[name][other]) / 2)
            kept = [held[name][index] for index in range(3) if index != place]
            assert all(torch.equal(a, old[name][b]) for a, b in zip(kept, left, strict=True))

    surgery(capsys, runs, "moe", "more", "add", "2", "--sources", "loaded")
    assert torch.equal(logits(runs / "more"), expected)
    clones, name = tensors(runs / "more"), f"{LAYER}experts.w_up"
    assert any(torch.equal(clones["weight"][name][4], w) for w in start["weight"][name])
    assert bool((clones["exp_avg"][name][4:] == 0).all())
    said = surgery(capsys, runs, "more", "opened", "open", "1:4", "--no-loss")
    assert "they stay as they are" in said
    assert main(["experts", str(runs / "opened"), "list", "--evaluate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "5 validation sequences; loss" in lines[0]
    assert lines[1].startswith("layer 0: 6 experts of width 48, top 2; closed 4-5; load ")
    layer = next(line for line in lines if line.startswith("layer 1: "))
    assert "closed 5;" in layer and sum(line.startswith("  alike: ") for line in lines) == 4
    surgery(capsys, runs, "more", "less", "remove", "4,5", "--no-loss")
    back = tensors(runs / "less")
    assert all(torch.equal(back[kind][name], start[kind][name]) for kind in STATE_KINDS for name in start[kind])


def test_another_run_begins_with_what_came_out(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    surgery(capsys, runs, "dense", "base", "upcycle", "4", "--model.moe.top-k", "2", "--no-loss")
    flags = ("--run.name", "tuned", "--train.steps", "2", "--train.init-from", str(runs / "base"), "--train.freeze")
    records = train(runs, runs / "base" / "config.yaml", *flags, "*attention*", "embedding.*")
    said = capsys.readouterr().out
    assert "with the weights of" in said and "frozen    " in said and [line["step"] for line in records] == [1, 2]
    before, after = tensors(runs / "base")["weight"], Reader(runs / "tuned" / "checkpoints" / "step-000002")
    for name, values in before.items():
        same = torch.equal(after.read("weight", name, 0, values.numel()), values.flatten())
        assert same == ("attention" in name or "embedding" in name or "open_E" in name), name


def test_nothing_half_written_stays(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> str:
        raise OSError("disk full")

    there = sorted(os.listdir(runs))
    monkeypatch.setattr(checkpoints, "dump_config", fails)
    assert main(["experts", str(runs / "moe"), "add", "1", "--no-loss", "--output", str(runs / "half")]) == 1
    assert "disk full" in capsys.readouterr().err
    assert sorted(os.listdir(runs)) == there


@pytest.mark.parametrize(
    ("source", "words", "message"),
    [
        ("dense", "remove 1", "the decoder has no MoE layer"),
        ("moe", "upcycle 8", "has MoE layers of 4 experts: upcycle a dense model"),
        ("dense", "upcycle 8 --granularity 3", "granularity=3 must divide num_experts=8"),
        ("dense", "upcycle 8 --model.moe.num-shared-experts 1", "num_shared_experts=1 would be added"),
        ("dense", "upcycle 8 --model.d-ff 9", "--model.d-ff is no flag of it"),
        ("dense", "upcycle two", "upcycle takes one number, of experts in each MoE layer, not 'two'"),
        ("moe", "add 1 --granularity 2", "--granularity is of upcycle, not of add"),
        ("moe", "merge 0,1,2,3", "leaves 1 open experts, but top_k=2"),
        ("moe", "merge 0 1", "merge takes groups of two experts or more, as 0,5, not 0"),
        ("moe", "open 1:2", "experts [2] of layer 1 are open already"),
        ("moe", "add 1 --noise nan", "--noise nan must be 0 or more, and finite"),
        ("moe", "remove 7:1", "layer 7 has no experts: MoE layers are 0, 1"),
        ("moe", "remove 0:1", "the layers' configs differ"),
        ("moe", "close x", "names no experts: write 3"),
        ("moe", "explode 3", "'explode' is no action; choose list, upcycle"),
        ("moe", "list 3", "list takes no '3'"),
    ],
)
def test_refusals(runs: Path, capsys: pytest.CaptureFixture[str], source: str, words: str, message: str) -> None:
    output = [] if words.startswith("list") else ["--output", str(runs / "refused")]
    assert main(["experts", str(runs / source), *words.split(), *output]) == 2
    said = capsys.readouterr().err
    assert message in said, said
    assert not (runs / "refused").exists()


def test_nothing_is_written_into_the_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experts", str(runs / "moe"), "add", "1", "--output", str(runs / "moe" / "grown")]) == 2
    assert "in which nothing changes: name a folder beside it" in capsys.readouterr().err
