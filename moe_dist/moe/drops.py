"""Where drops happen: at which expert, at which place of the sequence and of the micro-step, and to which tokens.

`drop_policy: position` favours the start of a micro-step, so its sequences; under `score` hard tokens lose, wherever
they are. A drop belongs to the expert that the router chose, also where rerouting asked others after it.

| counted by              | parts                                                                | who says it       |
|-------------------------|----------------------------------------------------------------------|-------------------|
| expert                  | E                                                                    | the router        |
| place in the sequence   | PLACES, from its first token to its last                             | `marks`           |
| place in the micro-step | PLACES, in the global order of its tokens, padding among them        | `marks`           |
| how frequent it is      | FREQUENCIES classes of token ids, rarest first                       | data/frequency.py |

What a token is marked with is the same for all layers: it is worked out once a forward pass, and a layer counts all
of it in one go.

Legend: T tokens on this rank, K top_k, E experts, V token ids, X marks of a token, S places of a sequence, M places of
the micro-step, F classes of frequency.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.kernels.permute.order import counts_of
from moe_dist.moe.choice import DispatchPlan
from moe_dist.parallel.mesh import Group
from moe_dist.step import RealTokens

PLACES = 16
"""Parts of a sequence, and of a micro-step, from its first token to its last."""
FREQUENCIES = 8
"""Classes of token ids by how often they are in the training split."""
_SIZES = (PLACES, PLACES, FREQUENCIES, FREQUENCIES)
_FIRST = (0, PLACES, 2 * PLACES, 2 * PLACES + FREQUENCIES)


@dataclass(frozen=True)
class Drops:
    """Assignments of this rank's tokens that found no place anywhere, counted four times over, int64; and load_F, those
    that asked for one. Padding asks for none; under expert choice those who are not taken did not ask.

    Zeros by what tokens are not marked with.
    """

    dropped_E: Tensor
    dropped_S: Tensor
    dropped_M: Tensor
    dropped_F: Tensor
    load_F: Tensor


def drops_of(plan: DispatchPlan, real: RealTokens | None, marks_XT: Tensor | None, by_experts: bool = False) -> Drops:
    """marks_XT: of `marks`; None: the tokens have none. by_experts: the experts chose (expert choice)."""
    kept_TK, num_experts = plan.kept_TK, plan.kept_WE.shape[1]
    if by_experts:
        asks_TK = kept_TK
    else:
        asks_TK = torch.ones_like(kept_TK) if real is None else real.mask_T[:, None].expand_as(kept_TK)
    dropped_TK = asks_TK & ~kept_TK
    dropped_E = counts_of(plan.experts_TK.flatten(), num_experts, dropped_TK.flatten())
    counts_X = dropped_E.new_zeros(sum(_SIZES))
    if marks_XT is not None:
        values_XT = dropped_TK.sum(1).expand_as(marks_XT)
        if len(marks_XT) == len(_SIZES):  # the last row counts what is asked for
            values_XT = torch.cat((values_XT[:-1], asks_TK.sum(1)[None]))
        counts_X.scatter_add_(0, marks_XT.flatten(), values_XT.flatten())
    return Drops(dropped_E, *counts_X.split(_SIZES))


def marks(token_ids_T: Tensor, ranks: Group, seq_len: int, frequency_V: Tensor | None) -> Tensor:
    """marks_XT: where each of this rank's tokens is, and how frequent, as numbers of the counts that it belongs to.

    ranks: those that hold the micro-step's tokens, equally many each, in their global order. frequency_V: the class of
    each token id; None: nobody knows. Of sequences of 32 tokens, tokens 0 and 1 are in place 0, 30 and 31 in place 15.
    """
    tokens = len(token_ids_T)
    first, whole = ranks.rank * tokens, ranks.size * tokens
    index_T = torch.arange(first, first + tokens, device=token_ids_T.device)
    of_T = [_part(index_T.remainder(seq_len), seq_len), _part(index_T, whole)]
    if frequency_V is not None:
        of_T += [frequency_V[token_ids_T]] * 2
    return torch.stack([mark_T + start for mark_T, start in zip(of_T, _FIRST, strict=False)])


def _part(index_T: Tensor, length: int) -> Tensor:
    return (index_T * PLACES).div(max(1, length), rounding_mode="floor")
