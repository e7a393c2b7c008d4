"""A trained checkpoint evaluated without and with drops, beside a count by hand: its weights in float64, token after
token, routed, let in and dropped in plain loops that share nothing with the package.

Legend: V vocabulary, D d_model, F width of an expert, E experts, S sequence.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from moe_dist.checkpoint.reader import Reader
from moe_dist.moe.layer import MoE
from moe_dist.train.health.signals import StopGuard
from moe_dist.train.loop import Trainer
from tests.dist.helpers import tiny_config
from tests.unit.checkpoint.helpers import alone

S, E, K, HEADS, LAYERS, STEPS = 12, 4, 2, 2, 2, 30
BATCH, SEQUENCES = 4, 6
"""Sequences of an evaluation's batch, and of the whole evaluation: its second batch is filled up with two more."""
TRAIN_FACTOR, FACTOR = 1.0, 0.7
TEXT = b"the quick brown fox jumps over the lazy dog; pack my box with five dozen jugs. " * 40

Weights = dict[str, np.ndarray]


class Evaluated:
    """A run of 30 steps: its last evaluation, what its layers said meanwhile, and its last checkpoint."""

    def __init__(self, folder: Path) -> None:
        (folder / "text.txt").write_bytes(TEXT)
        config = tiny_config(
            data__kind="text",
            data__paths=[str(folder / "text.txt")],
            model__d_model=16,
            model__num_heads=HEADS,
            model__num_kv_heads=1,
            model__moe__d_ff=20,
            model__moe__top_k=K,
            model__moe__capacity_factor=TRAIN_FACTOR,
            model__moe__eval_capacity_factor=FACTOR,
            train__steps=STEPS,
            train__seq_len=S,
            train__global_batch=BATCH,
            optim__lr=0.01,
            run__eval_sequences=SEQUENCES,
            run__root=str(folder),
            run__tensorboard=False,
        )
        trainer = Trainer(config, torch.device("cpu"), Console(quiet=True))
        self.dropped = {"dropless": 0, "eval": 0}

        def count(layer: MoE, args: tuple[Any, ...], output: Any) -> None:
            step, stats = args[1], output[1]
            if step.phase != "train":
                self.dropped[step.phase] += int(stats.dropped_E.sum())

        for block in trainer.engine.model.blocks:
            block.feed_forward.register_forward_hook(count)
        with StopGuard() as guard:
            self.last = trainer.run(None, guard).last
        reader = Reader(folder / "default" / "checkpoints" / f"step-{STEPS:06d}")
        self.weights: Weights = {
            name: reader.read("weight", name, 0, math.prod(shape)).double().numpy().reshape(shape)
            for name, shape in reader.manifest.shapes.items()
        }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evaluated]:
    with alone():
        yield Evaluated(tmp_path_factory.mktemp("run"))


def batches() -> list[list[tuple[int, float]]]:
    """(first byte, weight) of each sequence of each batch: windows spread evenly over the last tenth of the text."""
    held_out = len(TEXT) - int(len(TEXT) * 0.9)
    available = (held_out - 1) // S
    starts = [(number * available // SEQUENCES * S, 1.0) for number in range(SEQUENCES)]
    starts += [(starts[0][0], 0.0)] * (-len(starts) % BATCH)
    return [starts[first : first + BATCH] for first in range(0, len(starts), BATCH)]


def norm(x_D: np.ndarray, weight_D: np.ndarray) -> np.ndarray:
    return x_D / math.sqrt(float(np.mean(x_D * x_D)) + 1e-5) * weight_D


def turned(x_P: np.ndarray, position: int) -> np.ndarray:
    half = len(x_P) // 2
    out_P = np.empty_like(x_P)
    for i in range(half):
        angle = position * 10000.0 ** (-2 * i / len(x_P))
        out_P[i] = x_P[i] * math.cos(angle) - x_P[half + i] * math.sin(angle)
        out_P[half + i] = x_P[half + i] * math.cos(angle) + x_P[i] * math.sin(angle)
    return out_P


def attended(x_SD: list[np.ndarray], w: Weights, home: str) -> list[np.ndarray]:
    """Causal attention of HEADS query heads on one key/value head; of one sequence."""
    width = len(x_SD[0]) // HEADS
    keys_values = [w[f"{home}.key_value.weight"] @ x_D for x_D in x_SD]
    keys = [turned(both[:width], place) for place, both in enumerate(keys_values)]
    out_SD = []
    for place, x_D in enumerate(x_SD):
        heads = []
        for q_P in (w[f"{home}.query.weight"] @ x_D).reshape(HEADS, width):
            q_P = turned(q_P, place)
            scores = [math.exp(q_P @ keys[earlier] / math.sqrt(width)) for earlier in range(place + 1)]
            seen = [score * keys_values[earlier][width:] for earlier, score in enumerate(scores)]
            heads.append(sum(seen) / sum(scores))
        out_SD.append(np.concatenate(heads) @ w[f"{home}.out.weight"])
    return out_SD


def mixed(x_TD: list[np.ndarray], w: Weights, home: str, factor: float | None) -> tuple[list[np.ndarray], int]:
    """The layer of experts over all tokens of a batch, and how many assignments it dropped. The first C of an expert's
    tokens in their order are let in; a token's better expert asks first."""
    room = [math.inf if factor is None else max(1, math.ceil(round(factor * K * len(x_TD) / E, 9)))] * E
    out_TD, dropped = [], 0
    for x_D in x_TD:
        exponentials = np.exp(w[f"{home}.router.weight"] @ x_D)
        probabilities = (exponentials / exponentials.sum()).tolist()
        chosen = sorted(range(E), key=lambda expert: -probabilities[expert])[:K]
        y_D = np.zeros_like(x_D)
        for expert in chosen:
            if room[expert] < 1:
                dropped += 1
                continue
            room[expert] -= 1
            gate_F, up_F = (w[f"{home}.experts.w_{part}"][expert] @ x_D for part in ("gate", "up"))
            hidden_F = gate_F / (1 + np.exp(-gate_F)) * up_F
            share = probabilities[expert] / sum(probabilities[other] for other in chosen)
            y_D += share * (hidden_F @ w[f"{home}.experts.w_out"][expert])
        out_TD.append(y_D)
    return out_TD, dropped


def by_hand(w: Weights, factor: float | None) -> tuple[float, int]:
    """(loss, dropped assignments) over the batches of an evaluation."""
    text = TEXT[int(len(TEXT) * 0.9) :]
    total, weight_of_all, dropped = 0.0, 0.0, 0
    for batch in batches():
        x_TD = [w["embedding.weight"][text[start + place]] for start, _ in batch for place in range(S)]
        for layer in range(LAYERS):
            home = f"blocks.{layer}"
            normed = [norm(x_D, w[f"{home}.attention_norm.weight"]) for x_D in x_TD]
            rows = [attended(normed[i : i + S], w, f"{home}.attention") for i in range(0, len(normed), S)]
            x_TD = [x_D + y_D for x_D, y_D in zip(x_TD, (y_D for row in rows for y_D in row), strict=True)]
            normed = [norm(x_D, w[f"{home}.feed_forward_norm.weight"]) for x_D in x_TD]
            y_TD, lost = mixed(normed, w, f"{home}.feed_forward", factor)
            x_TD = [x_D + y_D for x_D, y_D in zip(x_TD, y_TD, strict=True)]
            dropped += lost
        for number, (start, weight) in enumerate(batch):
            for place in range(S):
                logits_V = w["embedding.weight"] @ norm(x_TD[number * S + place], w["output.norm.weight"])
                nll = math.log(np.exp(logits_V).sum()) - logits_V[text[start + place + 1]]
                total += weight * nll / S
            weight_of_all += weight
    return total / weight_of_all, dropped


def test_both_losses_and_the_drops_are_those_of_a_count_by_hand(run: Evaluated) -> None:
    loss, nothing = by_hand(run.weights, None)
    capped, dropped = by_hand(run.weights, FACTOR)
    assert nothing == 0 < dropped < len(batches()) * BATCH * S * K * LAYERS
    assert run.dropped == {"dropless": 0, "eval": dropped}
    assert run.last["validation_loss"] == pytest.approx(loss, rel=2e-6)
    assert run.last["validation_loss_capped"] == pytest.approx(capped, rel=2e-6)
    assert abs(capped - loss) > 1e-4 * loss  # or nothing was compared
    assert by_hand(run.weights, TRAIN_FACTOR)[1] != dropped  # the capacity in force is the evaluation's own
