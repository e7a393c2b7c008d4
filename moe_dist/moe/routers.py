"""The routers: equation, paper, and the few lines that differ.

| router        | chooses by                                        | weight                     |
|---------------|---------------------------------------------------|----------------------------|
| softmax       | softmax(W x), with jitter and + b if asked for    | softmax, renormalised or not |
| sigmoid       | sigmoid(W x) + b, b a balancing bias (balance.py) | the sigmoid                |
| noisy         | W x + noise * softplus(W_noise x)                 | softmax over the chosen    |
| expert_choice | each expert takes its best tokens                 | softmax(W x)               |
| sinkhorn      | W x made doubly stochastic over the micro-step    | sigmoid or softmax of W x  |
| hash          | a fixed hash of the token id                      | 1 / top_k                  |

softmax and sigmoid choose within the best `top_k_groups` of `num_groups` groups of experts when asked to; with
`router_bias` their logits are W x + c, c learned, which is part of the scores and has no balancing to do.

Legend: T tokens on this rank, D d_model, E experts, K top_k.
"""

from dataclasses import replace
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config.model import MoEConfig
from moe_dist.kernels.random import RandomKey
from moe_dist.kernels.top_k.reference import best, scores_of
from moe_dist.moe.balance import Tally, needs_histogram, quantile_bias, sign_step
from moe_dist.moe.choice import Routing
from moe_dist.moe.router import Router, fp32_logits
from moe_dist.parallel.collectives import all_gather, mean_over_group
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.sharding import ParamSpec, parameter
from moe_dist.step import Site, StepContext

_LEAST_NOISE = 1e-2


class ScoreRouter(Router):
    """Routers that choose by a score of each expert in [0, 1], which a balancing bias can shift: bias_E, or None."""

    best_of = 1
    """By how many of its best experts a group is ranked."""

    def __init__(self, moe: MoEConfig, d_model: int, site: Site, mesh: Mesh, kernels: str = "torch") -> None:
        super().__init__(moe, d_model, site, mesh, kernels)
        self.weight = router_weight(moe.num_experts, d_model)
        shape = (moe.num_experts,)
        self.logit_bias = parameter(shape, ParamSpec(shape, std=0.0)) if moe.router_bias else None
        self.by_sign, self.by_quantile = ("sign" in moe.balanced_by), ("quantile" in moe.balanced_by)
        biased = self.by_sign or self.by_quantile or moe.router == "sigmoid"
        self.bias_E: Tensor | None
        self.register_buffer("bias_E", torch.zeros(moe.num_experts) if biased else None)

    def reset_buffers(self) -> None:
        super().reset_buffers()
        if self.bias_E is not None:
            self.bias_E.zero_()

    def route(self, logits_TE: Tensor, step: StepContext, chosen_TK: Tensor | None) -> Routing:
        """By score plus bias. What the tokens needed is counted where they are chosen for in training."""
        plain = self.bias_E is None and self.moe.num_groups == 1 and not self.explicit(step)
        if chosen_TK is not None or plain:
            return self.choose(logits_TE, step, chosen_TK)
        scores_TE = scores_of(logits_TE.detach(), self.score)
        scores_TE = self.settle(scores_TE if self.bias_E is None else scores_TE + self.bias_E, step)
        preference_TE = limit_groups(scores_TE, self.moe.num_groups, self.moe.top_k_groups, self.best_of)
        routing = self.choose(logits_TE, step, None, preference_TE)
        if not self.by_quantile or step.phase != "train":
            return routing
        assert self.bias_E is not None, "quantile balancing sets a bias"
        real_T = None if step.real is None else step.real.mask_T
        bins = self.moe.balance_bins
        needs_EB = needs_histogram(preference_TE, routing.experts_TK, self.bias_E, bins, real_T)
        return replace(routing, needs_EB=needs_EB)

    @torch.no_grad()
    def balance(self, load_E: Tensor, needs_EB: Tensor | None = None) -> None:
        if self.bias_E is None or self.still:
            return
        if self.by_sign:
            self.bias_E += self.moe.bias_update_rate * sign_step(load_E, self.open_E).to(self.bias_E)
        if self.by_quantile:
            assert needs_EB is not None, "counted in every forward pass in training"
            self.bias_E.copy_(quantile_bias(needs_EB, self.bias_E, self.open_E, self.moe.top_k, self.moe.balance_ema))

    def no_tally(self) -> Tally:
        tally = super().no_tally()
        return (
            replace(tally, needs_EB=tally.load_E.new_zeros(len(self.open_E), self.moe.balance_bins))
            if self.by_quantile
            else tally
        )


class SoftmaxRouter(ScoreRouter):
    """p = softmax(W x), the top_k largest (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961, eq. 1 and 2).

    jitter: in training, x is multiplied by a uniform number in [1 - jitter, 1 + jitter] for routing (Switch, sec. 2.2).
    """

    def forward(self, x_TD: Tensor, step: StepContext, chosen_TK: Tensor | None = None) -> Routing:
        logits_TE = fp32_logits(self._jittered(x_TD, step), self.weight, self.slices, self.logit_bias)
        return self.route(logits_TE, step, chosen_TK)

    def _jittered(self, x_TD: Tensor, step: StepContext) -> Tensor:
        if self.moe.jitter == 0.0 or step.phase != "train":
            return x_TD
        index_TD = self.draw_index(x_TD)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        factor_TD = 1 + self.moe.jitter * (2 * step.key.fold("jitter", self.site.number).uniform(index_TD) - 1)
        return x_TD.to(wide) * factor_TD.to(wide)


class SigmoidRouter(ScoreRouter):
    """s = sigmoid(W x); the top_k largest of s + b, weighed by s (DeepSeek-V3, arXiv 2412.19437, eq. 15 and 16).

    b is a balancing bias (balance.py); where nothing moves it, as under balance = loss, it stays as it was loaded.
    Groups are ranked by the sum of their best two experts.
    """

    score = "sigmoid"
    best_of = 2

    def forward(self, x_TD: Tensor, step: StepContext, chosen_TK: Tensor | None = None) -> Routing:
        return self.route(fp32_logits(x_TD, self.weight, self.slices, self.logit_bias), step, chosen_TK)


class NoisyRouter(Router):
    """H = W x + n * softplus(W_noise x), n standard normal in training; softmax over the top_k largest of H
    (Shazeer et al., arXiv 1701.06538, eq. 3 to 5).

    Its losses are squared coefficients of variation over experts: of importance, the summed weights (eq. 6), and of
    load, the summed probability to be chosen if an expert's noise were drawn again (eq. 8 to 11). The deviation of the
    noise is at least that of the authors' code, 0.01: the load divides by it.
    """

    knows_padding = False

    def __init__(self, moe: MoEConfig, d_model: int, site: Site, mesh: Mesh, kernels: str = "torch") -> None:
        super().__init__(moe, d_model, site, mesh, kernels)
        self.weight = router_weight(moe.num_experts, d_model)
        self.noise_weight = router_weight(moe.num_experts, d_model, std=0.0)

    def forward(self, x_TD: Tensor, step: StepContext, chosen_TK: Tensor | None = None) -> Routing:
        clean_TE = fp32_logits(x_TD, self.weight, self.slices)
        std_TE = at_least(F.softplus(fp32_logits(x_TD, self.noise_weight, self.slices)), _LEAST_NOISE)
        noisy_TE = clean_TE
        if step.phase == "train":
            index_TE = self.draw_index(clean_TE)
            noisy_TE = clean_TE + step.key.fold("noise", self.site.number).normal(index_TE).to(clean_TE.dtype) * std_TE
        preference_TE = self.settle(noisy_TE.detach().softmax(-1), step) if chosen_TK is None else None
        routing = self.choose(noisy_TE, step, chosen_TK, preference_TE)
        importance_E = torch.zeros_like(clean_TE).scatter(1, routing.experts_TK, routing.weights_TK).sum(0)
        importance_E = importance_E / max(len(x_TD), 1)
        extra = self.moe.importance_loss_coef * cv_squared(mean_over_group(importance_E, self.token_ranks))
        if step.phase == "train" and self.moe.top_k < self.moe.num_experts:
            load_E = self._chance(clean_TE, noisy_TE, std_TE, routing.experts_TK).sum(0) / max(len(x_TD), 1)
            extra = extra + self.moe.load_loss_coef * cv_squared(mean_over_group(load_E, self.token_ranks))
        return replace(routing, extra_loss=extra)

    def weigh(self, scores_TK: Tensor) -> Tensor:
        """The paper's softmax over the chosen alone; at top_k = 1 that is 1 and would teach the router nothing."""
        return self.scaled(scores_TK / scores_TK.sum(-1, keepdim=True) if self.moe.top_k > 1 else scores_TK)

    def _chance(self, clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """P(x, i): expert i must beat the k-th largest of the *others*, which is the (k+1)-th of all if i is chosen."""
        ranked = noisy_TE.topk(experts_TK.shape[1] + 1, dim=-1).values
        chosen_TE = torch.zeros_like(clean_TE, dtype=torch.bool).scatter(1, experts_TK, True)
        threshold_TE = torch.where(chosen_TE, ranked[:, -1:], ranked[:, -2:-1])
        return torch.special.ndtr((clean_TE - threshold_TE) / std_TE)


class ExpertChoiceRouter(Router):
    """S = softmax(W x); every expert takes the C tokens with the highest score in its column of S, weighed by it
    (Zhou et al., arXiv 2202.09368, eq. 1 to 3).

    Here: every token offers itself to all experts, and the capacity rule keeps the C best of each. top_k is the mean
    number of experts of a token. Not causal: who is taken depends on later tokens, in training and in evaluation.
    """

    def __init__(self, moe: MoEConfig, d_model: int, site: Site, mesh: Mesh, kernels: str = "torch") -> None:
        super().__init__(moe, d_model, site, mesh, kernels)
        self.weight = router_weight(moe.num_experts, d_model)

    def forward(self, x_TD: Tensor, step: StepContext, chosen_TK: Tensor | None = None) -> Routing:
        logits_TE = fp32_logits(x_TD, self.weight, self.slices)
        everyone_TE = torch.arange(self.moe.num_experts, device=x_TD.device).expand_as(logits_TE)
        return self.choose(logits_TE, step, everyone_TE)

    def weigh(self, scores_TK: Tensor) -> Tensor:
        return self.scaled(scores_TK)


class SinkhornRouter(Router):
    """Choose by W x after Sinkhorn's normalisation, which makes the micro-step's assignment nearly balanced; weigh by
    sigmoid(W x) at top_k = 1, else by softmax (Clark et al., arXiv 2202.01169, section 3.1 and appendix B).

    In training, exp(W x) of all tokens of the micro-step is scaled by rows and columns until both have equal sums, so
    the choice is not causal; evaluation takes the largest of W x itself.
    """

    knows_padding = False

    def __init__(self, moe: MoEConfig, d_model: int, site: Site, mesh: Mesh, kernels: str = "torch") -> None:
        super().__init__(moe, d_model, site, mesh, kernels)
        self.score = "sigmoid" if moe.top_k == 1 else "softmax"
        self.weight = router_weight(moe.num_experts, d_model)

    def forward(self, x_TD: Tensor, step: StepContext, chosen_TK: Tensor | None = None) -> Routing:
        logits_TE = fp32_logits(x_TD, self.weight, self.slices)
        if chosen_TK is not None:
            return self.choose(logits_TE, step, chosen_TK)
        preference_TE = logits_TE.detach()
        if step.phase == "train":
            self._check_equal(len(preference_TE))
            everyone = all_gather(preference_TE, self.token_ranks)
            first = self.token_ranks.rank * len(logits_TE)
            preference_TE = sinkhorn(everyone, self.moe.sinkhorn_iterations)[first : first + len(logits_TE)]
        return self.choose(logits_TE, step, None, self.settle(preference_TE.softmax(-1), step))

    def _check_equal(self, tokens: int) -> None:
        held = all_gather(torch.tensor([tokens], device=self.weight.device), self.token_ranks).tolist()
        if len(set(held)) > 1:
            raise ValueError(f"router=sinkhorn balances over all ranks, but they hold {held} tokens: give each as many")


class HashRouter(Router):
    """Expert = a fixed hash of the token id, nothing is learned (Roller et al., arXiv 2106.04426, section 3).

    The top_k experts are those with the highest hash of (layer, token id, name of the expert), so they are distinct,
    and adding or removing an expert moves only the tokens that now belong to it, or did. names_E: what experts are
    called for good, whatever their number becomes.
    """

    has_losses = False

    def __init__(self, moe: MoEConfig, d_model: int, site: Site, mesh: Mesh, kernels: str = "torch") -> None:
        super().__init__(moe, d_model, site, mesh, kernels)
        self.names_E: Tensor
        self.register_buffer("names_E", torch.arange(moe.num_experts))

    def reset_buffers(self) -> None:
        super().reset_buffers()
        self.names_E.copy_(torch.arange(len(self.names_E)))

    def forward(self, x_TD: Tensor, step: StepContext, chosen_TK: Tensor | None = None) -> Routing:
        num_experts = self.moe.num_experts
        ids_T = step.token_ids_T
        if ids_T is None or len(ids_T) != len(x_TD) or ids_T.is_floating_point():
            raise ValueError("router=hash needs the id of every token, an integer: give token_ids")
        # Far apart, so that a token's hash for an expert does not depend on how many experts there are.
        index_TE = (ids_T.long()[:, None] << 20) + self.names_E
        hashed_TE = RandomKey.of("hash", self.site.number).uniform(index_TE)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        routing = self.choose(x_TD.new_zeros(len(x_TD), num_experts, dtype=wide), step, chosen_TK, hashed_TE)
        equal_TK = torch.full_like(routing.weights_TK, self.moe.routed_scale / self.moe.top_k)
        return replace(routing, weights_TK=equal_TK)

    def weigh_again(self, weights_TK: Tensor, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        return weights_TK


ROUTERS: dict[str, type[Router]] = {
    "softmax": SoftmaxRouter,
    "sigmoid": SigmoidRouter,
    "noisy": NoisyRouter,
    "expert_choice": ExpertChoiceRouter,
    "sinkhorn": SinkhornRouter,
    "hash": HashRouter,
}


def router_weight(num_experts: int, d_model: int, std: float | None = None) -> nn.Parameter:
    """[E, D], the same on every rank; logits start with a standard deviation of 1 for inputs of unit size, or `std`."""
    shape = (num_experts, d_model)
    return parameter(shape, ParamSpec(shape, std=d_model**-0.5 if std is None else std))


def limit_groups(scores_TE: Tensor, num_groups: int, top_k_groups: int, best_of: int) -> Tensor:
    """Scores outside each token's best groups become -inf (device-limited routing, DeepSeek-V2, arXiv 2405.04434,
    section 2.2.2). A group is num_experts / num_groups neighbours, ranked by the sum of its `best_of` best experts."""
    if num_groups == 1:
        return scores_TE
    grouped_TGe = scores_TE.unflatten(1, (num_groups, -1))
    group_TG = grouped_TGe.topk(min(best_of, grouped_TGe.shape[2]), dim=-1).values.sum(-1)
    open_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter(1, best(group_TG, top_k_groups), True)
    return grouped_TGe.masked_fill(~open_TG[..., None], -torch.inf).flatten(1)


def at_least(x: Tensor, floor: float) -> Tensor:
    """The larger of both, exactly x where that is x; with the gradient of x everywhere, so that it can grow again."""
    return x + (floor - x).clamp(min=0).detach()


def cv_squared(values_E: Tensor) -> Tensor:
    """Squared coefficient of variation over experts: 0 when all are equal, E - 1 when one has everything."""
    return values_E.var(unbiased=False) / values_E.mean().square().clamp(min=1e-20)


def sinkhorn(logits_TE: Tensor, iterations: int) -> Tensor:
    """log of exp(logits) scaled so that rows sum to 1 / T and columns to 1 / E; fp32 maths in log space."""
    tokens, num_experts = logits_TE.shape
    for _ in range(iterations):
        logits_TE = logits_TE - logits_TE.logsumexp(0) - log(num_experts)
        logits_TE = logits_TE - logits_TE.logsumexp(1, keepdim=True) - log(max(tokens, 1))
    return logits_TE
