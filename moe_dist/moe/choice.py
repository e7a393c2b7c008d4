"""What is decided about each token, as the parts of an MoE layer tell it to one another.

    router --Routing--> capacity rule --DispatchPlan--> both, with the weights that count: Choice --> dispatcher, losses

Legend: T tokens on this rank, E experts, e open experts, K assignments of a token: top_k, or E under expert choice,
W ranks of the world, P pools of experts.
"""

from dataclasses import dataclass

from torch import Tensor

from moe_dist.kernels.top_k.reference import TopK


@dataclass(frozen=True)
class Routing:
    """What a router says of this rank's tokens.

    experts_TK: int64, best first. weights_TK multiply the experts' outputs; fp32. preference_TE: by what experts were
    chosen, larger is better, -inf for never, not differentiable; None where nobody asks. stats: sums over tokens for
    the losses; chunks are those of the balancing scope. extra_loss: the router's own, already weighted. open_e: numbers
    of the experts that take part, None: all. To the others no token goes; their logits are -inf. needs_EB: the
    histogram of balance.py, where the router's bias is set by it and these tokens count.
    """

    experts_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor
    preference_TE: Tensor | None
    stats: TopK
    extra_loss: Tensor | None = None
    open_e: Tensor | None = None
    needs_EB: Tensor | None = None


@dataclass(frozen=True)
class DispatchPlan:
    """Where assignments go and which of them may, on this rank; nothing here is differentiable.

    experts_TK: where each assignment goes, after rerouting. kept_TK: which of them stay. counts_WE: assignments of each
    rank of the world as the router chose; kept_WE: those that stay. Both are known on every rank. capacity: C, or None
    when nothing is dropped; an expert keeps at most C * capacity_pool, all those of a rank at most C each on average.
    over_P: rows that the router asked for beyond the limit of each pool, of all ranks; known on every rank. pool: how
    many neighbouring experts share a limit. everything: all assignments stay, which is known without looking. shared: C
    is of all ranks together, not of each.
    """

    experts_TK: Tensor
    kept_TK: Tensor
    counts_WE: Tensor
    kept_WE: Tensor
    capacity: int | None
    over_P: Tensor
    pool: int = 1
    everything: bool = False
    shared: bool = True

    @property
    def pool_rows(self) -> int | None:
        """Rows that a pool of experts takes, or None when nothing is dropped."""
        return None if self.capacity is None else self.pool * self.capacity


@dataclass(frozen=True)
class Choice:
    """All that is decided about this rank's tokens. weights_TK: of the assignments in `plan`, differentiable."""

    routing: Routing
    plan: DispatchPlan
    weights_TK: Tensor
