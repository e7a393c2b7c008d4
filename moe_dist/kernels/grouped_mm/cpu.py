"""The experts on CPU: gather, products, activation and weighted sum in one pass over the experts.

What makes it faster than a permutation, grouped products and a permutation back: an expert's rows are gathered into a
small buffer and are still in cache for each of its products and activations, forward and backward; products write
where their result is wanted; only x and the pre-activations are kept, rows and activations are made again; the weights
of the sum are folded into the smallest tensors (outputs, not hidden units), and their gradient is read off the hidden
units, so that the experts' outputs are never kept.

Low precision adds zero rows to each expert's up to a multiple of `_BLOCK`: oneDNN compiles a kernel for every new
number of rows, and experts receive another number at each step. In a buffer of all rows they lie where the next
expert's rows will be written, so they cost no place; in the backward pass their gradients are zeros.

Legend: X rows of x, K assignments of each, R rows kept, sorted by expert, D d_model, F hidden units of an expert, e
experts, C rows of the fullest expert, c rows of this one; C, c and P (rows of all experts) count the zero rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.kernels.activation import activate_backward_into, activate_into, gated
from moe_dist.kernels.grouped_mm.weights import ExpertWeights
from moe_dist.kernels.permute.order import RowOrder

_BLOCK = 16


def replaces(backend: str, device_type: str) -> bool:
    """Whether this is what `backend` means on that device: torch's grouped_mm is a loop over experts on CPU too."""
    return backend == "grouped_mm" and device_type == "cpu"


def feed_forward(
    x_XD: Tensor,
    weights_XK: Tensor | None,
    order: RowOrder,
    w: ExpertWeights,
    activation: str,
    widths: tuple[int, ...] | None = None,
) -> Tensor:
    """y[x] = sum over kept k of weights[x, k] * E_i(x), i the expert of assignment (x, k): [X, D] -> [X, D].

    Differentiable in x, weights (None: all 1) and whatever `w` has; idle experts get zero gradients. `widths`: hidden
    units of each expert where they differ; then gate, up and out are [sum of widths, D] and their biases [sum].
    """
    assert gated(activation) == (w.gate is not None), f"{activation}: gate {'missing' if w.gate is None else 'given'}"
    return _FeedForward.apply(order, activation, widths, x_XD.contiguous(), weights_XK, *w)


class _Span(NamedTuple):
    """Where one expert's rows are: start to stop among R; `size` with the zero rows; `cells` among P x F."""

    start: int
    stop: int
    size: int
    cells: slice

    @property
    def padded(self) -> slice:
        return slice(self.start, self.start + self.size)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        order: RowOrder,
        name: str,
        widths: tuple[int, ...] | None,
        x_XD: Tensor,
        weights_XK: Tensor | None,
        *parts: Tensor | None,
    ) -> Tensor:
        w = ExpertWeights._make(parts)
        block = _BLOCK if x_XD.dtype in (torch.bfloat16, torch.float16) else 1
        spans = _spans(order.rows_per_expert, widths or (w.up.shape[1],) * w.up.shape[0], block)
        pre = x_XD.new_empty(1 if w.gate is None else 2, spans[-1].cells.stop)
        x_CD, act = x_XD.new_empty(_most_rows(spans), x_XD.shape[1]), x_XD.new_empty(_most_cells(spans))
        y_RD = x_XD.new_empty(spans[-1].stop + block, x_XD.shape[1])
        for span, own in zip(spans, _each(w, widths), strict=True):
            if span.size == 0:
                continue
            x_cD = _gather(x_XD, order.source_R, span, x_CD)
            gate_cF, up_cF = None, _linear(x_cD, own.up.t(), own.up_bias, _hidden(pre[-1], span))
            if own.gate is not None:
                gate_cF = _linear(x_cD, own.gate.t(), own.gate_bias, _hidden(pre[0], span))
            act_cF = activate_into(gate_cF, up_cF, name, act[: up_cF.numel()].view_as(up_cF))
            _linear(act_cF, own.out, own.out_bias, y_RD[span.padded])
        ctx.save_for_backward(x_XD, weights_XK, pre, *parts)
        ctx.order, ctx.name, ctx.widths, ctx.spans, ctx.block = order, name, widths, spans, block
        return _sum_rows(y_RD, weights_XK, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor | None, ...]:
        x_XD, weights_XK, pre, *parts = ctx.saved_tensors
        order, spans, grad_XD = ctx.order, ctx.spans, grad_XD.contiguous()
        grads = ExpertWeights._make(None if part is None else torch.empty_like(part) for part in parts)
        padded = spans[-1].stop + ctx.block
        grad_x_RD, weight_R = x_XD.new_empty(padded, x_XD.shape[1]), None
        if weights_XK is not None:
            # Blocks reach past the last row: those weights are read, but multiply zeros.
            weight_R = F.pad(weights_XK.flatten()[order.slots_R].to(x_XD.dtype), (0, ctx.block))
        scratch = _Scratch(spans, ctx.name, x_XD)
        owns, own_grads = _each(ExpertWeights._make(parts), ctx.widths), _each(grads, ctx.widths)
        for span, own, grad in zip(spans, owns, own_grads, strict=True):
            if span.size == 0:
                _zero(grad)
                continue
            x_cD = _gather(x_XD, order.source_R, span, scratch.x_CD)
            grad_cD = _gather(grad_XD, order.source_R, span, scratch.grad_CD)
            pre_cF = [_hidden(part, span) for part in pre]
            weight_c = None if weight_R is None else weight_R[span.padded]
            _backward(x_cD, grad_cD, pre_cF, weight_c, own, grad, scratch, grad_x_RD[span.padded], span)
        grad_weights_XK = None
        if weights_XK is not None:
            dots_N = weights_XK.new_zeros(weights_XK.numel())
            dots_N[order.slots_R] = scratch.dots_R.to(dots_N.dtype)
            grad_weights_XK = dots_N.view_as(weights_XK)
        return None, None, None, _sum_rows(grad_x_RD, weights_XK, order), grad_weights_XK, *grads


class _Scratch:
    """What the experts' backward passes share: buffers for one expert, and the weights' gradients of all rows."""

    def __init__(self, spans: list[_Span], name: str, like: Tensor) -> None:
        self.name = name
        self.x_CD, self.grad_CD = like.new_empty(2, _most_rows(spans), like.shape[1]).unbind(0)
        self.hidden = like.new_empty(4 if gated(name) else 3, _most_cells(spans))
        self.dots_R = like.new_empty(spans[-1].stop, dtype=torch.promote_types(like.dtype, torch.float32))


def _backward(
    x_cD: Tensor,
    grad_cD: Tensor,
    pre_cF: list[Tensor],
    weight_c: Tensor | None,
    own: ExpertWeights,
    grad: ExpertWeights,
    scratch: _Scratch,
    grad_x_cD: Tensor,
    span: _Span,
) -> None:
    """Fills `grad`, grad_x_cD (not yet times the weight) and the gradients of weights, <E(x), grad_y>; overwrites
    x_cD and grad_cD."""
    up_cF = pre_cF[-1]
    act_cF, grad_act_cF, *grad_pre_cF = (part[: up_cF.numel()].view_as(up_cF) for part in scratch.hidden)
    torch.mm(grad_cD, own.out.t(), out=grad_act_cF)
    gates = (None, None) if own.gate is None else (pre_cF[0], grad_pre_cF[0])
    activate_backward_into(grad_act_cF, gates[0], up_cF, scratch.name, act_cF, gates[1], grad_pre_cF[-1])
    if weight_c is not None:
        dots_c = scratch.dots_R[span.start : span.stop]
        torch.sum(grad_act_cF.mul_(act_cF)[: len(dots_c)], -1, dtype=dots_c.dtype, out=dots_c)
        if own.out_bias is not None:
            dots_c += torch.mv(grad_cD, own.out_bias)[: len(dots_c)]
        # From here on each product of a row needs its weight once: D is the smaller side to carry it.
        x_cD.mul_(weight_c[:, None])
        grad_cD.mul_(weight_c[:, None])
    torch.mm(act_cF.t(), grad_cD, out=grad.out)
    if grad.out_bias is not None:
        torch.sum(grad_cD, 0, out=grad.out_bias)
    torch.mm(grad_pre_cF[-1], own.up, out=grad_x_cD)
    if own.gate is not None:
        grad_x_cD.addmm_(grad_pre_cF[0], own.gate)
    wanted = [grad.up] if grad.gate is None else [grad.gate, grad.up]
    biases = [grad.up_bias] if grad.gate is None else [grad.gate_bias, grad.up_bias]
    for weight_grad, bias_grad, hidden_cF in zip(wanted, biases, grad_pre_cF, strict=True):
        torch.mm(hidden_cF.t(), x_cD, out=weight_grad)
        if bias_grad is not None and weight_c is not None:
            torch.mm(weight_c[None], hidden_cF, out=bias_grad[None])
        elif bias_grad is not None:
            torch.sum(hidden_cF, 0, out=bias_grad)


def _spans(rows_per_expert: tuple[int, ...], widths: tuple[int, ...], block: int) -> list[_Span]:
    spans, start, cell = [], 0, 0
    for count, width in zip(rows_per_expert, widths, strict=True):
        size = -(-count // block) * block
        spans.append(_Span(start, start + count, size, slice(cell, cell + size * width)))
        start, cell = start + count, cell + size * width
    return spans


def _most_rows(spans: list[_Span]) -> int:
    return max(span.size for span in spans)


def _most_cells(spans: list[_Span]) -> int:
    return max(span.cells.stop - span.cells.start for span in spans)


def _each(w: ExpertWeights, widths: tuple[int, ...] | None) -> list[ExpertWeights]:
    """The weights of each expert, as views. The bias of the output has no hidden units to be cut by."""
    experts = w.up.shape[0] if widths is None else len(widths)
    cut: list[Sequence[Tensor | None]] = []
    for field, part in zip(w._fields, w, strict=True):
        if part is None:
            cut.append((None,) * experts)
        else:
            cut.append(part.unbind(0) if widths is None or field == "out_bias" else part.split(widths))
    return [ExpertWeights._make(own) for own in zip(*cut, strict=True)]


def _hidden(flat: Tensor, span: _Span) -> Tensor:
    return flat[span.cells].view(span.size, -1)


def _gather(x_XD: Tensor, source_R: Tensor, span: _Span, out_CD: Tensor) -> Tensor:
    """An expert's rows and the zero rows after them."""
    count = span.stop - span.start
    torch.index_select(x_XD, 0, source_R[span.start : span.stop], out=out_CD[:count])
    if count < span.size:
        out_CD[count : span.size].zero_()
    return out_CD[: span.size]


def _zero(grad: ExpertWeights) -> None:
    for part in grad:
        if part is not None:
            part.zero_()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    return torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias, x, weight, out=out)


def _sum_rows(rows_RD: Tensor, weights_XK: Tensor | None, order: RowOrder) -> Tensor:
    """sum over kept k of weights[x, k] * rows[rows_XK[x, k]]: one pass, which sums low precision in fp32."""
    kept = order.slots_R.numel()
    if kept == 0:
        return rows_RD.new_zeros(order.kept_XK.shape[0], rows_RD.shape[1])
    if kept < order.kept_XK.numel():
        weights_XK = order.kept_XK if weights_XK is None else weights_XK * order.kept_XK
    scale_XK = None if weights_XK is None else weights_XK.to(rows_RD.dtype)
    return F.embedding_bag(order.rows_XK, rows_RD, mode="sum", per_sample_weights=scale_XK)
