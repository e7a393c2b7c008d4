"""The experts on CPU: gather, products, activation and weighted sum in one pass over the experts.

What makes it faster than a permutation, grouped products and a permutation back: an expert's rows are gathered into a
small buffer and are still in cache for each of its products and activations, forward and backward; where experts have
few rows, those of several, a lot, are gathered and activated together; only x and the pre-activations are kept, rows
and activations are made again; the weights of the sum are folded into the smallest tensors (rows of width D, not hidden
units), and their gradient is read off the hidden units, so that the experts' outputs are never kept.

Where products are compiled for every new number of rows (onednn.py), an expert's product takes more of them, up to a
rounder number: experts receive another number at each step. Behind a lot's rows these are zeros. What is computed of
them is written where the next expert's rows will be, so it costs no place; in the backward pass their gradients are
zeros.

Legend: X rows of x, K assignments of each, R rows kept, sorted by expert, D d_model, F hidden units of an expert, e
experts, L rows of the fullest lot, l rows of this one, c rows of one of its experts. L, l and c count the rows that
products add.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.kernels.activation import activate_backward_into, activate_into, gated
from moe_dist.kernels.grouped_mm.onednn import CHOICES, ROUNDING, Products, add_linear, linear, rows_computed
from moe_dist.kernels.grouped_mm.weights import ExpertWeights
from moe_dist.kernels.permute.order import RowOrder
from moe_dist.kernels.permute.reference import sum_rows

_FEW = 32  # rows of an expert up to which the operations around its products take as long as they do
_TOGETHER = 256  # rows of several such experts: their hidden units should stay in cache


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
    """Where one expert's rows are among R: start to stop; `size` counts the rows after them that products add."""

    expert: int
    start: int
    stop: int
    size: int


class _Lot(NamedTuple):
    """Neighbouring experts whose rows are gathered and activated together: all of one expert, or few rows of each.

    l of its rows, those that products add included. Behind the last expert's they are zeros; behind another's they are
    the next one's, whose own product comes later and is what stays.
    """

    spans: tuple[_Span, ...]
    start: int
    stop: int
    size: int

    @staticmethod
    def of(spans: Sequence[_Span]) -> "_Lot":
        start = spans[0].start
        return _Lot(tuple(spans), start, spans[-1].stop, max(span.start + span.size for span in spans) - start)

    @property
    def experts(self) -> list[int]:
        return [span.expert for span in self.spans]

    @property
    def padded(self) -> slice:
        return slice(self.start, self.start + self.size)

    def filled(self, span: _Span) -> slice:
        """An expert's rows among l, and those that products add."""
        return slice(span.start - self.start, span.start - self.start + span.size)

    def summed(self, span: _Span) -> slice:
        """Its rows for sums over rows: all that follow are zeros, or there are none."""
        return self.filled(span) if len(self.spans) == 1 else slice(span.start - self.start, span.stop - self.start)


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
        lots = _lots(order.rows_per_expert, x_XD.dtype, alike=widths is None)
        x_LD = x_XD.new_empty(max((lot.size for lot in lots), default=0), x_XD.shape[1])
        y_RD = x_XD.new_empty(sum(order.rows_per_expert) + ROUNDING, x_XD.shape[1])
        owns = _each(ExpertWeights._make(parts), widths)
        pre: list[Tensor | None] = []
        for lot in lots:
            x_lD = _gather(x_XD, order.source_R, lot, x_LD)
            gate_lF = None
            if parts[0] is not None:
                gate_lF = _linear(x_lD, lot, [(owns[e].gate, owns[e].gate_bias) for e in lot.experts], products)
            up_lF = _linear(x_lD, lot, [(owns[e].up, owns[e].up_bias) for e in lot.experts], products)
            act_lF = activate_into(gate_lF, up_lF, name, _activation_buffer(up_lF, name))
            for span in lot.spans:
                own, rows = owns[span.expert], slice(span.start, span.start + span.size)
                linear(act_lF[lot.filled(span)], own.out.t(), own.out_bias, out=y_RD[rows], products=products)
            pre += [gate_lF, up_lF]
        ctx.save_for_backward(x_XD, weights_XK, *parts, *pre)
        ctx.order, ctx.name, ctx.widths, ctx.lots, ctx.products = order, name, widths, lots, products
        return sum_rows(y_RD, weights_XK, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor | None, ...]:
        x_XD, weights_XK, *saved = ctx.saved_tensors
        parts, pre = saved[: len(ExpertWeights._fields)], saved[len(ExpertWeights._fields) :]
        grads = [None if part is None else torch.empty_like(part) for part in parts]
        order, lots, grad_XD = ctx.order, ctx.lots, grad_XD.contiguous()
        kept = sum(order.rows_per_expert)
        x_LD, grad_LD = x_XD.new_empty(2, max((lot.size for lot in lots), default=0), x_XD.shape[1])
        grad_x_RD = x_XD.new_empty(kept + ROUNDING, x_XD.shape[1])
        weight_R = dots_R = None
        if weights_XK is not None:
            # Zero rows may reach past the last row: their weights are read, but multiply zeros.
            weight_R = F.pad(weights_XK.flatten()[order.slots_R].to(x_XD.dtype), (0, ROUNDING))
            dots_R = weights_XK.new_empty(kept)
        owns, own_grads = (_each(ExpertWeights._make(w), ctx.widths) for w in (parts, grads))
        for expert, count in enumerate(order.rows_per_expert):
            if count == 0:
                _zero(own_grads[expert])
        for lot, gate_lF, up_lF in zip(lots, pre[::2], pre[1::2], strict=True):
            x_lD = _gather(x_XD, order.source_R, lot, x_LD)
            grad_lD = _gather(grad_XD, order.source_R, lot, grad_LD)
            hidden = _through_activation(grad_lD, lot, gate_lF, up_lF, owns, ctx.name, ctx.products)
            weight_l = None
            if weight_R is not None and dots_R is not None:
                dots_R[lot.start : lot.stop] = hidden.dots(grad_lD, lot, owns)[: lot.stop - lot.start]
                # Each product of a row with a gradient needs its weight once: D is the smaller side to carry it.
                weight_l = weight_R[lot.padded]
                x_lD.mul_(weight_l[:, None])
                grad_lD.mul_(weight_l[:, None])
            for span in lot.spans:
                rows, own = lot.summed(span), owns[span.expert]
                weight_c = None if weight_l is None else weight_l[rows]
                hidden.rows(rows).into_parameters(x_lD[rows], grad_lD[rows], weight_c, own_grads[span.expert])
                into = grad_x_RD[span.start : span.start + span.size]
                hidden.rows(lot.filled(span)).into_rows(own, into, ctx.products)
            del hidden  # before the next lot's are made
        grad_weights_XK = None
        if weights_XK is not None:
            grad_weights_XK = weights_XK.new_zeros(weights_XK.shape)
            grad_weights_XK.view(-1)[order.slots_R] = dots_R
        return None, None, None, None, sum_rows(grad_x_RD, weights_XK, order), grad_weights_XK, *grads


class _Hidden(NamedTuple):
    """Hidden units of a lot in the backward pass: activations, their gradients, those of the pre-activations."""

    act_lF: Tensor
    grad_act_lF: Tensor
    grad_gate_lF: Tensor | None
    grad_up_lF: Tensor

    def rows(self, where: slice) -> "_Hidden":
        """c of them, of one expert."""
        gate_lF = self.grad_gate_lF
        gate_cF = None if gate_lF is None else gate_lF[where]
        return _Hidden(self.act_lF[where], self.grad_act_lF[where], gate_cF, self.grad_up_lF[where])

    def dots(self, grad_lD: Tensor, lot: _Lot, owns: list[ExpertWeights]) -> Tensor:
        """<E(x), grad> of each row, the gradient of its weight: <act, grad_act>, as E(x) = act out + bias."""
        dots_l = torch.linalg.vecdot(self.grad_act_lF, self.act_lF)
        for span in lot.spans:
            bias_D, rows = owns[span.expert].out_bias, lot.summed(span)
            if bias_D is not None:
                dots_l[rows] += torch.mv(grad_lD[rows], bias_D)
        return dots_l

    def into_parameters(self, x_cD: Tensor, grad_cD: Tensor, weight_c: Tensor | None, grad: ExpertWeights) -> None:
        """Fill the expert's gradients; x and grad are weighed already, the hidden units are not."""
        torch.mm(self.act_lF.t(), grad_cD, out=grad.out)
        if grad.out_bias is not None:
            torch.sum(grad_cD, 0, out=grad.out_bias)
        inputs = ((grad.gate, grad.gate_bias, self.grad_gate_lF), (grad.up, grad.up_bias, self.grad_up_lF))
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
        linear(self.grad_up_lF, own.up.t(), out=out_cD, products=products)
        if own.gate is not None and self.grad_gate_lF is not None:
            add_linear(self.grad_gate_lF, own.gate.t(), out_cD, products=products)


def _through_activation(
    grad_lD: Tensor,
    lot: _Lot,
    gate_lF: Tensor | None,
    up_lF: Tensor,
    owns: list[ExpertWeights],
    name: str,
    products: Products,
) -> _Hidden:
    grad_act_lF = _linear(grad_lD, lot, [(owns[e].out, None) for e in lot.experts], products)
    act_lF, grad_up_lF = _activation_buffer(up_lF, name), torch.empty_like(up_lF)
    grad_gate_lF = None if gate_lF is None else torch.empty_like(gate_lF)
    activate_backward_into(grad_act_lF, gate_lF, up_lF, name, act_lF, grad_gate_lF, grad_up_lF)
    return _Hidden(act_lF, grad_act_lF, grad_gate_lF, grad_up_lF)


def _linear(
    x_lD: Tensor, lot: _Lot, by_expert: Sequence[tuple[Tensor | None, Tensor | None]], products: Products
) -> Tensor:
    """Each expert's rows by its own weight [F, D] and bias, of which `by_expert` has those of the lot's: [l, F]."""
    y_lF: Tensor | None = None
    for span, (weight_FD, bias_F) in zip(lot.spans, by_expert, strict=True):
        assert weight_FD is not None
        if len(lot.spans) == 1:
            return linear(x_lD, weight_FD, bias_F, products=products)
        y_lF = x_lD.new_empty(lot.size, len(weight_FD)) if y_lF is None else y_lF
        linear(x_lD[lot.filled(span)], weight_FD, bias_F, out=y_lF[lot.filled(span)], products=products)
    assert y_lF is not None, "a lot has experts"
    return y_lF


def _activation_buffer(up_cF: Tensor, name: str) -> Tensor:
    """relu(relu(x)) = relu(x), also in its derivative, so that one is written over the pre-activation."""
    return up_cF if name == "relu" else torch.empty_like(up_cF)


def _lots(rows_per_expert: tuple[int, ...], dtype: torch.dtype, alike: bool) -> list[_Lot]:
    """Experts that have rows, in their order. alike: all have as many hidden units, so that these can lie together."""
    ends = itertools.accumulate(rows_per_expert)
    lots: list[_Lot] = []
    for expert, (count, end) in enumerate(zip(rows_per_expert, ends, strict=True)):
        if count == 0:
            continue
        span = _Span(expert, end - count, end, rows_computed(count, dtype))
        fits = alike and lots and count <= _FEW and lots[-1].spans[-1].stop - lots[-1].spans[-1].start <= _FEW
        if fits and end - lots[-1].start <= _TOGETHER:
            lots[-1] = _Lot.of((*lots[-1].spans, span))
        else:
            lots.append(_Lot.of((span,)))
    return lots


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


def _gather(x_XD: Tensor, source_R: Tensor, lot: _Lot, out_LD: Tensor) -> Tensor:
    """A lot's rows and the zero rows after them."""
    count = lot.stop - lot.start
    torch.index_select(x_XD, 0, source_R[lot.start : lot.stop], out=out_LD[:count])
    if count < lot.size:
        out_LD[count : lot.size].zero_()
    return out_LD[: lot.size]


def _zero(grad: ExpertWeights) -> None:
    for part in grad:
        if part is not None:
            part.zero_()
