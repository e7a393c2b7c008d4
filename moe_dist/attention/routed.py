"""Routed autoregressive attention: all tokens look near, a few look far (CoLT5, arXiv 2303.09752).

Every token attends to the `local_window` tokens before it. Beside that, each expert has attention of its own, in which
a few queries of a window see a few keys out of all windows before; routing_tokens.py says which. What it gives is added
at the chosen tokens, and the expert's null token at all others. Window 0 has the local attention alone.

Legend: B batch, S sequence, T = B * S, D d_model, H query heads, G key/value heads, P width of a head, E experts,
M windows that are routed, w tokens of a window, N = B * M, Q queries and K keys of a window chosen by an expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.attention.kv_cache import KVCache
from moe_dist.attention.local import local_attention, part_of
from moe_dist.attention.multi_query import KeyValueHeads
from moe_dist.attention.positions import Positions
from moe_dist.attention.routing_tokens import RoutingTokens
from moe_dist.config.model import AttentionConfig, HeadSizes, RoutedAttentionConfig
from moe_dist.kernels.attention.backend import Attend, attention
from moe_dist.kernels.attention.pattern import Dropout, Pattern
from moe_dist.kernels.coordinate_descent.backend import Descent, coordinate_descent
from moe_dist.moe.gate import Replay
from moe_dist.moe.losses import MoEStats
from moe_dist.parallel.collectives import copy_to_group
from moe_dist.parallel.linear import ColumnParallelLinear, RowParallelLinear, enter, leave
from moe_dist.parallel.mesh import Group, Mesh
from moe_dist.parallel.sharding import ParamSpec, parameter
from moe_dist.step import StepContext

Rotary = tuple[Tensor, Tensor]
"""(cos, sin), each [1 or B, S, 1 or H, P]: the angle by which each number of a head is turned."""


class AttentionProjections(nn.Module):
    """Query, key/value and output projections of one attention, heads cut over tp; `null`: with one learned key and
    value for each key/value head, [G, 2, P], that every query may look at."""

    def __init__(self, sizes: HeadSizes, tp: Group, out_std: float, null: bool) -> None:
        super().__init__()
        self.head_dim = sizes.head_dim
        self.tp = tp
        self.query = ColumnParallelLinear(sizes.d_model, sizes.width, tp, sizes.d_model**-0.5)
        self.key_value = KeyValueHeads(sizes, tp)
        self.out = RowParallelLinear(sizes.width, sizes.d_model, tp, out_std)
        shape = (sizes.num_kv_heads, 2, sizes.head_dim)
        self.null = parameter(shape, ParamSpec(shape, std=1.0, vector=True)) if null else None

    def project(self, x_QD: Tensor, x_KD: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x_QD, keys and values of x_KD, both cut into `rows` rows."""
        q_NQHP = self.query(x_QD).view(rows, len(x_QD) // rows, -1, self.head_dim)
        return q_NQHP, *self.key_value(x_KD, (rows, len(x_KD) // rows))

    def with_null(self, k_NKGP: Tensor, v_NKGP: Tensor) -> tuple[Tensor, Tensor]:
        """The null key and value before the others, as this rank's query heads read them."""
        assert self.null is not None
        assignment = self.key_value.assignment
        held = list(assignment.kv_held)
        heads = held if assignment.reads is None else [held[place] for place in assignment.reads]
        null_G2P = copy_to_group(self.null, self.tp)[heads].expand(len(k_NKGP), -1, -1, -1)
        pairs = zip((k_NKGP, v_NKGP), null_G2P.unbind(2), strict=True)
        k, v = (torch.cat((null_NGP[:, None], t), dim=1) for t, null_NGP in pairs)
        return k, v

    def merge(self, y_NQHP: Tensor) -> Tensor:
        """[N * Q, D], partial sums."""
        return self.out(y_NQHP.reshape(-1, y_NQHP.shape[2] * self.head_dim))


class RoutedAttention(nn.Module):
    """x_TD of all tokens -> y_TD, partial sums over tp: what the document's layer and the trainer's share."""

    def __init__(
        self,
        sizes: HeadSizes,
        routed: RoutedAttentionConfig,
        attend: Attend,
        descend: Descent,
        tp: Group,
        out_std: float,
    ) -> None:
        super().__init__()
        self.routed = routed
        self.attend = attend
        self.tp = tp
        self.local = AttentionProjections(sizes, tp, out_std, null=False)
        self.routers = RoutingTokens(sizes.d_model, routed, descend, tp)
        self.experts = nn.ModuleList(
            AttentionProjections(sizes, tp, out_std, null=True) for _ in range(routed.num_experts)
        )
        shape = (routed.num_experts, sizes.d_model)
        self.null_tokens = parameter(shape, ParamSpec(shape, vector=True))

    def forward(
        self,
        x_TD: Tensor,
        shape: tuple[int, int],
        rotary: Rotary | None = None,
        dropout: Dropout | None = None,
        queries: int | None = None,
        key_values: int | None = None,
    ) -> Tensor:
        """shape: (B, S). queries, key_values: instead of those of the configuration. dropout: of all weights."""
        (batch, length), window = shape, self.routers.window
        y_TD = self._near(x_TD, shape, rotary, dropout)
        if length <= window:
            return y_TD
        queries = self.routed.num_routed_queries if queries is None else queries
        key_values = self.routed.num_routed_key_values if key_values is None else key_values
        y_TD = self._with_far(y_TD, x_TD, shape, (queries, key_values), rotary, dropout)
        if not self.routed.average_routed:
            return y_TD
        y_BSD = y_TD.view(batch, length, -1)
        mean_BSD = y_BSD / (len(self.experts) + 1)
        if self.routed.causal_routing:  # window 0 has one output to average, whatever comes after it
            mean_BSD = torch.cat((y_BSD[:, :window], mean_BSD[:, window:]), dim=1)
        return mean_BSD.view_as(y_TD)

    def _near(self, x_TD: Tensor, shape: tuple[int, int], rotary: Rotary | None, dropout: Dropout | None) -> Tensor:
        q_BSHP, k_BSGP, v_BSGP = self.local.project(x_TD, x_TD, shape[0])
        q_BSHP, k_BSGP = (t if rotary is None else turn(t, rotary) for t in (q_BSHP, k_BSGP))
        y_BSHP = local_attention(
            q_BSHP, k_BSGP, v_BSGP, self.attend, self.routed.local_window, part_of(dropout, "local")
        )
        return self.local.merge(y_BSHP)

    def _with_far(
        self,
        y_TD: Tensor,
        x_TD: Tensor,
        shape: tuple[int, int],
        sizes: tuple[int, int],
        rotary: Rotary | None,
        dropout: Dropout | None,
    ) -> Tensor:
        (batch, length), window, experts = shape, self.routers.window, len(self.experts)
        chosen, seen = self.routers(x_TD, shape, *sizes)
        windows = batch * chosen.rows_EBMC.shape[2]
        # 1. Gather all rows at once, so that the gradient of x is put together once.
        rows = [*chosen.rows_EBMC.flatten(1), *seen.rows_EBMC.flatten(1)]
        gathered = F.embedding(torch.cat(rows), x_TD).split([len(own) for own in rows])
        # 2. Each expert's attention.
        found = []
        for index, expert in enumerate(self.experts):
            assert isinstance(expert, AttentionProjections)
            q_NQHP, k_NKGP, v_NKGP = expert.project(gathered[index], gathered[experts + index], windows)
            if rotary is not None:
                q_NQHP = turn(q_NQHP, at(rotary, chosen.rows_EBMC[index], length))
                k_NKGP = turn(k_NKGP, at(rotary, seen.rows_EBMC[index], length))
            v_NKGP = v_NKGP * seen.weights_EBMC[index].flatten(0, 1)[..., None, None].to(v_NKGP.dtype)
            k_NKGP, v_NKGP = expert.with_null(k_NKGP, v_NKGP)
            live_NK = None
            if seen.live_EBMC is not None:
                live_NK = F.pad(seen.live_EBMC[index].flatten(0, 1), (1, 0), value=True)
            part = part_of(dropout, f"expert {index}", chosen.rows_EBMC.shape[2])
            pattern = Pattern(causal=False, keys_BS=live_NK, dropout=part)
            q_NHQP, k_NGKP, v_NGKP = (t.transpose(1, 2) for t in (q_NQHP, k_NKGP, v_NKGP))
            y_QD = expert.merge(self.attend(q_NHQP, k_NGKP, v_NGKP, pattern, None).transpose(1, 2))
            found.append(y_QD * chosen.weights_EBMC[index].flatten()[:, None].to(y_QD.dtype))
        # 3. Back to their rows; a null token of each expert where it chose nobody.
        y_TD = y_TD.index_add(0, torch.cat(rows[:experts]), torch.cat(found))
        null_BSE = F.pad(~chosen.kept_EBMw.flatten(-2), (window, 0)).movedim(0, -1)[:, :length].to(y_TD.dtype)
        # Its gradient is whole on tp rank 0, where it is added, and nothing elsewhere.
        null_ED = copy_to_group(self.null_tokens, self.tp) * (self.tp.rank == 0)
        return y_TD.addmm(null_BSE.reshape(len(y_TD), -1), null_ED)


class RoutedSelfAttention(nn.Module):
    """The trainer's layer for model.attention.kind = routed: x_TD -> y_TD, both cut by tokens under sequence
    parallelism."""

    def __init__(
        self, sizes: HeadSizes, config: AttentionConfig, mesh: Mesh, layer: int, kernels: str, out_std: float
    ) -> None:
        super().__init__()
        self.layer = layer
        self.mesh = mesh
        self.rate = config.dropout
        self.num_heads = sizes.num_heads
        attend, descend = attention(config.backend), coordinate_descent(kernels)
        self.routed = RoutedAttention(sizes, config.routed, attend, descend, mesh.tp, out_std)

    def forward(
        self,
        x_TD: Tensor,
        shape: tuple[int, int],
        positions: Positions,
        step: StepContext,
        cache: KVCache | None = None,
        replay: Replay | None = None,
    ) -> tuple[Tensor, MoEStats | None]:
        """shape: (B, S) of the full tokens. replay is not needed: the same tokens are routed the same way again.

        Raises ValueError for a cache, a mask of keys, ALiBi and attention that is not causal.
        """
        _check(positions, cache)
        rotary = None
        if positions.rotary is not None:
            rotary = tuple(torch.cat((t, t), dim=-1)[:, :, None] for t in positions.rotary)
        dropout = None
        if self.rate > 0 and step.phase == "train":
            key, first = step.key.fold("attention", self.layer), self.num_heads // self.mesh.tp.size * self.mesh.tp.rank
            dropout = Dropout(self.rate, key, self.mesh.dp.rank * shape[0], first, self.num_heads)
        y_TD = self.routed(enter(x_TD, self.mesh), shape, rotary, dropout)
        return leave(y_TD, self.mesh), None


def _check(positions: Positions, cache: KVCache | None) -> None:
    if cache is not None:
        raise ValueError(
            "attention.kind=routed has no cache: which keys a token sees is found anew for every window; give all "
            "tokens again, without a cache"
        )
    if positions.bias is not None:
        raise ValueError("attention.kind=routed takes no mask: put padding at the end, where nobody sees it")
    if positions.slopes_H is not None:
        raise ValueError("attention.kind=routed has no ALiBi: set model.attention.position to rotary or none")


def turn(x_NSHP: Tensor, rotary: Rotary) -> Tensor:
    """Each pair (x_i, x_{i + P/2}) turned, x_i by the angle at i and x_{i + P/2} by its own (arXiv 2104.09864)."""
    cos, sin = (t.to(x_NSHP.dtype) for t in rotary)
    first, second = x_NSHP.chunk(2, dim=-1)
    return x_NSHP * cos + torch.cat((-second, first), dim=-1) * sin


def at(rotary: Rotary, rows_BMC: Tensor, length: int) -> Rotary:
    """Of the chosen tokens: each [B * M, C, 1 or H, P]."""
    rows_NC = rows_BMC.flatten(0, 1)
    cos, sin = (t[0][rows_NC % length] if len(t) == 1 else t.flatten(0, 1)[rows_NC] for t in rotary)
    return cos, sin
