"""`moe-dist checkpoint inspect | verify | convert | diff`, on checkpoints of a model of three small tensors."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moe_dist.checkpoint import convert as convert_module
from moe_dist.checkpoint import reader as reader_module
from moe_dist.checkpoint.convert import cut
from moe_dist.checkpoint.layout import MANIFEST
from moe_dist.checkpoint.reader import Reader
from moe_dist.checkpoint.reshard import load, load_weights
from moe_dist.cli import main
from tests.unit.checkpoint.helpers import SHAPES, HoldsState, Model, alone, save


@pytest.fixture(autouse=True)
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(reader_module, "_CHUNK", 3)  # so that streams have several pieces
    with alone():
        yield


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "run" / "checkpoints", HoldsState(1), 7)


def command(*args: object) -> int:
    return main(["checkpoint", *map(str, args)])


def test_inspect(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (saved, saved.parent, saved.parent.parent):
        assert command("inspect", path) == 0
        printed = capsys.readouterr().out
        assert "step 7" in printed and "parameters  27 in 2 tensors" in printed and "optim.lr=0.5" in printed
        assert "experts  [4, 5]  weight F32, exp_avg F32, exp_avg_sq F32" in printed
        assert "open     [4]  weight F32  (no parameter: router state)" in printed
        assert "rank-00000.safetensors" in printed and "seed 3, next step 7" in printed


def test_verify_names_every_bad_file(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("convert", saved, saved.with_name("step-000007.old"), "--files", 3) == 0
    assert command("verify", tmp_path / "run") == 0
    assert capsys.readouterr().out.count("is whole: step 7") == 2
    bad = saved.with_name("step-000007.old")
    (bad / "part-00000.safetensors").write_bytes(b"rubbish")
    (bad / "part-00002.safetensors").unlink()
    assert command("verify", tmp_path / "run") == 1
    printed = capsys.readouterr().out
    assert f"{bad}/part-00000.safetensors has 7 bytes" in printed and "part-00002.safetensors is missing" in printed
    assert "part-00001" not in printed and f"{saved} is whole" in printed
    (saved / MANIFEST).write_text("{")
    assert command("verify", saved) == 1
    assert "not a readable manifest" in capsys.readouterr().out


@pytest.mark.parametrize("files", [1, 5])
def test_convert_to_more_files_keeps_every_bit(saved: Path, files: int) -> None:
    """85 elements: 31 of weights and state, 27 and 27 of moments."""
    target = saved.parent / "converted"
    assert command("convert", saved, target, "--files", files) == 0
    parts = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(parts) == files
    numbers = [sum(piece.length for piece in shard.ranges) for shard in Reader(target).manifest.files]
    assert sum(numbers) == 85 and max(numbers) - min(numbers) <= 1
    engine, expected = HoldsState(), HoldsState(1)
    assert load(target, engine).step == 7  # type: ignore[arg-type]
    for kind, tensors in expected.state.items():
        assert all(torch.equal(engine.state[kind][name], values) for name, values in tensors.items())
    assert command("diff", saved, target) == 0


def test_convert_precision_and_weights_alone(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    low = saved.parent / "low"
    assert command("convert", saved, low, "--dtype", "bf16", "--weights-only") == 0
    expected = HoldsState(1).state["weight"]
    with safe_open(low / "part-00000.safetensors", framework="pt") as file:
        assert {key: file.get_tensor(key).dtype for key in file.keys()} == {  # noqa: SIM118 (no mapping)
            "weight/experts/0": torch.bfloat16,
            "weight/norm/0": torch.bfloat16,
            "weight/open/0": torch.float32,
        }
    model = Model()
    load_weights(low, model)
    assert torch.equal(model.experts, expected["experts"].bfloat16().float())
    assert torch.equal(model.get_buffer("open"), expected["open"])
    with pytest.raises(ValueError, match="holds weights alone, no optimizer state"):
        load(low, HoldsState())  # type: ignore[arg-type]
    back = saved.parent / "back"
    assert command("convert", low, back, "--dtype", "fp32") == 0
    assert {Reader(back).dtypes("weight", name)[0] for name in SHAPES} == {"F32"}
    capsys.readouterr()
    assert command("diff", low, back) == 0 and command("diff", saved, back) == 1
    printed = capsys.readouterr().out
    gap = (expected["norm"] - expected["norm"].bfloat16().float()).abs().max().item()
    assert f"norm: largest difference weight {gap:.3g}\n" in printed
    assert "moments are not compared" in printed and "1 of 3 parameters are equal" in printed


def test_convert_refuses(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = saved.parent / "new"
    assert command("convert", saved, saved) == 2
    assert "is there already" in capsys.readouterr().err
    for files in (0, 86):
        assert command("convert", saved, target, "--files", files) == 2
        assert f"files={files} is outside 1 to 85" in capsys.readouterr().err
    shard = saved / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert command("convert", saved, target) == 2
    assert f"{shard} does not match its SHA-256" in capsys.readouterr().err
    assert os.listdir(saved.parent) == [saved.name]
    assert command("diff", saved, saved) == 2
    assert f"{shard} does not match its SHA-256" in capsys.readouterr().err
    assert command("inspect", saved.parent / "nowhere") == 2
    assert "is neither a checkpoint nor a run with one" in capsys.readouterr().err


def test_convert_refuses_a_name_under_which_nobody_would_read_it(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (saved.parent / "link").symlink_to("nowhere")
    for name, words in (("step-000009", "is of step 7"), ("link", "is there already")):
        assert command("convert", saved, saved.with_name(name)) == 2
        assert words in capsys.readouterr().err
    assert sorted(os.listdir(saved.parent)) == ["link", saved.name]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_conversion_cut_short_leaves_nothing(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def write(path: Path, text: str) -> None:
        raise error

    monkeypatch.setattr(convert_module, "write_durably", write)
    assert command("convert", saved, saved.with_name("new")) == (1 if isinstance(error, OSError) else 130)
    assert os.listdir(saved.parent) == [saved.name]


def test_of_a_run_the_newest_whole_one_is_taken(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what was passed over is said; all damaged is an error that names them."""
    run, target = saved.parents[1], saved.parents[2] / "target"
    newer = save(saved.parent, HoldsState(2), 8)
    shard = newer / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    said = f"passed over: {shard} does not match its SHA-256 in the manifest\n"
    assert command("convert", run, target) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{saved} written to {target}\n" and printed.err == said
    assert command("diff", saved, run) == 0
    assert capsys.readouterr().err == said
    assert command("inspect", run) == 0  # what is there, damaged or not
    assert "step 8" in capsys.readouterr().out
    (saved / "rank-00000.safetensors").unlink()
    assert command("diff", target, run) == 2
    printed = capsys.readouterr()
    assert "step-000007" in printed.err and "step-000008" in printed.err and printed.out == ""


def test_diff_names_the_largest_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = HoldsState(1), HoldsState(1)
    second.state["weight"]["experts"][1, 2] += 0.5
    second.state["weight"]["experts"][3, 4] -= 2.0
    second.state["exp_avg_sq"]["experts"][0, 0] = float("nan")
    for engine in (first, second):
        engine.state["exp_avg"]["norm"][3] = float("nan")  # the same on both sides is no difference
        engine.state["exp_avg"]["norm"][4] = float("inf")
    a, b = save(tmp_path / "a", first, 7), save(tmp_path / "b", second, 8)
    assert command("diff", a, b) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "steps 7 and 8",
        "experts: largest difference weight 2, exp_avg 0, exp_avg_sq nan",
        "2 of 3 parameters are equal",
    ]


def test_cut_by_hand() -> None:
    tensors = [("weight", "a", 3), ("weight", "b", 4), ("exp_avg", "a", 3)]
    assert [part[0] for part in cut(tensors, 10)][6:] == [
        ("weight", "b", 3, 1),
        *(("exp_avg", "a", i, 1) for i in range(3)),
    ]  # type: ignore[arg-type]
    assert list(cut(tensors, 3)) == [  # type: ignore[arg-type]
        [("weight", "a", 0, 3)],
        [("weight", "b", 0, 3)],
        [("weight", "b", 3, 1), ("exp_avg", "a", 0, 3)],
    ]
