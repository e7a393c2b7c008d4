"""Whether what an engine holds may be saved: weights and moments that are not finite poison whatever continues them."""

import math

import torch

from moe_dist.engine.base import STATE_KINDS, Engine
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.objects import gather_json


class NotFinite(ValueError):
    """Raised on every rank, which all know what is not finite and where."""


@torch.no_grad()
def require_finite(engine: Engine) -> None:
    """Every rank must call. Raises NotFinite on every rank when a weight or a moment of any is not finite.

    One reduction of one number; only when something is wrong do ranks ask each other for names.
    """
    held = [(kind, piece.name, piece.values) for kind in STATE_KINDS for piece in engine.held(kind)]
    # The least and the largest element: NaN passes through both, and no element is copied.
    ends = [torch.stack(values.aminmax()).float() for _, _, values in held if values.numel()]
    bad = torch.stack(ends).isfinite().logical_not().sum() if ends else torch.zeros((), dtype=torch.int64)
    if not all_reduce(bad.to(next(engine.model.parameters()).device), engine.mesh.world):
        return
    mine = [f"{kind} of {name}" for kind, name, values in held if values.numel() and not _finite(values)]
    found = [(rank, what) for rank, theirs in enumerate(gather_json(mine)) for what in theirs]
    rank, what = found[0]
    more = len({what for _, what in found}) - 1
    raise NotFinite(f"{what} on rank {rank} is not finite" + (f", and {more} more tensors" if more else ""))


def _finite(values: torch.Tensor) -> bool:
    return all(math.isfinite(end) for end in torch.stack(values.aminmax()).tolist())
