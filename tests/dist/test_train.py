"""`moe-dist train` from end to end, as a user starts it: run folder, refusals, death, exact resume, layouts.

Runs that others are compared with start faster (`forked`): no bit may depend on it.
"""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from moe_dist.chaos.fault import Fault, Plan
from moe_dist.chaos.ranks import Ranks
from moe_dist.checkpoint.reshard import Reader
from moe_dist.cli import main
from moe_dist.config import Config
from moe_dist.config.load import load_config
from moe_dist.disk import locked
from moe_dist.train.record.board import SYSTEM
from tests.dist.helpers import TINY, forget_process_group
from tests.dist.programs import forked_ranks

ROOT = Path(__file__).parents[2]
KEYS = {
    *("step", "loss", "aux_loss", "grad_norm", "lr", "tokens_per_second", "step_seconds", "tflops", "mfu"),
    *("tflops_executed", "mfu_executed"),
    *("memory_bytes", "drop_rate", "unserved_rate", "over_budget_rows", "load_max_over_mean", "balance_loss", "z_loss"),
    *("router_entropy", "layers"),
    *("dispatch_bytes", "dispatch_rows_bytes", "kept_seconds"),
}
EVALUATION_KEYS = {"validation_loss", "validation_bits_per_byte", "validation_loss_capped"}
SAME_NUMBERS = EVALUATION_KEYS | {"loss", "aux_loss", "grad_norm", "balance_loss", "z_loss", "router_entropy"}
STEPS, SAVE_EVERY, KILLED_AT = 20, 10, 13
DROPPED = (
    *("dropped_by_expert", "dropped_by_place", "dropped_by_micro_step_place", "dropped_by_frequency"),
    "over_budget_by_pool",
)
ZERO1 = ("--engine.name", "deepspeed", "--engine.zero-stage", "1")


def write_config(folder: Path) -> Path:
    """A run of 20 steps on a text made of the numbers from 0 on."""
    text = folder / "text.txt"
    text.write_text(" ".join(str(number * number) for number in range(4000)))
    values: dict[str, Any] = {
        "model": TINY["model"] | {"moe": TINY["model"]["moe"] | {"capacity_factor": 1.0, "eval_capacity_factor": 1.0}},
        "optim": {"lr": 3e-3, "warmup_steps": 5, "eps": 1e-6},
        "data": {"kind": "text", "paths": [str(text)]},
        "train": TINY["train"] | {"steps": STEPS, "accumulation": 2, "threads": 1},
        "run": {
            "root": str(folder / "runs"),
            "save_every": SAVE_EVERY,
            "eval_every": SAVE_EVERY,
            "eval_sequences": 6,
            "keep_last": 3,
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(
    ranks: int,
    folder: Path,
    name: str,
    *flags: str,
    killed_at: int | None = None,
    works: bool = True,
    unlike: bool = False,
) -> str:
    """torchrun, as documented; or with a rank 0 that is killed after step `killed_at`; or with another optim.lr on rank
    1. What it printed."""
    torchrun = [sys.executable, "-m", "moe_dist.parallel.torchrun", "--nproc_per_node", str(ranks)]
    program = ["-m", "moe_dist.cli"]
    if unlike:
        program = [str(folder / "unlike.py")]
        (folder / "unlike.py").write_text(
            "import os, sys\nfrom moe_dist.cli import main\n"
            "sys.exit(main([*sys.argv[1:], '--optim.lr', '0.5'] if os.environ['RANK'] == '1' else sys.argv[1:]))\n"
        )
    if killed_at is not None:
        program = ["-m", *killed(folder, name, killed_at)]
    command = [*torchrun, *program, "train", str(folder / "tiny.yaml"), "--run.name", name, *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    printed = done.stdout + done.stderr
    assert (done.returncode == 0) is works, printed
    return printed


def forked(ranks: int, folder: Path, name: str, *flags: str, killed_at: int | None = None) -> None:
    """The same command without torchrun, by ranks that have imported everything."""
    program = ["moe_dist.cli"] if killed_at is None else killed(folder, name, killed_at)
    command, log = [*program, "train", str(folder / "tiny.yaml"), "--run.name", name, *flags], folder / f"{name}.log"
    with forked_ranks(), Ranks(command, ranks, log) as started:
        ends = started.wait(200, lambda: 20.0)
    codes = [end.code for end in ends]
    assert codes == [0] * ranks if killed_at is None else codes[0] == -9 and 0 not in codes, log.read_text()


def killed(folder: Path, name: str, step: int) -> list[str]:
    """The module, and its first argument, that kills rank 0 after that step."""
    fault = Fault(kind="kill", rank=0, step=step + 1, phase="data")
    plan = Plan(faults=[fault], journal=str(folder), checkpoints=str(folder / "runs" / name / "checkpoints"))
    (folder / "plan.json").write_text(json.dumps(asdict(plan)))
    return ["moe_dist.chaos.inject", str(folder / "plan.json")]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def deterministic(run: Path) -> list[dict[str, Any]]:
    """What must repeat bit by bit: everything but the speed of the machine."""
    return [{key: value for key, value in record.items() if key not in SYSTEM} for record in records(run)]


def stored(run: Path, step: int) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"step-{step:06d}"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def check_run_folder(run: Path, config_file: Path, world: int, ep: int) -> None:
    config, given = load_config(run / "config.yaml"), load_config(config_file)
    assert config.model.moe.dispatch == ("local" if ep == 1 else "all_to_all")  # resolved, not auto
    resolved: Config = replace(
        given, model=config.model, parallel=config.parallel, run=replace(given.run, name=run.name)
    )
    assert config == resolved
    environment = json.loads((run / "environment.json").read_text())
    assert environment["layout"] == {"world": world, "dp": world, "tp": 1, "ep": ep, "etp": 1, "edp": world // ep}
    assert environment["packages"]["torch"] and environment["backends"]["experts"] != "auto"
    assert json.loads((run / "status.json").read_text()) == {"state": "finished", "step": STEPS}
    assert [path.name for path in sorted((run / "logs").iterdir())] == [f"rank-{r:05d}.log" for r in range(world)]

    lines = records(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        evaluated = EVALUATION_KEYS if line["step"] % SAVE_EVERY == 0 else set()
        assert set(line) == KEYS | evaluated | ({"timing"} if line["step"] > 1 else set())
        assert line["drop_rate"] > 0 and [layer["layer"] for layer in line["layers"]] == [0, 1]
        assert all(sum(layer["load"]) == 8 * 16 * 2 for layer in line["layers"])  # every assignment of the global batch
        for layer in line["layers"]:
            lost = [sum(layer[name]) for name in DROPPED]
            assert lost == [round(layer["drop_rate"] * 8 * 16 * 2)] * len(DROPPED)
            assert sum(layer["load_by_frequency"]) == sum(layer["load"])
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    check_tensorboard(run / "tensorboard", lines)

    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-000010", "step-000020"]
    reader = Reader(run / "checkpoints" / "step-000020")
    assert reader.manifest.step == STEPS and reader.check_digests(0, 1) == []
    shapes = {name: shape for name, shape in reader.manifest.shapes.items() if ".router.open_E" not in name}
    for name, shape in shapes.items():
        size = 1
        for length in shape:
            size *= length
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert reader.read(kind, name, 0, size).isfinite().all()
    for shard in reader.manifest.files:
        with safe_open(reader.folder / shard.file, framework="pt") as file:
            assert sorted(file.keys()) == sorted(stored_range.key for stored_range in shard.ranges)


def check_tensorboard(folder: Path, lines: list[dict[str, Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder))
    board.Reload()
    points = board.Scalars("train/loss")
    assert [point.step for point in points] == [line["step"] for line in lines]
    assert all(abs(p.value - line["loss"]) < 1e-5 for p, line in zip(points, lines, strict=True))
    tags = {"validation/loss", "moe/drop_rate", "moe/layer_1/drop_rate", "system/mfu", "time/dispatch_wait"}
    assert tags <= set(board.Tags()["scalars"])


def check_second_starts(folder: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused in words, with nothing touched; and a finished run that is resumed has nothing to do."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command = ["train", str(folder / "tiny.yaml"), "--run.name", run.name, "--device", "cpu"]
    for flags, words in (
        ((), "already holds a run: continue it with --resume, or choose another --run.name"),
        (("--resume", "--train.seed", "5"), "was trained with seed=0, not 5"),
        (("--resume", "--model.num-layers", "1"), "was trained with model.num_layers=2, not 1: a resumed run"),
    ):
        capsys.readouterr()
        assert main([*command, *flags]) == 2
        assert words in capsys.readouterr().err
        forget_process_group()
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    with locked(run / "run.lock"):
        assert main([*command, "--resume"]) == 2
        assert f"{run} is in use by another process" in capsys.readouterr().err
        forget_process_group()
        assert main(["status", *command[1:]]) == 0
    numbers, checkpoint = deterministic(run), stored(run, STEPS)
    assert main([*command, "--resume"]) == 0
    assert (deterministic(run), stored(run, STEPS)) == (numbers, checkpoint)
    fresh = ["train", str(folder / "tiny.yaml"), "--run.name", "fresh", "--resume"]
    assert main(fresh) == 2
    assert "holds no complete checkpoint to resume from: start without --resume" in capsys.readouterr().err
    assert not (run.parent / "fresh").exists()


def check_killed_and_resumed(folder: Path, name: str, flags: tuple[str, ...], torchrun: bool) -> None:
    """Rank 0 is killed three steps after its checkpoint, in the middle of a line; the run goes on from there."""
    run, whole = folder / "runs" / f"{name}-killed", folder / "runs" / name
    if torchrun:
        said = start(2, folder, run.name, *flags, killed_at=KILLED_AT, works=False)
        by_whom = f"moe-dist: rank 0 on {socket.gethostname()} died of signal 9 (SIGKILL): by the system for want of"
        assert by_whom in said and "Traceback" not in said
    else:
        forked(2, folder, run.name, *flags, killed_at=KILLED_AT)
    assert [record["step"] for record in records(run)] == list(range(1, KILLED_AT + 1))
    assert json.loads((run / "status.json").read_text())["state"] != "finished"
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "los')
    draft = run / "checkpoints" / ".step-000020"  # as if killed while saving
    draft.mkdir()
    (draft / "rank-00001.safetensors").write_bytes(b"half")
    resume = start if torchrun else forked
    resume(2, folder, run.name, *flags, "--resume", "--run.async-save")  # which writes the same bytes
    assert deterministic(run) == deterministic(whole)
    assert stored(run, STEPS) == stored(whole, STEPS)
    assert json.loads((run / "status.json").read_text()) == {"state": "finished", "step": STEPS}
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-000010", "step-000020"]


@pytest.mark.parametrize("engine", ["native", "zero1"])
def test_a_killed_run_resumes_bit_by_bit(engine: str, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    flags = ("--parallel.ep", "2", *(ZERO1 if engine == "zero1" else ()))
    forked(2, tmp_path, engine, *flags)
    if engine == "native":
        check_run_folder(tmp_path / "runs" / engine, config, world=2, ep=2)
    check_killed_and_resumed(tmp_path, engine, flags, torchrun=engine == "native")


def test_one_rank_two_experts_groups_two_tensor_slices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same losses from the command line, whatever the layout, as `train.accumulation` is fixed."""
    config, runs = write_config(tmp_path), tmp_path / "runs"
    assert main(["train", str(config), "--run.name", "one", "--run.sample-tokens", "8"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"step 20/20 .*loss", printed) and "sample after" in printed
    check_run_folder_of_one(runs / "one", config)
    forked(2, tmp_path, "tp2", "--parallel.tp", "2", "--parallel.sequence-parallel")
    forked(2, tmp_path, "ep2", "--parallel.ep", "2", *ZERO1)
    refusal = start(2, tmp_path, "tp2", "--parallel.tp", "2", works=False)
    assert refusal.count("already holds a run") == 1 and refusal.count("\n") == 2, refusal  # said by one rank of two
    assert f" on {socket.gethostname()} ended with exit code 2\n" in refusal
    refusal = start(2, tmp_path, "unlike", unlike=True, works=False)
    assert "moe-dist: ranks do not start the same run: optim.lr is 0.003 on rank 0, 0.5 on rank 1: give" in refusal
    assert refusal.count("\n") == 2 and not (runs / "unlike").exists(), refusal
    one = records(runs / "one")
    for name in ("tp2", "ep2"):
        for record, reference in zip(records(runs / name), one, strict=True):
            for key in ("loss", "aux_loss", "grad_norm", "balance_loss", "z_loss", "router_entropy"):
                assert record[key] == pytest.approx(reference[key], rel=1e-5, abs=1e-5), (
                    f"{name}, {key}: {record['step']}"
                )
            for key in EVALUATION_KEYS & set(reference):
                assert record[key] == pytest.approx(reference[key], rel=1e-5, abs=1e-5), f"{name}, {key}"
            assert [layer["load"] for layer in record["layers"]] == [layer["load"] for layer in reference["layers"]]
            assert record["drop_rate"] == reference["drop_rate"]
            for key in (*DROPPED, "load_by_frequency"):
                assert [layer[key] for layer in record["layers"]] == [layer[key] for layer in reference["layers"]]
    check_second_starts(tmp_path, runs / "one", capsys)


def check_run_folder_of_one(run: Path, config_file: Path) -> None:
    assert load_config(run / "config.yaml").run.sample_tokens == 8
    assert [record["step"] for record in records(run)] == list(range(1, STEPS + 1))
    assert json.loads((run / "environment.json").read_text())["layout"]["world"] == 1
    assert load_config(run / "config.yaml").data == load_config(config_file).data
