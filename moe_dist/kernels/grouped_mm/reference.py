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

Matmul = Callable[[Tensor, Tensor, RowOrder], Tensor]
"""(rows [R, N], weight [e, N, M], whose rows are whose) -> [R, M]."""

_ALIGNED = 16  # bytes that torch's grouped GEMM wants from one row to the next


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
    if widths is None:
        matmul = GROUPED_MM[backend]
        gate_RF = None if w.gate is None else _add(matmul(rows_RD, w.gate.transpose(1, 2), order), w.gate_bias, order)
        up_RF = _add(matmul(rows_RD, w.up.transpose(1, 2), order), w.up_bias, order)

        def out(gate_RF: Tensor | None, up_RF: Tensor) -> Tensor:
            return _add(matmul(activate(up_RF, activation, gate_RF), w.out, order), w.out_bias, order)

        # The recomputation stops before the product: its output is not needed again.
        rows_RD = checkpoint(out, gate_RF, up_RF, use_reentrant=False) if recompute else out(gate_RF, up_RF)
    else:
        rows_RD = _different_widths(rows_RD, order.rows_per_expert, w, activation, widths)
    return permute.combine_rows(rows_RD, weights_XK, order)


def loop(rows_RN: Tensor, weight_eNM: Tensor, order: RowOrder) -> Tensor:
    """Expert after expert. `unbind`, because indexing would make a full-size zero gradient for every expert."""
    parts = zip(rows_RN.split(list(order.rows_per_expert)), weight_eNM.unbind(0), strict=True)
    return torch.cat([rows @ weight for rows, weight in parts])


def bmm(rows_RN: Tensor, weight_eNM: Tensor, order: RowOrder) -> Tensor:
    """Pad to [e, C, N], multiply once, take the rows out again."""
    counts_e, fullest = order.counts_e, max(order.rows_per_expert)
    experts, rows = len(counts_e), len(rows_RN)
    starts_e = counts_e.cumsum(0) - counts_e
    shift_e = torch.arange(experts, device=rows_RN.device) * fullest - starts_e
    slots_R = torch.arange(rows, device=rows_RN.device) + shift_e.repeat_interleave(counts_e, output_size=rows)
    padded = rows_RN.new_zeros(experts * fullest, rows_RN.shape[1]).index_copy(0, slots_R, rows_RN)
    out = torch.bmm(padded.view(experts, fullest, -1), weight_eNM)
    return out.flatten(0, 1).index_select(0, slots_R)


def grouped_mm(rows_RN: Tensor, weight_eNM: Tensor, order: RowOrder) -> Tensor:
    """torch.nn.functional.grouped_mm: offsets int32, contiguous rows; fp32, bf16 and fp16 only.

    It wants rows of a multiple of 16 bytes: other widths are filled up with zeros, which add nothing to a product.
    """
    offsets_e = order.counts_e.cumsum(0, dtype=torch.int32)
    step, (deep, wide) = _ALIGNED // rows_RN.element_size(), weight_eNM.shape[1:]
    more_deep, more_wide = -deep % step, -wide % step
    if more_deep or more_wide:
        rows_RN, weight_eNM = F.pad(rows_RN, (0, more_deep)), _padded(weight_eNM, more_deep, more_wide)
        return F.grouped_mm(rows_RN, weight_eNM, offs=offsets_e)[:, :wide].contiguous()
    return F.grouped_mm(rows_RN, weight_eNM, offs=offsets_e)


def _padded(weight_eNM: Tensor, more_n: int, more_m: int) -> Tensor:
    """With zeros at the end of both widths, in the memory order that it has: a transposed view stays one."""
    if weight_eNM.stride(-1) == 1:
        return F.pad(weight_eNM, (0, more_m, 0, more_n))
    return F.pad(weight_eNM.mT, (0, more_n, 0, more_m)).mT


GROUPED_MM = {"loop": loop, "bmm": bmm, "grouped_mm": grouped_mm}


def _add(rows_RM: Tensor, bias_eM: Tensor | None, order: RowOrder) -> Tensor:
    if bias_eM is None:
        return rows_RM
    return rows_RM + bias_eM.repeat_interleave(order.counts_e, dim=0, output_size=rows_RM.shape[0])


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
