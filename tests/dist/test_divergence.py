"""The loop when losses go off: left out, back to a checkpoint, the end; and copies that differ are found and named."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from moe_dist.config import Config
from moe_dist.models.decoder import DecoderOutput
from moe_dist.process import STOP_SIGNALS
from moe_dist.step import StepContext
from moe_dist.train.exit_codes import DIVERGED, REPLICAS_DIFFER, EndRun
from moe_dist.train.health.signals import StopGuard
from moe_dist.train.loop import Trainer
from moe_dist.train.record.status import read_status
from tests.dist.helpers import run_checks, tiny_config

CPU = torch.device("cpu")
NAME = "blocks.1.feed_forward.router.weight"
Fault = Callable[[Trainer], None]


def config(folder: Path, name: str, **changes: Any) -> Config:
    text = folder / "text.txt"
    if dist.get_rank() == 0 and not text.exists():
        text.write_text(" ".join(str(number * number) for number in range(1000)))
    dist.barrier()
    values = {
        "data__kind": "text",
        "data__paths": [str(text)],
        "train__steps": 8,
        "run__root": str(folder),
        "run__name": name,
        "run__save_every": 2,
        "run__keep_last": 9,
        "run__tensorboard": False,
        "run__eval_sequences": 2,
        "parallel__ep": 2,
    }
    return tiny_config(**(values | changes))


def train(config: Config, fault: Fault, resume: Any = "never", minutes: float | None = None) -> None:
    trainer = Trainer(config, CPU, Console(quiet=True))
    fault(trainer)
    with StopGuard(minutes) as guard:
        trainer.run(trainer.checkpoint_to_continue(resume), guard)


def ends(config: Config, fault: Fault, resume: Any = "never") -> EndRun:
    try:
        train(config, fault, resume)
    except EndRun as error:
        return error
    raise AssertionError("the run went on")


def healthy(trainer: Trainer) -> None:
    pass


def loss_at(steps: list[int], value: float, times: int = 99, rank: int = 1) -> Fault:
    """On one rank, the loss of these steps (counted from 1) is `value`, the first `times` times."""

    def fault(trainer: Trainer) -> None:
        micro_step, left = trainer.engine.micro_step, dict.fromkeys(steps, times)

        def faulty(tokens_BS: Tensor, targets: Tensor, context: StepContext) -> DecoderOutput:
            output = micro_step(tokens_BS, targets, context)
            number = context.step + 1
            if trainer.mesh.rank != rank or left.get(number, 0) == 0:
                return output
            left[number] -= 1
            return replace(output, nll=torch.full_like(output.nll, value))

        trainer.engine.micro_step = faulty  # type: ignore[method-assign]

    return fault


def records(config: Config) -> list[dict[str, Any]]:
    path = Path(config.run.root) / config.run.name / "metrics.jsonl"
    dist.barrier()
    return [json.loads(line) for line in path.read_text().splitlines()]


def stored(config: Config, step: int) -> dict[str, bytes]:
    dist.barrier()
    folder = Path(config.run.root) / config.run.name / "checkpoints" / f"step-{step:06d}"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def roll_backs(config: Config) -> list[dict[str, Any]]:
    path = Path(config.run.root) / config.run.name / "roll_backs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def status(config: Config) -> dict[str, Any]:
    dist.barrier()
    return read_status(Path(config.run.root) / config.run.name)


def check_one_nan_is_left_out_and_survives_a_resume(folder: Path) -> None:
    whole, broken = config(folder, "nan"), config(folder, "nan-broken")
    train(whole, loss_at([3], math.nan))
    lines = records(whole)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if "skipped" in line] == [3]
    assert lines[2]["loss"] is None and "grad_norm" not in lines[2] and lines[2]["skipped"].startswith("loss nan")
    assert all(math.isfinite(line["loss"]) for line in lines if line["step"] != 3)

    class Kill(Exception):
        pass

    def dies_at_7(trainer: Trainer) -> None:
        loss_at([3], math.nan)(trainer)
        update, calls = trainer.engine.update, []

        def faulty(lr: float) -> float:
            calls.append(lr)
            if len(calls) == 6:
                raise Kill
            return update(lr)

        trainer.engine.update = faulty  # type: ignore[method-assign]

    with pytest.raises(Kill):
        train(broken, dies_at_7)
    train(broken, healthy, "must")
    assert stored(broken, 8) == stored(whole, 8)


def check_nans_in_a_row_go_back_once_and_help(folder: Path) -> None:
    fine, once = config(folder, "fine"), config(folder, "once")
    train(fine, healthy)
    train(once, loss_at([5, 6, 7], math.inf, times=1))
    assert not [line for line in records(once) if "skipped" in line]  # the second pass took their places
    assert stored(once, 8) == stored(fine, 8)
    assert status(once) == {"state": "finished", "step": 8}
    assert [roll["step"] for roll in roll_backs(once)] == [7] and not roll_backs(fine)


def check_nans_in_a_row_go_back_once_and_end(folder: Path) -> None:
    always = config(folder, "always")
    error = ends(always, loss_at([5, 6, 7, 8], math.nan))
    assert error.code == DIVERGED
    said = str(error)
    assert (
        "3 steps in a row" in said
        and "up to step 7" in said
        and "at step 7 the run had gone back to a checkpoint" in said
    ), said
    assert status(always) == {"state": "failed", "reason": said, "code": DIVERGED}
    assert sorted(path.name for path in (folder / "always" / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    nowhere = ends(config(folder, "nowhere", run__save_every=9), loss_at([1, 2, 3], math.nan))
    assert nowhere.code == DIVERGED and "no checkpoint to go back to" in str(nowhere)


def kept(config: Config) -> list[str]:
    dist.barrier()
    return sorted(path.name for path in (Path(config.run.root) / config.run.name / "checkpoints").iterdir())


def check_a_poisoned_run_keeps_its_last_good_checkpoint(folder: Path) -> None:
    """Under a learning rate that carries all weights to the end of the number range, each step saved, two kept."""
    name = "poisoned"
    train(config(folder, name, train__steps=4), healthy)
    before = stored(config(folder, name), 4)
    high = config(folder, name, train__steps=7, optim__lr=3e38, optim__weight_decay=0.0, run__save_every=1)
    error = ends(replace(high, run=replace(high.run, keep_last=2)), healthy, "must")
    assert error.code == DIVERGED and status(high) == {"state": "failed", "reason": str(error), "code": DIVERGED}
    assert "step-000004" in kept(high) and stored(high, 4) == before
    assert "step-000007" not in kept(high)


def moment_at(step: int, times: int = 99) -> Fault:
    """On rank 1, one of an expert's second moments is not finite after this step: no loss of this run shows it."""

    def fault(trainer: Trainer) -> None:
        update, calls = trainer.engine.update, [0, 0]

        def faulty(lr: float) -> float:
            norm = update(lr)
            calls[0] += 1
            at = calls[0] - calls[1] * 2  # each time it has gone back by two steps
            if at == step and calls[1] < times:
                calls[1] += 1
                piece = [piece for piece in trainer.engine.held("exp_avg_sq") if "expert" in piece.name][-1]
                if trainer.mesh.rank == 1:
                    piece.values[-1] = math.inf
            return norm

        trainer.engine.update = faulty  # type: ignore[method-assign]

    return fault


def check_what_is_not_finite_is_not_saved(folder: Path) -> None:
    zero1: dict[str, Any] = {"engine__name": "deepspeed", "engine__zero_stage": 1}
    for number, changes in enumerate(({}, {"run__async_save": True}, zero1)):
        name = f"moment-{number}"
        always = config(folder, name, **changes)
        error = ends(always, moment_at(4))
        assert error.code == DIVERGED and status(always)["code"] == DIVERGED
        said = str(error)
        assert said.startswith("after step 4, exp_avg_sq of blocks.1.feed_forward.experts."), said
        assert " on rank 1 is not finite; at step 4 the run had gone back to a checkpoint already" in said, said
        assert kept(always) == ["step-000002"]
    fine, once = config(folder, "moment-fine"), config(folder, "moment-once")
    train(fine, healthy)
    train(once, moment_at(4, times=1))
    assert stored(once, 8) == stored(fine, 8)


def check_a_last_step_left_out_is_no_end(folder: Path) -> None:
    last = config(folder, "last")
    error = ends(last, loss_at([8], math.nan))
    assert error.code == DIVERGED and "the last step, 8, was left out: loss nan" in str(error)
    assert kept(last) == ["step-000002", "step-000004", "step-000006"]
    assert [line["step"] for line in records(last)] == [1, 2, 3, 4, 5, 6, 7, 8]
    spike = config(folder, "last-spike", guard__spike="skip", guard__spike_window=5, guard__spike_mads=20.0)
    train(spike, loss_at([8], 200.0))  # left out because the user wants it, with nothing wrong in the weights
    assert status(spike) == {"state": "finished", "step": 8}


def check_a_validation_loss_that_is_not_finite_is_a_failure(folder: Path) -> None:
    settings = config(folder, "validation", run__eval_every=4)

    def fault(trainer: Trainer) -> None:
        evaluate = trainer.task.evaluate

        def faulty(*args: Any) -> dict[str, float]:
            record = evaluate(*args)
            return record | {"validation_loss": math.nan} if args[2] == 4 else record

        trainer.task.evaluate = faulty  # type: ignore[method-assign]

    error = ends(settings, fault)
    assert error.code == DIVERGED and str(error).startswith("validation_loss after step 4 is nan; "), str(error)
    assert kept(settings) == ["step-000002"]


def check_a_stop_does_not_save_what_is_not_finite(folder: Path) -> None:
    settings = config(folder, "stopped-poisoned", run__save_every=100)

    def fault(trainer: Trainer) -> None:
        moment_at(3)(trainer)
        update, calls = trainer.engine.update, []

        def faulty(lr: float) -> float:
            calls.append(lr)
            if len(calls) == 3:
                os.kill(os.getpid(), STOP_SIGNALS[0])
            return update(lr)

        trainer.engine.update = faulty  # type: ignore[method-assign]

    error = ends(settings, fault)
    assert error.code == DIVERGED and "stopped by SIGUSR2 there, and not saved" in str(error), str(error)
    assert not (folder / "stopped-poisoned" / "checkpoints").exists()


def check_a_signal_saves_and_so_does_a_time_limit(folder: Path) -> None:
    settings = config(folder, "stopped", run__save_every=100)
    step = 0
    for number in STOP_SIGNALS:

        def signalled(trainer: Trainer) -> None:
            update = trainer.engine.update

            def faulty(lr: float) -> float:
                if trainer.mesh.rank == 1:
                    os.kill(os.getpid(), number)  # noqa: B023  (called before the loop goes on)
                return update(lr)

            trainer.engine.update = faulty  # type: ignore[method-assign]

        train(settings, signalled, "auto")
        step += 1
        assert status(settings) == {"state": "preempted", "step": step, "signal": number.name}
        assert len(stored(settings, step)) == 2
    before = stored(settings, step)
    train(settings, healthy, "must", minutes=0.0)
    assert status(settings) == {"state": "preempted", "step": step, "signal": "time limit", "starts": 1}
    assert stored(settings, step) == before
    assert [line["step"] for line in records(settings)] == [1, 2, 3]
    early = config(folder, "early")
    train(early, healthy, minutes=0.0)
    assert status(early)["step"] == 0 and len(stored(early, 0)) == 2
    train(early, healthy, "must", minutes=0.0)  # unlike the status before, or a script would take it for a failure
    assert status(early) == {"state": "preempted", "step": 0, "signal": "time limit", "starts": 1}
    train(early, healthy, "must", minutes=0.0)
    assert status(early) == {"state": "preempted", "step": 0, "signal": "time limit", "starts": 2}


def check_the_window_after_going_back_is_that_of_a_restart(folder: Path) -> None:
    """Losses fall, a bad step 11 sends the run back to step 8, and step 14 is a spike beside what the window then holds
    after a kill: not when it still holds losses of the first pass."""
    falling = [6, 5.8, 5.5, 5.0, 4.4, 3.6, 3.2, 3.0, 2.9, 2.85, 9.0, 2.8, 2.8, 3.6]
    changes: dict[str, Any] = {"guard__spike_window": 10, "guard__spike_mads": 3.0, "guard__spike": "roll_back"}

    class Kill(Exception):
        pass

    def falls(trainer: Trainer, last: int = 99) -> None:
        micro_step, calls = trainer.engine.micro_step, []

        def faulty(tokens_BS: Tensor, targets: Tensor, context: StepContext) -> DecoderOutput:
            calls.append(context.step)
            if len(calls) > last:
                raise Kill
            output = micro_step(tokens_BS, targets, context)
            return replace(output, nll=torch.full_like(output.nll, falling[context.step]))

        trainer.engine.micro_step = faulty  # type: ignore[method-assign]

    whole, broken = (
        config(folder, name, train__steps=14, run__save_every=4, **changes) for name in ("window", "window-killed")
    )
    train(whole, falls)
    with pytest.raises(Kill):
        train(broken, lambda trainer: falls(trainer, last=16))  # in step 14, past the checkpoint of step 12
    train(broken, falls, "must")
    assert stored(broken, 14) == stored(whole, 14)
    assert [line.get("skipped") for line in records(broken)] == [line.get("skipped") for line in records(whole)]


def check_other_experts_are_refused_before_anything_is_replaced(folder: Path) -> None:
    few = config(folder, "experts", train__steps=2)
    train(few, healthy)
    dist.barrier()
    before = (folder / "experts" / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"experts.*has shape \[4, .*--override model"):
        train(config(folder, "experts", model__moe__num_experts=8), healthy, "must")
    assert (folder / "experts" / "config.yaml").read_bytes() == before
    assert status(few) == {"state": "finished", "step": 2}


def check_spikes(folder: Path) -> None:
    window: dict[str, Any] = {"guard__spike_window": 5, "guard__spike_mads": 20.0}
    noted = config(folder, "log", **window)
    train(noted, loss_at([6], 200.0))
    assert [line["step"] for line in records(noted) if "spike" in line] == [6]
    assert not [line for line in records(noted) if "skipped" in line]
    left = config(folder, "skip", guard__spike="skip", **window)
    train(left, loss_at([6], 200.0))
    assert [line["step"] for line in records(left) if "skipped" in line] == [6]
    back = config(folder, "roll_back", guard__spike="roll_back", **window)
    train(back, loss_at([6], 200.0))  # at every pass: the step is left out when the run comes to it again
    assert [line["step"] for line in records(back) if "skipped" in line] == [6]
    assert stored(back, 8) == stored(left, 8) != stored(noted, 8)
    off = config(folder, "off", guard__spike="off")
    train(off, loss_at([6], 200.0))
    assert not [line for line in records(off) if "spike" in line or "skipped" in line]


def check_a_flipped_bit_is_found(folder: Path) -> None:
    for name, changes in {
        "dp": {},
        "tp": {"parallel__tp": 2},
        "zero1": {"engine__name": "deepspeed", "engine__zero_stage": 1},
        "bf16": {"engine__precision": "bf16"},
    }.items():
        settings = config(folder, f"bit-{name}", **({"parallel__ep": 1, "guard__check_replicas": 3} | changes))

        def flip(trainer: Trainer) -> None:
            update, calls = trainer.engine.update, []

            def faulty(lr: float) -> float:
                norm = update(lr)
                calls.append(lr)
                if len(calls) == 4 and trainer.mesh.rank == 1:
                    weight = dict(trainer.engine.model.named_parameters())[NAME]
                    weight.data.view(torch.int32)[3] ^= 1
                return norm

            trainer.engine.update = faulty  # type: ignore[method-assign]

        error = ends(settings, flip)
        assert error.code == REPLICAS_DIFFER
        two = "rank 0 and rank 1 are unlike each other, and which one is wrong cannot be told, in"
        who = "rank 1 is unlike the optimizer's masters in" if name in ("zero1", "bf16") else two
        assert str(error) == f"after step 4, {who} {NAME}", str(error)
        assert status(settings)["code"] == REPLICAS_DIFFER
        # Found before the checkpoint of step 4 could take it in.
        assert [path.name for path in (folder / f"bit-{name}" / "checkpoints").iterdir()] == ["step-000002"]


def test_losses_that_go_off(tmp_path: Path) -> None:
    checks = [
        check_one_nan_is_left_out_and_survives_a_resume,
        check_nans_in_a_row_go_back_once_and_help,
        check_nans_in_a_row_go_back_once_and_end,
        check_spikes,
        check_a_poisoned_run_keeps_its_last_good_checkpoint,
        check_what_is_not_finite_is_not_saved,
        check_a_last_step_left_out_is_no_end,
        check_a_validation_loss_that_is_not_finite_is_a_failure,
        check_a_stop_does_not_save_what_is_not_finite,
        check_the_window_after_going_back_is_that_of_a_restart,
        check_other_experts_are_refused_before_anything_is_replaced,
        check_a_signal_saves_and_so_does_a_time_limit,
    ]
    run_checks(2, checks, tmp_path)


def test_copies_that_differ(tmp_path: Path) -> None:
    run_checks(2, [check_a_flipped_bit_is_found], tmp_path)
