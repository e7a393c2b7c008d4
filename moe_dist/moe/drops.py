"""Where drops happen: at which expert, and at which place of the sequence.

`drop_policy: position` favours the start of a micro-step, so its sequences; under `score` hard tokens lose, wherever
they are. A drop belongs to the expert that the router chose, also where rerouting asked others after it.

Legend: T tokens on this rank, K top_k, E experts, S places of a sequence.
"""

import torch
from torch import Tensor

from moe_dist.kernels.permute.order import counts_of
from moe_dist.moe.choice import DispatchPlan
from moe_dist.step import RealTokens

PLACES = 16
"""Parts of a sequence, from its first to its last."""


def where_dropped(plan: DispatchPlan, real: RealTokens | None, place_T: Tensor) -> tuple[Tensor, Tensor]:
    """(dropped_E, dropped_S): assignments of this rank's tokens that found no place anywhere, int64. Padding asks for
    none. place_T: `places`. Not for expert choice, where those who are not taken did not ask."""
    dropped_TK = ~plan.kept_TK if real is None else ~plan.kept_TK & real.mask_T[:, None]
    dropped_N, place_TK = dropped_TK.flatten(), place_T[:, None].expand_as(dropped_TK)
    dropped_E = counts_of(plan.experts_TK.flatten(), plan.kept_WE.shape[1], dropped_N)
    return dropped_E, counts_of(place_TK.flatten(), PLACES, dropped_N)


def places(tokens: int, first: int, seq_len: int, device: torch.device) -> Tensor:
    """[T], 0 to PLACES - 1: in which part of its sequence each token is. first: where the first is in its own.

    Of sequences of 32 tokens, tokens 0 and 1 are in place 0, tokens 30 and 31 in place 15.
    """
    index_T = torch.arange(first, first + tokens, device=device).remainder(seq_len)
    return (index_T * PLACES).div(seq_len, rounding_mode="floor")
