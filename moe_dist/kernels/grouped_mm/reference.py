"""The experts' feed-forward from plain torch operations: the oracle of the fused ones.

Three ways of one matrix product per expert, [R, N] x [e, M, N]^T -> [R, M] over rows sorted by expert: `loop` takes one
expert after another, `bmm` pads every expert to the fullest and uses one batched product, `grouped_mm` is torch's
grouped GEMM. Experts without rows get zero gradients, never none.

Legend: X rows of x, K assignments of each, R rows sorted by expert, e experts, D d_model, F expert hidden, C rows of
the fullest expert.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_dist.kernels.activation import activate
from moe_dist.kernels.grouped_mm.weights import ExpertWeights
from moe_dist.kernels.permute.backend import Permutation
from moe_dist.kernels.permute.order import RowOrder

Matmul = Callable[[Tensor, Sequence[Tensor] | Tensor, Sequence[int]], Tensor]


def feed_forward(
    x_XD: Tensor,
    weights_XK: Tensor | None,
    order: RowOrder,
    w: ExpertWeights,
    activation: str,
    backend: str,
    widths: Sequence[int] | None = None,
    recompute: bool = False,
    permute: Permutation | None = None,
) -> Tensor:
    """y[x] = sum over kept k of weights[x, k] * E_i(x), i the expert of the assignment: [X, D] -> [X, D].

    widths: hidden width of each expert where they differ; gate, up and out are then [sum of widths, D], and only `loop`
    can compute. recompute: keep the pre-activation alone and activate again in the backward pass.
    """
    permute = permute or Permutation()
    rows_RD = permute.gather_rows(x_XD, order)
    if rows_RD.shape[0] == 0:
        # Nothing arrived: stay in the graph, so that idle experts get zero gradients and no exchange is skipped.
        idle = sum(p.sum() for p in w if p is not None) * 0.0
        return permute.combine_rows(rows_RD + idle, weights_XK, order)
    counts = order.rows_per_expert
    if widths is None:
        matmul = GROUPED_MM[backend]
        gate_RF = None if w.gate is None else _add(matmul(rows_RD, w.gate.transpose(1, 2), counts), w.gate_bias, counts)
        up_RF = _add(matmul(rows_RD, w.up.transpose(1, 2), counts), w.up_bias, counts)

        def out(gate_RF: Tensor | None, up_RF: Tensor) -> Tensor:
            return _add(matmul(activate(up_RF, activation, gate_RF), w.out, counts), w.out_bias, counts)

        # The recomputation stops before the product: its output is not needed again.
        rows_RD = checkpoint(out, gate_RF, up_RF, use_reentrant=False) if recompute else out(gate_RF, up_RF)
    else:
        rows_RD = _different_widths(rows_RD, counts, w, activation, widths)
    return permute.combine_rows(rows_RD, weights_XK, order)


def loop(rows_RN: Tensor, weight_eNM: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
    """Expert after expert. `unbind`, because indexing would make a full-size zero gradient for every expert."""
    parts = zip(rows_RN.split(list(rows_per_expert)), weight_eNM.unbind(0), strict=True)
    return torch.cat([rows @ weight for rows, weight in parts])


def bmm(rows_RN: Tensor, weight_eNM: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
    """Pad to [e, C, N], multiply once, take the rows out again."""
    experts, fullest = len(rows_per_expert), max(rows_per_expert)
    counts_e = torch.tensor(rows_per_expert, device=rows_RN.device)
    starts_e = counts_e.cumsum(0) - counts_e
    shift_e = torch.arange(experts, device=rows_RN.device) * fullest - starts_e
    slots_R = torch.arange(rows_RN.shape[0], device=rows_RN.device) + shift_e.repeat_interleave(counts_e)
    padded = rows_RN.new_zeros(experts * fullest, rows_RN.shape[1]).index_copy(0, slots_R, rows_RN)
    out = torch.bmm(padded.view(experts, fullest, -1), weight_eNM)
    return out.flatten(0, 1).index_select(0, slots_R)


def grouped_mm(rows_RN: Tensor, weight_eNM: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
    """torch.nn.functional.grouped_mm: offsets int32, contiguous rows; fp32, bf16 and fp16 only."""
    offsets_e = torch.tensor(rows_per_expert, device=rows_RN.device).cumsum(0, dtype=torch.int32)
    return F.grouped_mm(rows_RN, weight_eNM, offs=offsets_e)


GROUPED_MM = {"loop": loop, "bmm": bmm, "grouped_mm": grouped_mm}


def _add(rows_RM: Tensor, bias_eM: Tensor | None, rows_per_expert: Sequence[int]) -> Tensor:
    if bias_eM is None:
        return rows_RM
    counts_e = torch.tensor(rows_per_expert, device=rows_RM.device)
    return rows_RM + bias_eM.repeat_interleave(counts_e, dim=0, output_size=rows_RM.shape[0])


def _different_widths(
    rows_RD: Tensor, counts: Sequence[int], w: ExpertWeights, activation: str, widths: Sequence[int]
) -> Tensor:
    """Expert after expert, each with its own slice of the hidden units."""

    def each(p: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * len(widths) if p is None else p.split(list(widths))

    out_bias = [None] * len(widths) if w.out_bias is None else w.out_bias.unbind(0)
    parts = []
    for rows, gate, up, out, gate_bias, up_bias, bias in zip(
        rows_RD.split(list(counts)), *map(each, w[:5]), out_bias, strict=True
    ):
        gated = None if gate is None else F.linear(rows, gate, gate_bias)
        y = activate(F.linear(rows, up, up_bias), activation, gated) @ out
        parts.append(y if bias is None else y + bias)
    return torch.cat(parts)
