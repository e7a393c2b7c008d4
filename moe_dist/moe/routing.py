"""Who goes where, with which weight.

Legend: T tokens on this rank, D d_model, E experts, K top_k.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.parallel.collectives import copy_to_group
from moe_dist.parallel.mesh import Group
from moe_dist.parallel.random import RandomKey
from moe_dist.parallel.sharding import ParamSpec, parameter


class Witness(Protocol):
    """Sees every decision of a step; `moe-dist verify` uses one to compare a layout with a single process."""

    def scores(self, layer: int, what: str, scores: Tensor) -> Tensor:
        """The scores to decide by: those given, or a reference's where they are equal within rounding."""

    def decided(self, layer: int, experts_TK: Tensor, kept_TK: Tensor) -> None:
        """What was decided for this rank's tokens."""


@dataclass(frozen=True)
class StepContext:
    """What a forward pass must know beside its tokens. Everything random is a function of `key`.

    phase: `train` applies capacity_factor, `eval` eval_capacity_factor, `dropless` drops nothing.
    """

    key: RandomKey
    phase: Literal["train", "eval", "dropless"] = "train"
    witness: Witness | None = None


@dataclass(frozen=True)
class Routing:
    """logits_TE and probs_TE in fp32; experts_TK int64, best first; weights_TK multiply the experts' outputs."""

    logits_TE: Tensor
    probs_TE: Tensor
    experts_TK: Tensor
    weights_TK: Tensor


class SoftmaxRouter(nn.Module):
    """p = softmax(W x) in fp32; the top_k largest (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961, eq. 1 and 2).

    At top_k > 1 the chosen weights may be divided by their sum. At top_k = 1 they never are: p / p = 1 would cut the
    router's gradient. `slices` is the tp group: each of its ranks routes its own slice of the tokens, so the gradient
    of W is summed over it here.
    """

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, renormalize: bool, layer: int, slices: Group
    ) -> None:
        super().__init__()
        self.top_k, self.layer, self.slices = top_k, layer, slices
        self.renormalize = renormalize and top_k > 1
        self.weight = parameter((num_experts, d_model), ParamSpec((num_experts, d_model), std=d_model**-0.5))

    def forward(self, x_TD: Tensor, step: StepContext, chosen_TK: Tensor | None = None) -> Routing:
        """Route x_TD. `chosen_TK` repeats an earlier choice (a recomputed block) instead of choosing again."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        weight_ED = copy_to_group(self.weight, self.slices).to(wide)
        logits_TE = F.linear(x_TD.to(wide), weight_ED)
        probs_TE = logits_TE.softmax(dim=-1)
        if chosen_TK is None:
            chosen_TK = self._choose(probs_TE.detach(), step)
        weights_TK = probs_TE.gather(1, chosen_TK)
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return Routing(logits_TE, probs_TE, chosen_TK, weights_TK)

    def _choose(self, probs_TE: Tensor, step: StepContext) -> Tensor:
        if step.witness is not None:
            probs_TE = step.witness.scores(self.layer, "router", probs_TE)
        return probs_TE.topk(self.top_k, dim=-1).indices
