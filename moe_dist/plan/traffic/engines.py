"""What the engines exchange: gradients, weights that ZeRO has cut, and the numbers of a norm.

native: at the end of a step one all-reduce of all dense gradients over dp and one of the experts' over edp, in fp32,
and a norm over tp and ep (engine/native.py). DeepSpeed: zero.py.
"""

import torch

from moe_dist.config import BatchShape, Config
from moe_dist.parallel.mesh import Axis
from moe_dist.plan.traffic.ledger import Ledger
from moe_dist.plan.traffic.parameters import parameters
from moe_dist.plan.traffic.zero import zero_traffic

_FP32, _FP64 = torch.float32.itemsize, torch.float64.itemsize


def engine_traffic(config: Config, shape: BatchShape, ledger: Ledger) -> None:
    """Adds the engine's part of a step."""
    held = parameters(config, shape, ledger.layout, ledger.rank)
    if config.engine.name == "deepspeed":
        zero_traffic(config, shape, held, ledger)
    else:
        by_ranks: dict[tuple[int, ...], tuple[Axis, int]] = {}
        for param in held:
            ranks = ledger.layout.ranks(param.axis, ledger.rank)
            axis, numel = by_ranks.get(ranks, (param.axis, 0))
            by_ranks[ranks] = (axis, numel + param.numel)
        for axis, numel in by_ranks.values():
            ledger.add("all_reduce", axis, "gradients", "gradients", numel * _FP32)
        _norm(ledger)


def _norm(ledger: Ledger) -> None:
    """The global norm of whole gradients (engine/base.py)."""
    for axis in ("tp", "ep"):
        ledger.add("all_reduce", axis, "update", "gradient norm", _FP64)
