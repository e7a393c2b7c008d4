"""What a configuration is planned to spend, before anything runs: FLOPs, rows of experts, tokens.

| number | how                                                                                                       |
|--------|-----------------------------------------------------------------------------------------------------------|
| FLOPs  | the nominal ones of a token (models/flops.py), less the expert rows that no capacity could hold            |
| rows   | at most: K a token, or what the experts have places for, whichever is less                                |

What no capacity could hold (plan/kept.py) is left out: counting it would call a run of factor 0.5 twice as dear in
experts as it can be. What imbalance drops beyond that nobody knows before, and counts. Buffers are not counted: experts
compute the rows that came.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from moe_dist.config import Config
from moe_dist.config.model import ModelConfig
from moe_dist.config.rules.batch import batch_shape
from moe_dist.engine.base import compute_dtype
from moe_dist.models.flops import (
    classifier_flops_per_token,
    expert_rows_per_token,
    flops_at_most,
    train_flops_per_token,
)
from moe_dist.plan.kept import factors_by_layer, kept_shares, places


def planned_tokens(config: Config) -> float:
    """Tokens of the whole run, padding included."""
    train = config.train
    return float(train.steps * train.global_batch * train.seq_len)


def planned_flops(config: Config, ranks: int) -> float:
    """FLOPs of the whole run, forward and backward, at most."""
    tokens = config.train.global_batch * config.train.seq_len
    return sum(steps * tokens * _flops_per_token(config, model, ranks) for steps, model in _spans(config))


def planned_rows_bytes(config: Config, ranks: int) -> float:
    """Bytes of the rows that experts receive in the whole run, over all layers and ranks, at most; as the ledger's
    dispatch_rows_bytes, which is of a step."""
    row = config.model.d_model * compute_dtype(config.engine.precision).itemsize
    tokens = config.train.global_batch * config.train.seq_len
    return sum(steps * tokens * _rows_per_token(config, model, ranks) * row for steps, model in _spans(config))


def planned_crossing_bytes(config: Config, ranks: int) -> float:
    """Bytes that cross between ranks in the forward passes of the whole run, there and back, if each rank's experts are
    asked for equally often; as the ledger's dispatch_bytes, which is of a step."""
    ep, moe = config.parallel.ep, config.model.moe
    if ep == 1:
        return 0.0
    size = compute_dtype(config.engine.precision).itemsize
    there, back = {"same": (size, size), "bf16": (2, 2), "fp8": (1, 2)}[moe.wire_dtype]
    share = (there + back) / size * (ep - 1) / ep
    return planned_rows_bytes(config, ranks) * share


def forward_flops(config: Config) -> float:
    """Of one token in evaluation, which drops nothing."""
    return _nominal(config, config.model) / 3


def buffer_rows(config: Config, ranks: int) -> float:
    """Places that all experts have for an assignment, at the end of training; infinite without a limit."""
    *_, (_, model) = _spans(config)
    tokens = micro_step_tokens(config, ranks)
    found = [places(model.moe, factor, tokens, ranks) for factor in factors_by_layer(model)]
    return sum(found) / max(1, len(found))


def micro_step_tokens(config: Config, ranks: int) -> int:
    """Of one forward pass over all ranks, padding included."""
    shape = batch_shape(config.train, ranks // config.parallel.tp)
    return shape.micro_step_sequences * shape.seq_len


def _spans(config: Config) -> Iterator[tuple[int, ModelConfig]]:
    """(steps, the model as it is in them): one, but for each entry of a capacity_schedule."""
    model, steps = config.model, config.train.steps
    moes = (model.moe, model.attention.moe)
    bounds = sorted({0, steps, *(first for moe in moes for first in moe.capacity_schedule if 0 < first < steps)})
    for first, last in pairwise(bounds):
        moe, attention = (replace(each, capacity_factor=each.factor_at(first), capacity_schedule={}) for each in moes)
        yield last - first, replace(model, moe=moe, attention=replace(model.attention, moe=attention))


def _flops_per_token(config: Config, model: ModelConfig, ranks: int) -> float:
    return flops_at_most(model, _nominal(config, model), *kept_shares(model, micro_step_tokens(config, ranks), ranks))


def _rows_per_token(config: Config, model: ModelConfig, ranks: int) -> float:
    return expert_rows_per_token(model, *kept_shares(model, micro_step_tokens(config, ranks), ranks))


def _nominal(config: Config, model: ModelConfig) -> float:
    count = classifier_flops_per_token if config.task == "classification" else train_flops_per_token
    return count(model, config.train.seq_len)
