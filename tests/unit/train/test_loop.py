"""One rank's loop beside sums done by hand: which random key, learning rate, weight decay and split each step has."""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from moe_dist.data.frequency import Frequencies
from moe_dist.step import StepContext
from moe_dist.train import loop
from moe_dist.train.health.signals import StopGuard
from moe_dist.train.loop import Trainer
from tests.dist.helpers import tiny_config
from tests.unit.checkpoint.helpers import alone

SEED, STEPS, WARMUP, PEAK, DECAY = 11, 10, 10, 0.02, 0.25


class Watched:
    """A run of ten steps of two micro-steps; what the loop has asked its engine for."""

    def __init__(self, folder: Path) -> None:
        text = folder / "text.txt"
        text.write_text("abcd" * 900 + "xyz" * 100)  # the last tenth is for validation, and of other letters
        config = tiny_config(
            data__kind="text",
            data__paths=[str(text)],
            data__validation_fraction=300 / 3900,
            model__moe__expert_bias=True,
            model__moe__jitter=0.1,
            train__steps=STEPS,
            train__seed=SEED,
            train__accumulation=2,
            optim__lr=PEAK,
            optim__weight_decay=DECAY,
            optim__eps=1e-8,
            optim__schedule="linear",
            optim__warmup_steps=WARMUP,
            engine__grad_clip=None,
            run__root=str(folder),
            run__tensorboard=False,
        )
        trainer = Trainer(config, torch.device("cpu"), Console(quiet=True))
        engine = trainer.engine
        self.contexts: list[StepContext] = []
        self.trained: list[Tensor] = []
        self.validated: list[Tensor] = []
        self.folder, self.ahead = folder / "default", 0.0
        self.updates: list[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]] = []
        micro_step, evaluate, update = engine.micro_step, engine.evaluate, engine.update

        def watched_step(tokens_BS: Tensor, targets: Tensor, context: StepContext) -> Any:
            self.contexts.append(context)
            self.trained.append(tokens_BS)
            return micro_step(tokens_BS, targets, context)

        def watched_evaluation(tokens_BS: Tensor, *args: Any) -> Tensor:
            self.validated.append(tokens_BS)
            self.ahead += 1000.0  # seconds that an evaluation seems to take
            return evaluate(tokens_BS, *args)

        def held(kind: Any) -> dict[str, Tensor]:
            parameters = dict(engine.model.named_parameters())
            return {p.name: p.values.detach().double().clone() for p in engine.held(kind) if p.name in parameters}

        def watched_update(lr: float) -> float:
            before, grads = held("weight"), held("grad")
            norm = update(lr)
            self.updates.append((before, grads, held("weight")))
            return norm

        engine.micro_step = watched_step  # type: ignore[method-assign]
        engine.evaluate = watched_evaluation  # type: ignore[method-assign]
        engine.update = watched_update  # type: ignore[method-assign]
        self.shapes = {name: tuple(p.shape) for name, p in engine.model.named_parameters()}
        clock = SimpleNamespace(monotonic=lambda: time.monotonic() + self.ahead)
        trainer.clock._now = lambda: time.perf_counter() + self.ahead
        with StopGuard() as guard, pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "time", clock)
            self.last = trainer.run(None, guard).last


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with alone():
        yield Watched(tmp_path_factory.mktemp("run"))


def hashed(*parts: int | str) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") & (2**63 - 1)


def test_each_micro_step_has_a_key_of_its_own(run: Watched) -> None:
    expected = [(step, hashed(hashed(SEED, "train"), step, micro)) for step in range(STEPS) for micro in range(2)]
    assert [(context.step, context.key.value) for context in run.contexts] == expected
    assert all(context.phase == "train" for context in run.contexts)
    draws = [tuple(context.key.uniform(torch.arange(8)).tolist()) for context in run.contexts]
    assert len(set(draws)) == STEPS * 2


def test_the_first_step_is_adamw_by_hand(run: Watched) -> None:
    """At its first step Adam moves each element by lr * g / (|g| + eps), whatever its betas; decay comes off the weight
    before. lr is a tenth of the peak, the first of ten steps of warm-up; norms and biases are not decayed."""
    before, grads, after = run.updates[0]
    lr, decayed, spared = PEAK / WARMUP, 0, 0
    for name, weight in before.items():
        one_a_unit = "norm" in name or "bias" in name or ".b_" in name
        decay = 0.0 if one_a_unit else DECAY
        expected = weight * (1 - lr * decay) - lr * grads[name] / (grads[name].abs() + 1e-8)
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=2e-7, msg=f"{name} {run.shapes[name]}")
        decayed, spared = decayed + (not one_a_unit), spared + one_a_unit
    assert decayed >= 8 and spared >= 6, sorted(run.shapes)


def test_later_steps_have_their_own_learning_rate(run: Watched) -> None:
    """AdamW of torch, which knows nothing of ours, fed with the same gradients and with lr = peak * (step + 1) / 10."""
    name = next(name for name in run.shapes if "embedding" in name)
    param = torch.nn.Parameter(run.updates[0][0][name].clone())
    optimizer = torch.optim.AdamW([param], betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY)
    for step, (_, grads, after) in enumerate(run.updates):
        optimizer.param_groups[0]["lr"] = PEAK * (step + 1) / WARMUP
        param.grad = grads[name]
        optimizer.step()
        torch.testing.assert_close(after[name], param.detach(), rtol=1e-4, atol=1e-6)


def test_training_and_validation_read_their_own_split(run: Watched) -> None:
    assert {chr(value) for tokens_BS in run.trained for value in tokens_BS.unique().tolist()} <= set("abcd")
    assert {chr(value) for tokens_BS in run.validated for value in tokens_BS.unique().tolist()} == set("xyz")
    assert run.last["loss"] < run.last["validation_loss"] < 2 * math.log(256), "letters that it has never seen"


def test_an_evaluation_is_no_part_of_a_step(run: Watched) -> None:
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert run.ahead >= 1000.0 and max(record["step_seconds"] for record in records) < 1000.0


def test_the_environment_says_what_the_data_is_like(run: Watched) -> None:
    """One file, whose training part has four letters, each as often."""
    data = json.loads((run.folder / "environment.json").read_text())["data"]
    assert data["documents_per_micro_step"] == 1.0 and len(data["digest"]) == 64
    assert data["frequencies"] == {"counted": 3600, "ids": [252, 0, 0, 0, 1, 1, 1, 1], "tokens": [0] * 4 + [900] * 4}
    counts_V = np.zeros(256, np.int64)
    counts_V[list(b"abcd")] = 900
    assert run.contexts[0].frequency_V is not None
    assert run.contexts[0].frequency_V.tolist() == Frequencies.of(counts_V).classes_V.tolist()
