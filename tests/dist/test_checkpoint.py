"""Saving under one layout and loading under any other; damage and failures, which every rank must hear of.

Saves in line and in the background; the same bytes come out.
"""

import hashlib
import json
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moe_dist.checkpoint import store
from moe_dist.checkpoint.background import Saver
from moe_dist.checkpoint.layout import Manifest, RunInfo
from moe_dist.checkpoint.reshard import load, newest_good
from moe_dist.checkpoint.retention import Retention
from moe_dist.checkpoint.store import checkpoints
from moe_dist.engine.base import STATE_KINDS, Engine
from moe_dist.parallel.mesh import create_mesh
from tests.dist.helpers import TinyRun, assert_same, logical, raised, run_checks, tiny_config

NATIVE = {"parallel__ep": 2, "parallel__tp": 2}
DEEPSPEED = {"engine__name": "deepspeed"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "native": NATIVE,
    "native-sp-ep4": {"parallel__ep": 4, "parallel__tp": 2, "parallel__sequence_parallel": True},
    "native-etp2": {"parallel__ep": 2, "parallel__etp": 2},
    "zero1-etp4-tp2": DEEPSPEED | {"engine__zero_stage": 1, "parallel__etp": 4, "parallel__tp": 2},
    "zero0": DEEPSPEED | {"parallel__ep": 2},
    "zero1-ep4": DEEPSPEED | {"engine__zero_stage": 1, "parallel__ep": 4},
    "zero1-ep2-tp2": DEEPSPEED | {"engine__zero_stage": 1} | NATIVE,
    "zero2": DEEPSPEED | {"engine__zero_stage": 2},
    "zero3": DEEPSPEED | {"engine__zero_stage": 3},
    "zero3-ep2-tp2": DEEPSPEED | {"engine__zero_stage": 3} | NATIVE,
    "zero3-ep4": DEEPSPEED | {"engine__zero_stage": 3, "parallel__ep": 4},
    "zero1-bf16": DEEPSPEED | {"engine__zero_stage": 1, "engine__precision": "bf16", "parallel__ep": 2},
    "zero2-bf16": DEEPSPEED | {"engine__zero_stage": 2, "engine__precision": "bf16", "parallel__ep": 2},
    "zero3-bf16": DEEPSPEED | {"engine__zero_stage": 3, "engine__precision": "bf16", "parallel__ep": 2},
}
# A router whose balancing bias is state that no optimizer holds.
BALANCED = {"model__moe__router": "sigmoid", "model__moe__bias_update_rate": 0.01}
# Parameters that are cut, that all ranks hold, and of which a rank's query heads read a part.
OPTIONS: dict[str, Any] = {
    "model__num_heads": 12,
    "model__num_kv_heads": 3,
    "model__head_dim": 4,
    "model__activation": "clamped_swiglu",
    "model__attention": {"qkv_bias": True, "out_bias": True, "qk_norm": "width", "sinks": True, "window": [4, None]},
    "model__moe__first": 1,
    "model__moe__router_bias": True,
    "model__moe__out_bias": True,
    "model__moe__num_shared_experts": 1,
    "model__moe__shared_d_ff": 24,
    "model__moe__shared_gate": True,
}
RUN = {"data": "nothing"}
SAVED, CONTINUED = 3, 6
OTHER_WEIGHTS = {"train__seed": 1}  # what a load must overwrite

State = dict[str, dict[str, torch.Tensor]]


def start(changes: dict[str, Any]) -> TinyRun:
    config = tiny_config(**BALANCED | changes)
    return TinyRun(config, create_mesh(config.parallel.ep, config.parallel.tp, config.parallel.etp))


def saver(root: Path, engine: Engine, keep_last: int = 1, background: bool = False) -> Saver:
    return Saver(root, engine.mesh, Retention(keep_last=keep_last), RunInfo(run=RUN), background)


def save(root: Path, engine: Engine, step: int, keep_last: int = 1, background: bool = False) -> Path:
    with saver(root, engine, keep_last, background) as by:
        return by.save(engine, step)


def state(run: TinyRun) -> State:
    return {kind: logical(run.engine, kind) for kind in STATE_KINDS}


def assert_same_state(actual: State, expected: State) -> None:
    for kind in STATE_KINDS:
        assert_same(actual[kind], expected[kind])


def assert_close_losses(actual: list[float], expected: list[float], tolerance: float, what: str) -> None:
    assert all(abs(a - b) <= tolerance for a, b in zip(actual, expected, strict=True)), (what, actual, expected)


def check_native_to_any_layout_and_back(folder: str, layouts: list[str]) -> None:
    """Weights and moments are bit-equal by logical parameter, and the losses go on the same.

    What a layout saved and loads again goes on bit by bit.
    """
    run = start(NATIVE)
    run.train(0, SAVED)
    path = save(Path(folder) / "first", run.engine, SAVED)
    saved = state(run)
    assert saved["weight"]["blocks.0.feed_forward.router.bias_E"].abs().max() > 0
    w_up = saved["weight"]["blocks.0.feed_forward.experts.w_up"]
    assert len({tuple(expert.flatten()[:4].tolist()) for expert in w_up}) == len(w_up), "experts must be distinct"
    losses = run.train(SAVED, CONTINUED)
    if dist.get_rank() == 0:
        (Path(folder) / "losses.json").write_text(json.dumps(losses))
    for name in layouts:
        changes = LAYOUTS[name]
        tolerance = 2e-2 if "bf16" in name else 1e-5
        layout = start(changes | OTHER_WEIGHTS)
        assert load(path, layout.engine).step == SAVED
        assert_same_state(state(layout), saved)
        assert_close_losses(layout.train(SAVED, CONTINUED), losses, tolerance, f"native to {name}")

        saved_there = save(Path(folder) / name, layout.engine, CONTINUED)
        # Not to the element: ZeRO cuts what is replicated and what lies on one tp rank alone at the same place.
        sizes = [sum(piece.bytes for piece in shard.ranges) for shard in Manifest.load(saved_there).files]
        assert len(sizes) == 4 and max(sizes) < 1.03 * sum(sizes) / 4, (name, sizes)
        there = state(layout)
        native, again = start(NATIVE | OTHER_WEIGHTS), start(changes | OTHER_WEIGHTS)
        for other in (native, again):
            load(saved_there, other.engine)
            assert_same_state(state(other), there)
        more = layout.train(CONTINUED, CONTINUED + 2)
        assert_close_losses(native.train(CONTINUED, CONTINUED + 2), more, tolerance, f"{name} to native")
        assert_close_losses(again.train(CONTINUED, CONTINUED + 2), more, 0.0, f"{name} to itself")
        assert_same_state(state(again), state(layout))


def check_options_travel(folder: str) -> None:
    """What families of models have beside the plain layers, in layouts that cut it otherwise."""
    run = start(NATIVE | OPTIONS)
    run.train(0, SAVED)
    path = save(Path(folder) / "options", run.engine, SAVED)
    saved = state(run)
    for name, value in saved["weight"].items():
        if "bias" in name or "qk_norm" in name or "sinks" in name:
            assert len(set(value.flatten().tolist())) == value.numel(), f"{name} must have learned"
    losses = run.train(SAVED, CONTINUED)
    for name in ("native-sp-ep4", "zero3-ep2-tp2", "zero0"):
        layout = start(LAYOUTS[name] | OPTIONS | OTHER_WEIGHTS)
        load(path, layout.engine)
        assert_same_state(state(layout), saved)
        assert_close_losses(layout.train(SAVED, CONTINUED), losses, 1e-5, f"options, native to {name}")


def check_one_process_saves(folder: str) -> None:
    run = start({})
    run.train(0, SAVED)
    save(Path(folder) / "alone", run.engine, SAVED)
    torch.save(state(run), Path(folder) / "alone.pt")


def check_four_ranks_continue_one(folder: str) -> None:
    saved = torch.load(Path(folder) / "alone.pt", weights_only=True)
    for name in ("native", "zero1-ep4", "zero3-ep2-tp2"):
        run = start(LAYOUTS[name] | OTHER_WEIGHTS)
        load(Path(folder) / "alone" / "step-000003", run.engine)
        assert_same_state(state(run), saved)


def check_one_process_continues_four(folder: str) -> None:
    losses = json.loads((Path(folder) / "losses.json").read_text())
    for changes in ({}, DEEPSPEED | {"engine__zero_stage": 2}, DEEPSPEED | {"engine__zero_stage": 3}):
        run = start(changes | OTHER_WEIGHTS)
        load(Path(folder) / "first" / "step-000003", run.engine)
        assert_close_losses(run.train(SAVED, CONTINUED), losses, 1e-5, "four to one")


def check_damage_is_named_on_every_rank(folder: str) -> None:
    """One flipped byte, in each file in turn; then a lost file, a shortened one, and a manifest that is none."""
    run, root = start(NATIVE), Path(folder) / "damaged"
    path = save(root, run.engine, 1)
    for index in range(4):
        file = path / f"rank-{index:05d}.safetensors"
        whole = file.read_bytes()
        dist.barrier()
        cut = len(whole) // 2
        for damaged in (whole[:cut] + bytes([whole[cut] ^ 1]) + whole[cut + 1 :], whole[:-1], None):
            if dist.get_rank() == 0:
                file.unlink() if damaged is None else file.write_bytes(damaged)
            dist.barrier()
            message = raised(ValueError, load, path, run.engine)
            assert str(file) in message and "rank-" not in message.replace(str(file), ""), message
            dist.barrier()
            if dist.get_rank() == 0:
                file.write_bytes(whole)
            dist.barrier()
    load(path, run.engine)
    dist.barrier()
    if dist.get_rank() == 0:
        (path / "manifest.json").write_text('{"format": 2, "step": 1}')
    dist.barrier()
    assert "not a readable manifest" in raised(ValueError, load, path, run.engine)
    assert "all checkpoints under" in raised(ValueError, newest_good, root)
    assert "manifest" in raised(ValueError, load, root / "step-000009", run.engine)
    dist.barrier()


def check_another_model_is_refused_on_every_rank(folder: str) -> None:
    """Also under ZeRO, where most ranks hold nothing of the parameter that differs."""
    path = save(Path(folder) / "model", start(NATIVE).engine, 1)
    for changes, name in (
        (
            {"model__moe__num_experts": 8},
            "w_gate has shape [4, 48, 32] in the checkpoint, but has shape [8, 48, 32] here",
        ),
        ({"model__num_layers": 3}, "blocks.2.attention.key_value.weight is absent in the checkpoint"),
        (
            {"model__num_layers": 1},
            "blocks.1.attention.key_value.weight has shape [16, 32] in the checkpoint, but is absent",
        ),
        ({"model__moe__num_shared_experts": 1}, "shared.down.weight is absent in the checkpoint"),
    ):
        for layout in (NATIVE, LAYOUTS["zero1-ep4"], LAYOUTS["zero3-ep2-tp2"]):
            run = start(layout | changes)
            message = raised(ValueError, load, path, run.engine)
            assert name in message, message


def check_a_failing_rank_fails_all_and_harms_nothing(folder: str) -> None:
    """The disk fills up while one rank writes its file, or rank 0 the manifest; in line and in the background."""
    run, root = start(NATIVE), Path(folder) / "failing"
    first = save(root, run.engine, 1)
    before = logical(run.engine, "weight")
    full = OSError(28, "No space left on device")
    for rank, what in ((2, "write_shard"), (0, "flush"), (0, "write_durably"), (0, "_commit")):
        for background in (False, True):
            broken = mock.patch.object(store, what, side_effect=full) if dist.get_rank() == rank else nullcontext()
            with broken:
                message = raised(RuntimeError, save, root, run.engine, 2, 1, background)
            assert f"rank {rank}: [Errno 28] No space left on device" in message, message
            dist.barrier()
            assert [path.name for path in root.iterdir()] == ["step-000001"], what
            dist.barrier()
    load(first, run.engine)
    assert_same(logical(run.engine, "weight"), before)


def check_rubbish_goes_and_enough_stays(folder: str) -> None:
    """keep_last counts complete checkpoints; drafts and half-removed folders of a killed run are swept up."""
    run, root = start(NATIVE), Path(folder) / "pruned"
    if dist.get_rank() == 0:
        for name in (".step-000007", "step-000001"):
            (root / name).mkdir(parents=True)
            (root / name / "rank-00000.safetensors").write_bytes(b"half")
        (root / "step-of-mine").mkdir()
    dist.barrier()
    for step in (2, 4, 6):
        save(root, run.engine, step, keep_last=2, background=step == 4)
    save(root, run.engine, 6, keep_last=2)  # the same step again
    assert sorted(path.name for path in root.iterdir()) == ["step-000004", "step-000006", "step-of-mine"]
    assert [path.name for path in checkpoints(root)] == ["step-000004", "step-000006"]
    assert all(load(path, run.engine).run == RUN for path in checkpoints(root))


def check_the_background_writes_the_same_while_steps_run(folder: str) -> None:
    """Values are those at the moment of the save; nobody waits for the disk, but the next save for this one."""
    for name in ("native", "zero1-ep4"):
        run = start(LAYOUTS[name])
        run.train(0, 2)
        inline = save(Path(folder) / f"{name}-inline", run.engine, 2)
        slow, begun = threading.Event(), threading.Event()
        write = store.write_shard

        def held_up(*args: Any, begun=begun, slow=slow, write=write) -> Any:
            begun.set()
            assert slow.wait(60)
            return write(*args)

        said: list[str] = []
        with mock.patch.object(store, "write_shard", held_up):
            root = Path(folder) / f"{name}-background"
            by = Saver(root, run.mesh, Retention(keep_last=2), RunInfo(run=RUN), background=True, say=said.append)
            path = by.save(run.engine, 2)
            for step in (2, 3):
                assert begun.wait(60)
                run.train(step, step + 1)
                by.raise_pending()
                assert checkpoints(root) == [] and not said
            threading.Timer(0.2, slow.set).start()
            by.save(run.engine, 4)
            assert said == (["checkpoint of step 2 is still being written; waiting for it"] * (dist.get_rank() == 0))
            by.wait()
        by.raise_pending()
        assert [found.name for found in checkpoints(root)] == ["step-000002", "step-000004"]
        dist.barrier()
        assert digests(path) == digests(inline)
        assert newest_good(root) == (root / "step-000004", [])


def check_an_error_in_the_background_comes_at_a_boundary(folder: str) -> None:
    """On every rank at the same one, though one rank's thread alone met it; the saver then goes on."""
    run, root = start(NATIVE), Path(folder) / "background-failing"
    by = saver(root, run.engine, background=True)
    full = OSError(28, "No space left on device")
    broken = mock.patch.object(store, "write_shard", side_effect=full) if dist.get_rank() == 3 else nullcontext()
    with broken:
        by.save(run.engine, 1)
        for step in range(1000):
            run.train(step, step + 1)
            try:
                by.raise_pending()
            except RuntimeError as error:
                assert "step-000001 was not written: rank 3: [Errno 28]" in str(error)
                break
        else:
            raise AssertionError("no error came")
    steps: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(steps, step)
    assert len(set(steps)) == 1
    by.raise_pending()
    by.save(run.engine, 2)
    by.wait()
    assert [path.name for path in root.iterdir()] == ["step-000002"]


def check_fall_back(folder: str) -> None:
    """A flipped bit that one rank sees; all take the step before, and are told why."""
    run, root = start(NATIVE), Path(folder) / "fall-back"
    assert newest_good(root) == (None, [])
    for step in (1, 2):
        path = save(root, run.engine, step, keep_last=2)
    bad = path / "rank-00003.safetensors"
    if dist.get_rank() == 0:
        data = bytearray(bad.read_bytes())
        data[-1] ^= 1
        bad.write_bytes(data)
    dist.barrier()
    assert newest_good(root) == (root / "step-000001", [f"{bad} does not match its SHA-256 in the manifest"])


def digests(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


def check_native_to_some(folder: str) -> None:
    check_native_to_any_layout_and_back(folder, ["native-etp2", "zero1-ep2-tp2", "zero2-bf16", "zero3"])


def check_native_to_all(folder: str) -> None:
    check_native_to_any_layout_and_back(folder, list(LAYOUTS))


MATRIX = [
    "native",
    "native-sp-ep4",
    "native-etp2",
    "zero0",
    "zero1-ep4",
    "zero1-ep2-tp2",
    "zero2",
    "zero3",
]


def check_matrix(folder: str) -> None:
    """Each of eight layouts, trained and saved, in all eight: the same state, and the same next ten losses."""
    for name in MATRIX:
        run = start(LAYOUTS[name])
        run.train(0, SAVED)
        path = save(Path(folder) / name, run.engine, SAVED)
        saved = state(run)
        w_up = saved["weight"]["blocks.0.feed_forward.experts.w_up"]
        assert len({tuple(expert.flatten()[:4].tolist()) for expert in w_up}) == len(w_up), "experts must be distinct"
        losses = run.train(SAVED, SAVED + 10)
        for other in MATRIX:
            there = start(LAYOUTS[other] | OTHER_WEIGHTS)
            load(path, there.engine)
            assert_same_state(state(there), saved)
            assert_close_losses(there.train(SAVED, SAVED + 10), losses, 1e-5, f"{name} to {other}")


@pytest.mark.slow
def test_eight_layouts_into_each_other(tmp_path: Path) -> None:
    run_checks(4, [check_matrix], str(tmp_path))


@pytest.mark.slow
def test_native_to_all_layouts_and_back(tmp_path: Path) -> None:
    run_checks(4, [check_native_to_all], str(tmp_path))


def test_any_layout_to_any_other(tmp_path: Path) -> None:
    folder = str(tmp_path)
    run_checks(1, [check_one_process_saves], folder)
    run_checks(
        4,
        [
            check_four_ranks_continue_one,
            check_native_to_some,
            check_options_travel,
            check_damage_is_named_on_every_rank,
            check_another_model_is_refused_on_every_rank,
            check_a_failing_rank_fails_all_and_harms_nothing,
            check_rubbish_goes_and_enough_stays,
            check_the_background_writes_the_same_while_steps_run,
            check_an_error_in_the_background_comes_at_a_boundary,
            check_fall_back,
        ],
        folder,
    )
    run_checks(1, [check_one_process_continues_four], folder)
    shutil.rmtree(tmp_path)
