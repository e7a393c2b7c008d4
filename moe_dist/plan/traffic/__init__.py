"""Every collective of one optimizer step of one rank, from sizes alone.

| part     | what                                                                        | where               |
|----------|-----------------------------------------------------------------------------|---------------------|
| layers   | tensor and sequence parallelism, routers, counts, dispatch, loss; recompute | layers.py           |
| dispatch | a trip to the experts and back, in each form and format                     | dispatch.py         |
| rows     | how many there are: measured, or an even share                              | rows.py             |
| engine   | gradients, ZeRO's weights, norms                                            | engines.py, zero.py |
| the step | agreement on stopping, statistics, balancing histograms                     | here                |

Equal in calls and bytes, by collective and group, to what `recorder.py` counts in a real step, where the model is small
beside DeepSpeed's buckets (5e8 elements); in larger ones ZeRO's bytes are as exact, but for what stage 3 keeps between
the passes, and the number of calls is that of full buckets. Evaluations, checkpoints and comparisons of replicas are
not of every step, and not counted.
"""

from dataclasses import replace

import torch

from moe_dist.config import BatchShape, Config
from moe_dist.config.model import MoEConfig
from moe_dist.models.backends import resolve_experts
from moe_dist.moe.drops import FREQUENCIES, PLACES
from moe_dist.parallel.mesh import Layout
from moe_dist.plan.traffic.engines import engine_traffic
from moe_dist.plan.traffic.layers import MicroStep, routed_layers
from moe_dist.plan.traffic.ledger import Ledger
from moe_dist.plan.traffic.rows import Rows
from moe_dist.plan.transfer import Transfer

__all__ = ["Rows", "micro_step_traffic", "traffic", "update_traffic"]

_TIMES = 6  # of a step, that each rank tells: train/record/step_clock.py
_LAYER_MEANS = 6  # numbers of a layer that are averaged over ranks, sent bytes among them


def traffic(
    config: Config,
    shape: BatchShape,
    layout: Layout,
    rank: int = 0,
    rows: Rows | None = None,
    *,
    step: int = 0,
    device_type: str = "cuda",
) -> list[Transfer]:
    """What `rank` hands to collectives in one optimizer step, summed by collective, group, phase and purpose.

    rows: counts that came, of every micro-step and routed layer; None: an even share. step: for the capacity schedule.
    device_type: under a limit, a padded wire has blocks for all that the limit lets in on `cuda`, and for what is there
    on `cpu`, where rerouting is taken to end after one round.

    Raises ValueError when sizes do not fit each other, or `rows` are not those of the layers.
    """
    config, ledger = _resolved(config, layout), Ledger(layout, rank)
    if rows is None:  # all micro-steps are alike
        one = ledger.empty()
        MicroStep(config, shape, one, None, 0, step, device_type, {}).add()
        ledger.add_lines(one, shape.accumulation)
    else:
        for micro in range(shape.accumulation):
            MicroStep(config, shape, ledger, rows, micro, step, device_type, {}).add()
    ledger.add_lines(_update(config, ledger), shape.accumulation)
    return ledger.transfers()


def micro_step_traffic(
    config: Config, shape: BatchShape, layout: Layout, rank: int = 0, *, step: int = 0, device_type: str = "cuda"
) -> list[Transfer]:
    """The part of `traffic` that is of one micro-step, with an even share; it does not hang on the engine."""
    ledger = Ledger(layout, rank)
    MicroStep(_resolved(config, layout), shape, ledger, None, 0, step, device_type, {}).add()
    return ledger.transfers()


def update_traffic(config: Config, layout: Layout, rank: int = 0) -> tuple[list[Transfer], list[Transfer]]:
    """The rest of it, the engine's and what is counted: (of the step, of every micro-step). It does not hang on how
    rows travel, nor on how large a micro-step is."""
    ledger = Ledger(layout, rank)
    each = _update(_resolved(config, layout), ledger)
    return ledger.transfers(), each.transfers()


def _update(config: Config, ledger: Ledger) -> Ledger:
    """Adds what is of the step, and returns what is of every micro-step."""
    each = ledger.empty()
    ledger.add("all_reduce", "world", "statistics", "whether to stop", torch.int64.itemsize)
    _statistics(config, ledger)
    engine_traffic(config, ledger, each)
    _histograms(config, ledger)
    return each


def _resolved(config: Config, layout: Layout) -> Config:
    """With `auto` dispatch by its name."""
    ranks, attention = layout.expert_ranks, config.model.attention
    if attention.kind == "switch":
        attention = replace(attention, moe=resolve_experts(attention.moe, ranks, "cpu"))
    moe = resolve_experts(config.model.moe, ranks, "cpu")
    return replace(config, model=replace(config.model, moe=moe, attention=attention))


def _statistics(config: Config, ledger: Ledger) -> None:
    """Means and counts of all layers, and times of ranks, in one all-reduce of fp64 (train/record/statistics.py)."""
    numbers = 2 + _TIMES * ledger.layout.world
    for moe, _ in routed_layers(config.model):
        by_expert = 3 * moe.num_experts + moe.num_experts // moe.capacity_pool
        numbers += _LAYER_MEANS + by_expert + 2 * PLACES + 2 * FREQUENCIES
    ledger.add("all_reduce", "world", "statistics", "losses and counts", numbers * torch.float64.itemsize)


def _histograms(config: Config, ledger: Ledger) -> None:
    """Quantile balancing: what all tokens of the step need (moe/balance.py)."""
    found: list[MoEConfig] = [moe for moe, _ in routed_layers(config.model) if "quantile" in moe.balanced_by]
    if found:
        numbers = sum(moe.num_experts * moe.balance_bins for moe in found)
        ledger.add("all_reduce", "world", "update", "balancing histograms", numbers * torch.int64.itemsize)
