"""What every router shares. The routers themselves are in routers.py; gate.py asks them.

Legend: T tokens on this rank, r of them that are no padding, D d_model, E experts, e open experts, K assignments of a
token: top_k, or E under expert choice.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from moe_dist.config.model import MoEConfig
from moe_dist.kernels.permute.order import traced
from moe_dist.kernels.registry import top_k_kernel
from moe_dist.kernels.top_k.reference import Score, TopK, best, scores_of
from moe_dist.moe.balance import Tally
from moe_dist.moe.choice import Routing
from moe_dist.parallel.collectives import copy_to_group
from moe_dist.parallel.mesh import Group, Mesh
from moe_dist.step import Site, StepContext


class Router(nn.Module):
    """What routers share: weights of chosen experts, decisions under a witness, chunks of the balancing scope.

    `slices` is the tp group: each of its ranks routes its own slice of the tokens. open_E: 1 for experts that take
    part, 0 for those that are closed (surgery/layers.py); part of checkpoints. All that a router holds has a row for
    each expert.
    """

    score: Score = "softmax"
    has_losses = True
    """Whether balancing and z-loss have something to train."""
    still = False
    """Whether its balancing bias stays where it is (models/freezing.py)."""
    knows_padding = True
    """Whether StepContext.real is respected; not by routers that sum over tokens on their own."""

    def __init__(self, moe: MoEConfig, d_model: int, site: Site, mesh: Mesh, kernels: str = "torch") -> None:
        super().__init__()
        self.moe = moe
        self.site = site
        self.slices = mesh.tp
        self.token_ranks = mesh.token_ranks
        self.top_k_experts = top_k_kernel(kernels)
        self.open_E: Tensor
        self.register_buffer("open_E", torch.ones(moe.num_experts))
        self._read: tuple[Tensor, int, Tensor | None] | None = None

    def reset_buffers(self) -> None:
        """As they were at first: all experts open."""
        self.open_E.fill_(1.0)

    def open_ids(self) -> Tensor | None:
        """Numbers of the open experts, None when all are. Read again only after open_E was written to: reading waits
        for the device. While a pass is traced nothing can be read, and those last known are open: at first all."""
        if traced(self.open_E):
            return None if self._read is None else self._read[2]
        version = -1 if self.open_E.is_inference() else self.open_E._version
        if self._read is None or self._read[0] is not self.open_E or self._read[1] != version or version < 0:
            open_e = self.open_E.nonzero().flatten()
            self._read = (self.open_E, version, None if len(open_e) == len(self.open_E) else open_e)
        return self._read[2]

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> "Router":
        """Moves buffers, but never to less than fp32: in bf16 a small step of a bias would be lost."""
        kept = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype.itemsize < before.dtype.itemsize and before.dtype.itemsize <= 4:
                self._buffers[name] = before.to(after.device)
        return self

    def forward(self, x_TD: Tensor, step: StepContext, chosen_TK: Tensor | None = None) -> Routing:
        """Route x_TD. `chosen_TK` repeats an earlier choice (a recomputed block) instead of choosing again."""
        raise NotImplementedError

    def of_open(self, open_e: Tensor, x_TD: Tensor, step: StepContext, chosen_TK: Tensor | None) -> Routing:
        """`forward` of a router that has these experts alone, numbered from 0."""
        rows = {name: v.index_select(0, open_e) for name, v in chain(self.named_parameters(), self.named_buffers())}
        whole = self.moe
        groups = max(1, whole.num_groups * len(open_e) // whole.num_experts)  # groups are open or closed as a whole
        self.moe = replace(whole, num_experts=len(open_e), num_groups=groups)
        try:
            routing: Routing = functional_call(self, rows, (x_TD, step, chosen_TK))
        finally:
            self.moe = whole
        return routing

    def choose(
        self, logits_TE: Tensor, step: StepContext, chosen_TK: Tensor | None, preference_TE: Tensor | None = None
    ) -> Routing:
        """The usual end of a router: the best top_k by preference (or by score), weighed by their scores."""
        if chosen_TK is None and preference_TE is not None:
            chosen_TK = best(preference_TE, self.moe.top_k)
        if step.real is None:
            chunk, first = self.chunk(len(logits_TE), step)
            stats = self.top_k_experts(logits_TE, self.moe.top_k, self.score, chosen_TK, chunk, first)
        else:
            stats = self._choose_for_real(logits_TE, step.real.mask_T, chosen_TK)
        return Routing(stats.experts_TK, self.weigh(stats.scores_TK), logits_TE, preference_TE, stats)

    def _choose_for_real(self, logits_TE: Tensor, mask_T: Tensor, chosen_TK: Tensor | None) -> TopK:
        """The same for the rows that are no padding. Padding gets expert 0 and score 1, which nobody reads: the
        capacity rule keeps none of its assignments."""
        if not self.knows_padding or self.moe.balance_scope == "sequence":
            raise ValueError(
                f"router={self.moe.router} with balance_scope={self.moe.balance_scope} counts padding as tokens: "
                "use router softmax, sigmoid, hash or expert_choice, and balance_scope global"
            )
        real_r = mask_T.nonzero().flatten()
        chosen_rK = None if chosen_TK is None else chosen_TK[real_r]
        stats = self.top_k_experts(logits_TE[real_r], self.moe.top_k, self.score, chosen_rK)
        shape = (len(logits_TE), stats.experts_TK.shape[1])
        experts_TK = stats.experts_TK.new_zeros(shape).index_copy(0, real_r, stats.experts_TK)
        scores_TK = stats.scores_TK.new_ones(shape).index_copy(0, real_r, stats.scores_TK)
        return replace(stats, experts_TK=experts_TK, scores_TK=scores_TK)

    def weigh(self, scores_TK: Tensor) -> Tensor:
        """Scores of the chosen experts, divided by their sum if asked for: not at top_k = 1, where p / p = 1 cuts the
        router's gradient, unless that is asked for too."""
        if self.moe.renormalizes:
            # Sigmoids can all be zero.
            scores_TK = scores_TK / scores_TK.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores_TK.dtype).tiny)
        return self.scaled(scores_TK)

    def scaled(self, weights_TK: Tensor) -> Tensor:
        return weights_TK * self.moe.routed_scale if self.moe.routed_scale != 1.0 else weights_TK

    def weigh_again(self, weights_TK: Tensor, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """Weights of other experts than those first chosen, whose weights are given: of rerouted assignments."""
        return self.weigh(scores_of(logits_TE, self.score).gather(1, experts_TK))

    def balance(self, load_E: Tensor, needs_EB: Tensor | None = None) -> None:
        """Called once an optimizer step with the assignments of all ranks and micro-steps, before dropping, and with
        what they needed, where the router counts that."""

    def no_tally(self) -> Tally:
        """Of a rank that saw no token."""
        return Tally(torch.zeros_like(self.open_E, dtype=torch.int64))

    def explicit(self, step: StepContext) -> bool:
        """Whether preferences are needed, not only the choice."""
        return step.witness is not None or self.moe.overflow == "reroute"

    def settle(self, scores_TE: Tensor, step: StepContext) -> Tensor:
        """Scores to decide by: a reference's where verify compares with one. Give them detached: a recomputed block
        does not come here, and must save the same tensors."""
        return scores_TE if step.witness is None else step.witness.scores(self.site, "router", scores_TE)

    def chunk(self, tokens: int, step: StepContext) -> tuple[int | None, int]:
        """(tokens of a chunk, place of this rank's first token in its chunk) of the balancing scope."""
        if self.moe.balance_scope == "sequence" and step.seq_len:
            return step.seq_len, self.slices.rank * tokens % step.seq_len
        if self.moe.balance_scope == "local" and step.parts > 1:
            return tokens // step.parts, 0
        return None, 0

    def draw_index(self, like: Tensor) -> Tensor:
        """An index for each element of `like`, [T, width], by which to draw: a function of the global token index."""
        first = self.token_ranks.rank * like.numel()
        return torch.arange(first, first + like.numel(), device=like.device).view_as(like)


def fp32_logits(x_TD: Tensor, weight_ED: Tensor, slices: Group, bias_E: Tensor | None = None) -> Tensor:
    """x W^T + b in fp32 (or float64), whatever the precision of the rest (Switch Transformers, section 2.4). The
    gradients of W and b are summed over the ranks of `slices`."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    bias_E = None if bias_E is None else copy_to_group(bias_E, slices).to(wide)
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.to(wide), copy_to_group(weight_ED, slices).to(wide), bias_E)
