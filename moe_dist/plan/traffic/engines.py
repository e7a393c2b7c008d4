"""What the engines exchange: gradients, weights that ZeRO has cut, and the numbers of a norm.

native: during the last backward pass an all-reduce of each bucket of dense gradients over dp and of the experts' over
edp, in fp32 (engine/exchange.py), and a norm over tp and ep. DeepSpeed: zero.py.
"""

import torch

from moe_dist.config import Config
from moe_dist.engine.exchange import buckets
from moe_dist.parallel.mesh import Axis
from moe_dist.plan.held import Held
from moe_dist.plan.traffic.ledger import Ledger
from moe_dist.plan.traffic.zero import zero_traffic

_FP32, _FP64 = torch.float32.itemsize, torch.float64.itemsize


def engine_traffic(config: Config, ledger: Ledger, each: Ledger) -> None:
    """Adds the engine's part of a step, and to `each` that of every micro-step. Raises ValueError when the number of
    classes is not known."""
    if config.task == "classification" and config.model.num_classes is None:
        raise ValueError("num_classes=null is read from the data, which a plan does not: set model.num_classes")
    every = Held.of(config, ledger.layout, ledger.rank)
    held = (every if config.engine.zero_stage == 3 else every.trained).params  # ZeRO-3 gathers what is frozen too
    if config.engine.name == "deepspeed":
        zero_traffic(config, held, ledger, each)
    else:
        axes: tuple[Axis, ...] = ("dp", "edp")
        mib = None if config.engine.cuda_graph else config.engine.bucket_mib
        for axis in axes:
            sizes = [param.numel * _FP32 for param in held if param.axis == axis]
            calls = len(buckets(sizes, mib)) if sizes else 0
            ledger.add("all_reduce", axis, "gradients", "gradients", sum(sizes), calls)
        _norm(ledger)


def _norm(ledger: Ledger) -> None:
    """The global norm of whole gradients (engine/base.py)."""
    for axis in ("tp", "ep"):
        ledger.add("all_reduce", axis, "update", "gradient norm", _FP64)
