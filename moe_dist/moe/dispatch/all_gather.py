"""Every rank of the ep group sees all its tokens, and computes what its own experts add to each.

There: all-gather of tokens, weights and decisions. Back: reduce-scatter, which also sums over experts. More bytes than
all-to-all unless top_k comes near the number of ranks, but messages of one size, known without the counts.

Legend: T tokens of the fullest rank of the group (others are padded), X = w * T tokens of all, w ranks of the group, K
top_k, D d_model, e experts of each rank.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.kernels.permute.backend import Permutation
from moe_dist.moe.choice import Choice
from moe_dist.moe.dispatch.base import RowExperts
from moe_dist.moe.dispatch.wire import Format, Wire, carry_home, carry_out, pack, unpack
from moe_dist.parallel.collectives import all_gather, exchange_rows, gather_sequence, reduce_scatter
from moe_dist.parallel.mesh import Group, Mesh


class AllGatherDispatcher:
    def __init__(self, mesh: Mesh, permute: Permutation, wire_dtype: Format = "same") -> None:
        self.ep = mesh.ep
        self.permute = permute
        self.wire = Wire.of(wire_dtype)

    def carry(self, x_TD: Tensor, choice: Choice, experts: RowExperts) -> tuple[Tensor, int]:
        # 1. Ranks may hold unequal numbers of tokens; only they know how many.
        plan, own = choice.plan, len(x_TD)
        missing = self._most_tokens(own, x_TD.device) - own
        x_TD, weights_TK = _pad(x_TD, missing), _pad(choice.weights_TK, missing)
        # 2. One message says where each assignment goes; dropped ones and those of padding go nowhere.
        num_experts = plan.kept_WE.shape[1]
        target_TK = torch.where(plan.kept_TK, plan.experts_TK, num_experts).to(torch.int32)
        target_XK = all_gather(_pad(target_TK, missing, num_experts), self.ep)
        # 3. Tokens and weights; a weight's gradient comes from the rank of its expert.
        trip = GatherTrip(self.ep, len(x_TD))
        x_XD, weights_XK = carry_out(x_TD, trip, self.wire), gather_sequence(weights_TK, self.ep)
        # 4. Assignments of this rank's experts.
        local = num_experts // self.ep.size
        target_XK = target_XK - self.ep.rank * local
        order = self.permute.sort_rows(target_XK, (target_XK >= 0) & (target_XK < local), local, None)
        # 5. Through them, and the sums back.
        y_TD = carry_home(experts(x_XD, weights_XK, order), trip, self.wire)
        decided = (self.ep.size - 1) * weights_TK.numel() * (weights_TK.itemsize + target_TK.itemsize)
        return y_TD if len(y_TD) == own else y_TD[:own], self.wire.sent_bytes(trip, x_TD) + decided

    def _most_tokens(self, own: int, device: torch.device) -> int:
        return int(all_gather(torch.tensor([own], device=device), self.ep).max())


@dataclass(frozen=True)
class GatherTrip:
    """`tokens` of each rank to all of them, and the sums back."""

    ep: Group
    tokens: int

    @property
    def away(self) -> tuple[int, int]:
        others = (self.ep.size - 1) * self.tokens
        return others, others

    def there(self, rows_TD: Tensor, form: Format) -> Tensor:
        return unpack(all_gather(pack(rows_TD, form), self.ep), form, rows_TD.dtype)

    def back(self, rows_XD: Tensor, form: Format) -> Tensor:
        if form == "same" or self.ep.size == 1:
            return reduce_scatter(rows_XD, self.ep)
        # Low precision is for the wire alone: exchanged as it is, summed in the precision of the rows.
        sizes = (self.tokens,) * self.ep.size
        parts_XD = unpack(exchange_rows(pack(rows_XD, form), sizes, sizes, self.ep), form, rows_XD.dtype)
        return parts_XD.view(self.ep.size, self.tokens, rows_XD.shape[1]).sum(0)


def _pad(values: Tensor, rows: int, fill: int = 0) -> Tensor:
    return values if rows == 0 else F.pad(values, (0, 0, 0, rows), value=fill)
