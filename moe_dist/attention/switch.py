"""Switch attention: each token goes to top_k attention experts (Mixture of Attention Heads, arXiv 2210.05144).

    y_t = sum over the chosen experts i of w_i(x_t) * Attention(x_t Wq_i^T, K, V) Wo_i,    K = X Wk^T, V = X Wv^T

An expert is a query and an output projection for all H heads; there is one key/value head, shared by every expert,
over the whole sequence at true positions. A token whose every assignment is dropped gets zero. With out_bias a vector
is added to all of them (JetMoE, arXiv 2404.07413).

Gate and dispatcher are those of the feed-forward experts: tokens go to the query projections and come back as
K * H query heads of the token; attention is the house's, on K * H heads; its results go to the output projections and
come back weighted. Under tp each rank routes its own slice of the tokens, and between both trips trades tokens for
heads, so that it attends with K * H / tp heads over whole sequences.

Legend: B batch, S sequence, L keys (S, or more with a cache), T tokens of this tp rank, K top_k, N = T * K assignments,
X rows that arrived, D d_model, H heads, P width of a head, M = H * P, E experts, e experts held here, J query heads of
this rank.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.attention.kv_cache import KVCache
from moe_dist.attention.positions import Positions
from moe_dist.attention.rotary import turn_heads
from moe_dist.config.model import AttentionConfig, HeadSizes, MoEConfig
from moe_dist.kernels.attention.backend import attention
from moe_dist.kernels.attention.pattern import Dropout, Pattern
from moe_dist.kernels.grouped_mm.linear import linear
from moe_dist.kernels.permute.backend import permutation
from moe_dist.kernels.permute.order import RowOrder
from moe_dist.moe.choice import Choice
from moe_dist.moe.dispatch import make_dispatcher
from moe_dist.moe.gate import Gate, Replay
from moe_dist.moe.losses import MoEStats
from moe_dist.parallel.collectives import copy_to_group
from moe_dist.parallel.heads import heads_to_tokens, tokens_to_heads
from moe_dist.parallel.linear import SharedBias, TokenSlices, enter
from moe_dist.parallel.mesh import Group, Mesh
from moe_dist.parallel.sharding import ParamSpec, Shard, parameter
from moe_dist.parallel.told import told
from moe_dist.step import StepContext


class SwitchAttention(nn.Module):
    """The trainer's layer for model.attention.kind = switch. x_TD: full tokens, or this tp rank's slice under sequence
    parallelism. sizes.num_kv_heads is 1. out_std: of the initial output projections; None is 1 / sqrt(width)."""

    def __init__(
        self,
        sizes: HeadSizes,
        config: AttentionConfig,
        mesh: Mesh,
        layer: int,
        kernels: str = "torch",
        out_std: float | None = None,
    ) -> None:
        super().__init__()
        moe = config.moe
        self.config = config
        self.layer = layer
        self.mesh = mesh
        self.tp = mesh.tp
        self.dp = mesh.dp
        self.heads = sizes.num_heads
        self.head_dim = sizes.head_dim
        if moe.top_k * self.heads % self.tp.size:
            raise ValueError(
                f"top_k*num_heads={moe.top_k}*{self.heads} query heads of a token are not divisible by "
                f"tp={self.tp.size}: change one of them"
            )
        self.slices = TokenSlices(mesh)
        self.gate = Gate(moe, sizes.d_model, layer, mesh, kernels, kind="attention")
        self.router = self.gate.router
        self.dispatcher = make_dispatcher(moe, mesh, kernels)
        self.experts = AttentionExperts(moe, sizes, mesh, kernels, out_std)
        shape = (2 * self.head_dim, sizes.d_model)
        self.key_value = parameter(shape, ParamSpec(shape, std=sizes.d_model**-0.5))
        self.out_bias = SharedBias(sizes.d_model, mesh) if config.out_bias else None
        self.attend = attention(config.backend)

    def forward(
        self,
        x_TD: Tensor,
        shape: tuple[int, int],
        positions: Positions,
        step: StepContext,
        cache: KVCache | None = None,
        replay: Replay | None = None,
    ) -> tuple[Tensor, MoEStats]:
        """shape: (B, S) of the full tokens. cache: of the shared head, whole on every tp rank. Every rank must call."""
        own_TD = self.slices.own(x_TD)
        # 1. Who goes where, with which weight, and who is let in. From here on, an assignment is a row of its own.
        choice = self.gate(own_TD, step, replay)
        chosen = choice.weights_TK.shape[1]
        weighted = each_alone(choice)
        unweighted = replace(weighted, weights_TK=torch.ones_like(weighted.weights_TK))
        # 2. To the query projections and back: K * H query heads of each token, zero where an assignment was dropped.
        x_ND = own_TD.repeat_interleave(chosen, 0)
        q_NM, sent_there = self.dispatcher.carry(x_ND, unweighted, self.experts.queries)
        # 3. Attention: this rank's heads over whole sequences.
        heads, width = chosen * self.heads, chosen * q_NM.shape[1]
        q_Tn = tokens_to_heads(self._clip(q_NM).view(len(own_TD), width), self.tp)
        q_BSJP = q_Tn.view(*shape, heads // self.tp.size, self.head_dim)
        k_BSP, v_BSP = self._keys_values(x_TD, shape)
        y_BSJP = self._attend(q_BSJP, k_BSP, v_BSP, positions, step, cache)
        y_NM = heads_to_tokens(y_BSJP.reshape(q_Tn.shape), self.tp).reshape(q_NM.shape)
        # 4. To the output projections and back, weighted, and summed over a token's assignments.
        y_ND, sent_back = self.dispatcher.carry(y_NM, weighted, self.experts.outputs)
        y_TD = self.slices.all(y_ND.unflatten(0, (-1, chosen)).sum(1))
        y_TD = y_TD if self.out_bias is None else self.out_bias(y_TD)
        # 5. What it cost, and what the router is told. Rows go there D and come back M wide, then the other way round:
        # the sum is that of two trips with one width each.
        return y_TD, MoEStats.of(choice, self.router, step, sent_there + sent_back)

    def new_cache(self, rows: int, length: int) -> KVCache:
        """For `rows` sequences of at most `length` tokens, in the precision of the weights."""
        return KVCache(rows, length, 1, self.head_dim, self.key_value.dtype, self.key_value.device)

    def _keys_values(self, x_TD: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Of all tokens, on every tp rank; each rank's heads give a part of the gradients, which are summed over tp."""
        kv_TP = F.linear(enter(x_TD, self.mesh), copy_to_group(self.key_value, self.tp))
        k_BSP, v_BSP = self._clip(kv_TP).view(*shape, 2 * self.head_dim).chunk(2, dim=-1)
        return k_BSP, v_BSP

    def _clip(self, x: Tensor) -> Tensor:
        limit = self.config.clip_qkv
        return x if limit is None else x.clamp(-limit, limit)

    def _attend(
        self,
        q_BSJP: Tensor,
        k_BSP: Tensor,
        v_BSP: Tensor,
        positions: Positions,
        step: StepContext,
        cache: KVCache | None,
    ) -> Tensor:
        """-> [B, S, J, P], contiguous by token."""
        rows, heads = len(q_BSJP), q_BSJP.shape[2]
        if positions.rotary is not None:
            q_BSJP = turn_heads(q_BSJP, positions.rotary)
            k_BSP = turn_heads(k_BSP[:, :, None], positions.rotary)[:, :, 0]
        k_BGLP, v_BGLP, starts_B = k_BSP[:, None], v_BSP[:, None], None
        if cache is not None:
            starts_B = cache.starts()
            k_BGLP, v_BGLP = cache.update(k_BGLP, v_BGLP)
        dropout = None
        if self.config.dropout > 0 and step.phase == "train":
            key = step.key.fold("attention dropout", self.layer)
            first = (self.dp.rank * rows, self.tp.rank * heads)
            dropout = Dropout(self.config.dropout, key, *first, heads=self.tp.size * heads)
        bias = positions.bias
        pattern = Pattern(
            window=self.config.window_of(self.layer),
            starts_B=starts_B,
            slopes_H=None if positions.slopes_H is None else self._of_own_heads(positions.slopes_H, 0, heads),
            bias=bias if bias is None or bias.shape[1] == 1 else self._of_own_heads(bias, 1, heads),
            dropout=dropout,
        )
        y_BJSP = self.attend(q_BSJP.transpose(1, 2), k_BGLP, v_BGLP, pattern, None)
        return y_BJSP.transpose(1, 2)

    def _of_own_heads(self, values: Tensor, dim: int, heads: int) -> Tensor:
        """From one for each of an expert's H heads to one for each query head of this rank; a token's k-th expert has
        heads k * H to (k + 1) * H."""
        first = self.tp.rank * heads
        index_J = torch.arange(first, first + heads, device=values.device) % self.heads
        return values.index_select(dim, index_J)


class AttentionExperts(nn.Module):
    """The experts held by this rank: Wq_i and Wo_i, both [H * P, D], one number of the heads after the other.

    Cut over ep by expert, so a rank's part is a contiguous range; gradients as those of moe/experts.py.
    """

    def __init__(self, moe: MoEConfig, sizes: HeadSizes, mesh: Mesh, kernels: str, out_std: float | None) -> None:
        super().__init__()
        d_model, width, ep = sizes.d_model, sizes.width, mesh.ep
        if mesh.etp > 1:
            raise ValueError(f"attention experts cannot be cut over etp={mesh.etp}: set it to 1")
        if moe.num_experts % ep.size:
            raise ValueError(f"num_experts={moe.num_experts} is not divisible by ep={ep.size}")
        self.backend, self.permute = moe.experts, permutation(kernels)
        # Where every rank holds all experts, the tp ranks see different slices of the tokens.
        self.world, self.slices = mesh.world, mesh.tp if ep.size == 1 else Group()
        local, shard = moe.num_experts // ep.size, "expert" if ep.size > 1 else "replicated"

        def matrices(std: float, shard: Shard = shard) -> nn.Parameter:  # type: ignore[assignment]
            each = width * d_model
            logical, first = (moe.num_experts, width, d_model), ep.rank * local * each
            return parameter((local, *logical[1:]), ParamSpec(logical, shard, first, std, (each,) * moe.num_experts))

        self.w_query = matrices(d_model**-0.5)
        self.w_out = matrices(width**-0.5 if out_std is None else out_std)

    def queries(self, x_XD: Tensor, ones_XK: Tensor | None, order: RowOrder) -> Tensor:
        """x Wq_i^T of each row, i its expert, unweighted; zero for rows that were not let in: [X, D] -> [X, M]."""
        return self._map(x_XD, None, order, self.w_query, out_first=True)

    def outputs(self, y_XM: Tensor, weights_XK: Tensor | None, order: RowOrder) -> Tensor:
        """y Wo_i of each row, weighted where the dispatcher asks for it here: [X, M] -> [X, D]."""
        return self._map(y_XM, weights_XK, order, self.w_out, out_first=False)

    def _map(self, x: Tensor, weights_XK: Tensor | None, order: RowOrder, w_eMD: Tensor, out_first: bool) -> Tensor:
        w_eMD = copy_to_group(w_eMD, self.slices)

        def mapped(x: Tensor) -> Tensor:
            w = w_eMD
            if torch.is_autocast_enabled(x.device.type):  # the kernels are single functions: cast here, once
                dtype = torch.get_autocast_dtype(x.device.type)
                x, w = x.to(dtype), w.to(dtype)
            with torch.autocast(x.device.type, enabled=False):
                rows = self.permute.gather_rows(x, order)
                rows = linear(rows, w, order, self.backend, out_first)
                return self.permute.combine_rows(rows, weights_XK, order)

        return told(self.world.trail, "experts", mapped, x)


def each_alone(choice: Choice) -> Choice:
    """The same choice with every assignment as a row of its own: [T, K] -> [N, 1]."""
    plan, weights_TK = choice.plan, choice.weights_TK
    alone = replace(plan, experts_TK=plan.experts_TK.reshape(-1, 1), kept_TK=plan.kept_TK.reshape(-1, 1))
    return replace(choice, plan=alone, weights_TK=weights_TK.reshape(-1, 1))
