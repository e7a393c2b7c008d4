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
from moe_dist.kernels.permute.order import RowOrder, traced

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
    counts = order.rows_per_expert
    kept = sum(counts)
    parts = zip(rows_RN[:kept].split(list(counts)), weight_eNM.unbind(0), strict=True)
    out_RM = torch.cat([rows @ weight for rows, weight in parts])
    return out_RM if kept == len(rows_RN) else F.pad(out_RM, (0, 0, 0, len(rows_RN) - kept))


def bmm(rows_RN: Tensor, weight_eNM: Tensor, order: RowOrder) -> Tensor:
    """Pad to [e, C, N], multiply once, take the rows out again."""
    counts_e, bound = order.counts_e, order.fullest is not None
    experts, fullest = len(counts_e), max(order.rows_per_expert) if order.fullest is None else order.fullest
    # Row r of expert i goes to i * C + r - start of i; a row of nobody to one place more, at the end.
    last = experts * fullest
    shift_e = torch.arange(experts, device=counts_e.device) * fullest - (counts_e.cumsum(0) - counts_e)
    row_R, expert_R = torch.arange(len(rows_RN), device=counts_e.device), order.expert_R
    place_R = torch.where(expert_R < experts, row_R + F.pad(shift_e, (0, 1))[expert_R], last)
    padded = rows_RN.new_zeros(last + bound, rows_RN.shape[1]).index_copy(0, place_R, rows_RN)
    out = torch.bmm(padded[:last].view(experts, fullest, -1), weight_eNM).flatten(0, 1)
    return (F.pad(out, (0, 0, 0, 1)) if bound else out).index_select(0, place_R)


def grouped_mm(rows_RN: Tensor, weight_eNM: Tensor, order: RowOrder) -> Tensor:
    """torch.nn.functional.grouped_mm: offsets int32, contiguous rows; fp32, bf16 and fp16 only.

    It wants rows of a multiple of 16 bytes: other widths are filled up with zeros, which add nothing to a product. Its
    shape is known to torch for bf16 alone on CPU, so that a pass traced there takes `bmm`.
    """
    if rows_RN.device.type == "cpu" and traced(rows_RN):
        return bmm(rows_RN, weight_eNM, order)
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
    if order.fullest is not None:
        return rows_RM + F.pad(bias_eM, (0, 0, 0, 1))[order.expert_R]  # nothing to the rows of nobody, nor from them
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
