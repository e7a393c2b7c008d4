"""Switch attention: each token goes to top_k attention experts (Mixture of Attention Heads, arXiv 2210.05144).

    y_t = sum over the chosen experts i of w_i(x_t) * Attention(x_t Wq_i^T, K, V) Wo_i,    K = X Wk^T, V = X Wv^T

An expert is a query and an output projection for all H heads; the G key/value heads, one in the paper and H in JetMoE
(arXiv 2404.07413), are shared by every expert, over the whole sequence at true positions. Head h of an expert reads
key/value head h * G // H. A token whose every assignment is dropped gets zero. With out_bias a vector is added to all
of them.

Gate and dispatcher are those of the feed-forward experts: tokens go to the query projections and come back as
K * H query heads of the token; attention is the house's, on K * H heads, those of a key/value head beside one another;
its results go to the output projections and come back weighted. Under tp each rank routes its own slice of the tokens,
and between both trips trades tokens for heads, so that it attends with K * H / tp heads over whole sequences.

Legend: B batch, S sequence, L keys (S, or more with a cache), T tokens of this tp rank, K top_k, N = T * K assignments,
X rows that arrived, D d_model, H heads, G key/value heads, P width of a head, M = H * P, E experts, e experts held
here, J query heads of this rank, I key/value heads that they are given.
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
from moe_dist.parallel.heads import HeadAssignment, heads_to_tokens, tokens_to_heads
from moe_dist.parallel.linear import SharedBias, TokenSlices, enter
from moe_dist.parallel.mesh import Group, Mesh
from moe_dist.parallel.sharding import ParamSpec, Shard, parameter
from moe_dist.parallel.told import told
from moe_dist.step import StepContext


class SwitchAttention(nn.Module):
    """The trainer's layer for model.attention.kind = switch. x_TD: full tokens, or this tp rank's slice under sequence
    parallelism. out_std: of the initial output projections; None is 1 / sqrt(width)."""

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
        self.groups = sizes.num_kv_heads
        self.assignment = HeadAssignment.of(moe.top_k * self.heads, self.groups, self.tp)
        self.slices = TokenSlices(mesh)
        self.gate = Gate(moe, sizes.d_model, layer, mesh, kernels, kind="attention")
        self.router = self.gate.router
        self.dispatcher = make_dispatcher(moe, mesh, kernels)
        self.experts = AttentionExperts(moe, sizes, mesh, kernels, out_std)
        shape = (self.groups * 2 * self.head_dim, sizes.d_model)  # head after head: its keys, its values
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
        """shape: (B, S) of the full tokens. Every rank must call."""
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
        q_Tn = tokens_to_heads(self._by_group(self._clip(q_NM), chosen), self.tp)
        q_BSJP = q_Tn.view(*shape, len(self.assignment.queries), self.head_dim)
        k_BSIP, v_BSIP = self._keys_values(x_TD, shape)
        y_BSJP = self._attend(q_BSJP, k_BSIP, v_BSIP, positions, step, cache)
        y_NM = self._by_assignment(heads_to_tokens(y_BSJP.reshape(q_Tn.shape), self.tp), chosen)
        # 4. To the output projections and back, weighted, and summed over a token's assignments.
        y_ND, sent_back = self.dispatcher.carry(y_NM, weighted, self.experts.outputs)
        y_TD = self.slices.all(y_ND.unflatten(0, (-1, chosen)).sum(1))
        y_TD = y_TD if self.out_bias is None else self.out_bias(y_TD)
        # 5. What it cost, and what the router is told. Rows go there D and come back M wide, then the other way round:
        # the sum is that of two trips with one width each.
        return y_TD, MoEStats.of(choice, self.router, step, sent_there + sent_back)

    def new_cache(self, rows: int, length: int) -> KVCache:
        """For `rows` sequences of at most `length` tokens, in the precision of the weights."""
        weight = self.key_value
        return KVCache(rows, length, self.assignment.kv_read, self.head_dim, weight.dtype, weight.device)

    def _by_group(self, x_NM: Tensor, chosen: int) -> Tensor:
        """[N, M] -> [t, K * M]: of the K * H heads of a token, those of a key/value head beside one another."""
        rows, width = x_NM.shape
        x_tKGn = x_NM.view(rows // chosen, chosen, self.groups, width // self.groups)
        return x_tKGn.transpose(1, 2).flatten(1)

    def _by_assignment(self, x_tn: Tensor, chosen: int) -> Tensor:
        """[t, K * M] -> [N, M], the inverse."""
        rows, width = x_tn.shape
        x_tGKn = x_tn.reshape(rows, self.groups, chosen, width // (self.groups * chosen))
        return x_tGKn.transpose(1, 2).reshape(rows * chosen, width // chosen)

    def _keys_values(self, x_TD: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Of all tokens, two tensors [B, S, I, P]: every tp rank has the whole weight and computes the heads that its
        query heads read. Each rank's give a part of the gradients, which are summed over tp."""
        held, reads, rows = self.assignment.kv_held, self.assignment.reads, 2 * self.head_dim
        weight = copy_to_group(self.key_value, self.tp)[held.start * rows : held.stop * rows]
        kv_BSIP = self._clip(F.linear(enter(x_TD, self.mesh), weight)).view(*shape, len(held), 2, self.head_dim)
        if reads is not None:
            kv_BSIP = kv_BSIP[:, :, list(reads)]
        return kv_BSIP[..., 0, :], kv_BSIP[..., 1, :]

    def _clip(self, x: Tensor) -> Tensor:
        limit = self.config.clip_qkv
        return x if limit is None else x.clamp(-limit, limit)

    def _attend(
        self,
        q_BSJP: Tensor,
        k_BSIP: Tensor,
        v_BSIP: Tensor,
        positions: Positions,
        step: StepContext,
        cache: KVCache | None,
    ) -> Tensor:
        """-> [B, S, J, P], contiguous by token."""
        rows, queries = len(q_BSJP), self.assignment.queries
        if positions.rotary is not None:
            q_BSJP, k_BSIP = turn_heads(q_BSJP, positions.rotary), turn_heads(k_BSIP, positions.rotary)
        k_BILP, v_BILP, starts_B = k_BSIP.transpose(1, 2), v_BSIP.transpose(1, 2), None
        if cache is not None:
            starts_B = cache.starts()
            k_BILP, v_BILP = cache.update(k_BILP, v_BILP)
        dropout = None
        if self.config.dropout > 0 and step.phase == "train":
            key = step.key.fold("attention dropout", self.layer)
            first = (self.dp.rank * rows, queries.start)
            dropout = Dropout(self.config.dropout, key, *first, heads=self.tp.size * len(queries))
        bias = positions.bias
        pattern = Pattern(
            window=self.config.window_of(self.layer),
            starts_B=starts_B,
            slopes_H=None if positions.slopes_H is None else self._of_own_heads(positions.slopes_H, 0),
            bias=bias if bias is None or bias.shape[1] == 1 else self._of_own_heads(bias, 1),
            dropout=dropout,
        )
        y_BJSP = self.attend(q_BSJP.transpose(1, 2), k_BILP, v_BILP, pattern, None)
        return y_BJSP.transpose(1, 2)

    def _of_own_heads(self, values: Tensor, dim: int) -> Tensor:
        """From one for each of an expert's H heads to one for each query head of this rank, in the order of
        _by_group: of each key/value head, the heads of a token's first expert that read it, then those of the next."""
        queries, readers = self.assignment.queries, self.heads // self.groups
        at_J = torch.arange(queries.start, queries.stop, device=values.device)
        group_J = at_J // (readers * self.config.moe.top_k)
        return values.index_select(dim, group_J * readers + at_J % readers)


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
