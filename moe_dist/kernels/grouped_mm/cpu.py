"""The experts on CPU: gather, products, activation and weighted sum in one pass over the experts.

What makes it faster than a permutation, grouped products and a permutation back: an expert's rows are gathered into a
small buffer and are still in cache for each of its products and activations, forward and backward; only x and the
pre-activations are kept, rows and activations are made again; the weights of the sum are folded into the smallest
tensors (rows of width D, not hidden units), and their gradient is read off the hidden units, so that the experts'
outputs are never kept.

Where products are compiled for every new number of rows (onednn.py), an expert's rows are followed by zero rows up to a
rounder number: experts receive another number at each step. In a buffer of all rows they lie where the next expert's
rows will be written, so they cost no place; in the backward pass their gradients are zeros.

Legend: X rows of x, K assignments of each, R rows kept, sorted by expert, D d_model, F hidden units of an expert, e
experts, C rows of the fullest expert, c rows of this one; C and c count the zero rows.
"""

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.kernels.activation import activate_backward_into, activate_into, gated
from moe_dist.kernels.grouped_mm.onednn import CHOICES, ROUNDING, Products, add_linear, linear, rows_computed
from moe_dist.kernels.grouped_mm.weights import ExpertWeights
from moe_dist.kernels.permute.order import RowOrder
from moe_dist.kernels.permute.reference import sum_rows

if TYPE_CHECKING:
    from collections.abc import Sequence


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
    products: Products = CHOICES[0],
) -> Tensor:
    """y[x] = sum over kept k of weights[x, k] * E_i(x), i the expert of assignment (x, k): [X, D] -> [X, D].

    Differentiable in x, weights (None: all 1) and whatever `w` has; idle experts get zero gradients. `widths`: hidden
    units of each expert where they differ; then gate, up and out are [sum of widths, D] and their biases [sum].
    `products`: who computes them in fp32 (onednn.py).
    """
    assert gated(activation) == (w.gate is not None), f"{activation}: gate {'missing' if w.gate is None else 'given'}"
    return _FeedForward.apply(order, activation, widths, products, x_XD.contiguous(), weights_XK, *w)


class _Span(NamedTuple):
    """Where one expert's rows are among R: start to stop; `size` counts the zero rows after them."""

    start: int
    stop: int
    size: int

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
        products: Products,
        x_XD: Tensor,
        weights_XK: Tensor | None,
        *parts: Tensor | None,
    ) -> Tensor:
        spans = _spans(order.rows_per_expert, x_XD.dtype)
        x_CD = x_XD.new_empty(max(span.size for span in spans), x_XD.shape[1])
        y_RD = x_XD.new_empty(spans[-1].stop + ROUNDING, x_XD.shape[1])
        pre: list[Tensor | None] = []
        for span, own in zip(spans, _each(ExpertWeights._make(parts), widths), strict=True):
            if span.size == 0:
                pre += [None, None]
                continue
            x_cD = _gather(x_XD, order.source_R, span, x_CD)
            gate_cF = None if own.gate is None else linear(x_cD, own.gate, own.gate_bias, products=products)
            up_cF = linear(x_cD, own.up, own.up_bias, products=products)
            act_cF = activate_into(gate_cF, up_cF, name, _activation_buffer(up_cF, name))
            linear(act_cF, own.out.t(), own.out_bias, out=y_RD[span.padded], products=products)
            pre += [gate_cF, up_cF]
        ctx.save_for_backward(x_XD, weights_XK, *parts, *pre)
        ctx.order, ctx.name, ctx.widths, ctx.spans, ctx.products = order, name, widths, spans, products
        return sum_rows(y_RD, weights_XK, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor | None, ...]:
        x_XD, weights_XK, *saved = ctx.saved_tensors
        parts, pre = saved[: len(ExpertWeights._fields)], saved[len(ExpertWeights._fields) :]
        grads = [None if part is None else torch.empty_like(part) for part in parts]
        order, spans, grad_XD = ctx.order, ctx.spans, grad_XD.contiguous()
        x_CD, grad_CD = x_XD.new_empty(2, max(span.size for span in spans), x_XD.shape[1])
        grad_x_RD = x_XD.new_empty(spans[-1].stop + ROUNDING, x_XD.shape[1])
        weight_R = dots_R = None
        if weights_XK is not None:
            # Zero rows may reach past the last row: their weights are read, but multiply zeros.
            weight_R = F.pad(weights_XK.flatten()[order.slots_R].to(x_XD.dtype), (0, ROUNDING))
            dots_R = weights_XK.new_empty(spans[-1].stop)
        owns, own_grads = (_each(ExpertWeights._make(w), ctx.widths) for w in (parts, grads))
        for span, own, grad, gate_cF, up_cF in zip(spans, owns, own_grads, pre[::2], pre[1::2], strict=True):
            if span.size == 0:
                _zero(grad)
                continue
            x_cD = _gather(x_XD, order.source_R, span, x_CD)
            grad_cD = _gather(grad_XD, order.source_R, span, grad_CD)
            hidden = _through_activation(grad_cD, gate_cF, up_cF, own, ctx.name, ctx.products)
            weight_c = None
            if weight_R is not None and dots_R is not None:
                dots_R[span.start : span.stop] = hidden.dots(grad_cD, own)[: span.stop - span.start]
                # Each product of a row with a gradient needs its weight once: D is the smaller side to carry it.
                weight_c = weight_R[span.padded]
                x_cD.mul_(weight_c[:, None])
                grad_cD.mul_(weight_c[:, None])
            hidden.into_parameters(x_cD, grad_cD, weight_c, grad)
            hidden.into_rows(own, grad_x_RD[span.padded], ctx.products)
            del hidden  # before the next expert's are made
        grad_weights_XK = None
        if weights_XK is not None:
            grad_weights_XK = weights_XK.new_zeros(weights_XK.shape)
            grad_weights_XK.view(-1)[order.slots_R] = dots_R
        return None, None, None, None, sum_rows(grad_x_RD, weights_XK, order), grad_weights_XK, *grads


class _Hidden(NamedTuple):
    """One expert's hidden units in the backward pass: activations, their gradients, those of the pre-activations."""

    act_cF: Tensor
    grad_act_cF: Tensor
    grad_gate_cF: Tensor | None
    grad_up_cF: Tensor

    def dots(self, grad_cD: Tensor, own: ExpertWeights) -> Tensor:
        """<E(x), grad> of each row, the gradient of its weight: <act, grad_act>, as E(x) = act out + bias."""
        dots_c = torch.linalg.vecdot(self.grad_act_cF, self.act_cF)
        return dots_c if own.out_bias is None else dots_c + torch.mv(grad_cD, own.out_bias)

    def into_parameters(self, x_cD: Tensor, grad_cD: Tensor, weight_c: Tensor | None, grad: ExpertWeights) -> None:
        """Fill the expert's gradients; x and grad are weighed already, the hidden units are not."""
        torch.mm(self.act_cF.t(), grad_cD, out=grad.out)
        if grad.out_bias is not None:
            torch.sum(grad_cD, 0, out=grad.out_bias)
        inputs = ((grad.gate, grad.gate_bias, self.grad_gate_cF), (grad.up, grad.up_bias, self.grad_up_cF))
        for grad_weight_FD, grad_bias_F, hidden_cF in inputs:
            if hidden_cF is None:
                continue
            torch.mm(hidden_cF.t(), x_cD, out=grad_weight_FD)
            if grad_bias_F is not None and weight_c is not None:
                torch.mm(weight_c[None], hidden_cF, out=grad_bias_F[None])
            elif grad_bias_F is not None:
                torch.sum(hidden_cF, 0, out=grad_bias_F)

    def into_rows(self, own: ExpertWeights, out_cD: Tensor, products: Products) -> None:
        """Fill the gradient of the rows, without their weight."""
        linear(self.grad_up_cF, own.up.t(), out=out_cD, products=products)
        if own.gate is not None and self.grad_gate_cF is not None:
            add_linear(self.grad_gate_cF, own.gate.t(), out_cD, products=products)


def _through_activation(
    grad_cD: Tensor, gate_cF: Tensor | None, up_cF: Tensor, own: ExpertWeights, name: str, products: Products
) -> _Hidden:
    grad_act_cF = linear(grad_cD, own.out, products=products)
    act_cF, grad_up_cF = _activation_buffer(up_cF, name), torch.empty_like(up_cF)
    grad_gate_cF = None if gate_cF is None else torch.empty_like(gate_cF)
    activate_backward_into(grad_act_cF, gate_cF, up_cF, name, act_cF, grad_gate_cF, grad_up_cF)
    return _Hidden(act_cF, grad_act_cF, grad_gate_cF, grad_up_cF)


def _activation_buffer(up_cF: Tensor, name: str) -> Tensor:
    """relu(relu(x)) = relu(x), also in its derivative, so that one is written over the pre-activation."""
    return up_cF if name == "relu" else torch.empty_like(up_cF)


def _spans(rows_per_expert: tuple[int, ...], dtype: torch.dtype) -> list[_Span]:
    ends = itertools.accumulate(rows_per_expert)
    return [_Span(end - n, end, rows_computed(n, dtype)) for n, end in zip(rows_per_expert, ends, strict=True)]


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
