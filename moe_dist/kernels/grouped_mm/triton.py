"""The experts' feed-forward in Triton: gather, both projections, activation, weights and sum, forward and backward.

What is never stored: the gathered rows of x, and what the experts give before weights. The router's gradient is
dA . act, where dA is the hidden gradient that backward needs anyway (SonicMoE, arXiv 2512.14080). Kept for backward:
x, the pre-activations, the weights and the order; act too where `keep_activation`. Tables are made on the device and
launches are sized by what the host knows, so the host never waits; no atomics, so every run gives the same bits.

Only this module and the `triton_*` ones beside it need triton installed.

Legend: X rows of x, K assignments of each, R rows sorted by expert, e experts held here, D d_model, F expert hidden, T
tiles.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.kernels.activation import gated
from moe_dist.kernels.grouped_mm.tiles import ExpertTiling, choose_expert_tiling, tile_table
from moe_dist.kernels.grouped_mm.triton_backward import HiddenGrad, run_bias, run_hidden, run_weights
from moe_dist.kernels.grouped_mm.triton_forward import run_down, run_up
from moe_dist.kernels.grouped_mm.weights import ExpertWeights
from moe_dist.kernels.permute.order import RowOrder
from moe_dist.kernels.tile import INTERPRETED

FUNCTIONS = {
    "swiglu": "silu",
    "geglu": "gelu",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "clamped_swiglu": "clamped",
    "gelu_tanh": "gelu_tanh",
}
GATED = tuple(name for name in FUNCTIONS if gated(name))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def feed_forward(
    x_XD: Tensor,
    weights_XK: Tensor | None,
    order: RowOrder,
    w: ExpertWeights,
    activation: str,
    keep_activation: bool = False,
    *,
    tiling: ExpertTiling | None = None,
) -> Tensor:
    """y[x] = sum over kept k of weights[x, k] * E_i(x), i the expert of assignment k: [X, D] -> [X, D].

    activation: of kernels/activation.py; the gated ones need w.gate. weights_XK None: 1 for every assignment.
    keep_activation: keep act for backward instead of computing it again.
    order.slots_R may be longer than the rows in use; what is past them is never looked at. tiling: block sizes and
    precision, chosen by shape when None. ValueError for float64, mixed dtypes, or CPU tensors without the interpreter.
    """
    _check(x_XD, w, order, activation)
    tiling = tiling or choose_expert_tiling(
        x_XD.dtype, order.slots_R.numel(), w.up.shape[0], w.up.shape[2], w.up.shape[1]
    )
    tensors = [None if t is None else t.contiguous() for t in (x_XD, weights_XK, *w)]
    return _FeedForward.apply(*tensors, order, FUNCTIONS[activation], keep_activation, tiling)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_XD: Tensor,
        weights_XK: Tensor | None,
        gate: Tensor | None,
        up: Tensor,
        out: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        out_bias: Tensor | None,
        order: RowOrder,
        function: str,
        keep_activation: bool,
        tiling: ExpertTiling,
    ) -> Tensor:
        w = ExpertWeights(gate, up, out, gate_bias, up_bias, out_bias)
        with torch.cuda.device_of(x_XD):
            # 1. Cut each expert's rows into tiles.
            tiles_3T = tile_table(order.counts_e, order.slots_R.numel(), tiling.rows)
            # 2. Gather, multiply by gate and up, activate.
            pre_gate, pre_up, act = run_up(x_XD, order, tiles_3T, w, function, tiling)
            # 3. Multiply by out, weight, and sum over the assignments of each row of x.
            y_XD = run_down([(act, w.out)], w.out_bias, weights_XK, order, tiles_3T, tiling)
        ctx.save_for_backward(x_XD, weights_XK, *w, pre_gate, pre_up, act if keep_activation else None, tiles_3T)
        ctx.order, ctx.function, ctx.tiling = order, function, tiling
        return y_XD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy_XD: Tensor) -> tuple[Tensor | None, ...]:
        x_XD, weights_XK, *rest = ctx.saved_tensors
        w, (pre_gate, pre_up, act, tiles_3T) = ExpertWeights(*rest[:6]), rest[6:]
        order, tiling, need = ctx.order, ctx.tiling, ctx.needs_input_grad
        gy_XD = gy_XD.contiguous()
        grad_x = grad_weights = None
        with torch.cuda.device_of(gy_XD):
            # 1. Through out and the activation; what the router's and out's gradients need falls out on the way.
            hidden = run_hidden(
                gy_XD, order, tiles_3T, w, weights_XK, (pre_gate, pre_up, act), ctx.function, tiling, (need[4], need[1])
            )
            if need[1]:
                assert weights_XK is not None and hidden.dots is not None
                grad_weights = _by_assignment(hidden.dots, order).to(weights_XK.dtype)
            # 2. Through gate and up, summed over the assignments of each row of x.
            if need[0]:
                pairs = [(hidden.gate, w.gate), (hidden.up, w.up)]
                products = [(a, b) for a, b in pairs if a is not None and b is not None]
                grad_x = run_down(products, None, None, order, tiles_3T, tiling, backward=True)
            # 3. The experts' own, over the rows of each.
            grads = _parameter_gradients(x_XD, gy_XD, weights_XK, w, hidden, order, tiling, need[2:8])
        return grad_x, grad_weights, *grads, None, None, None, None


def _parameter_gradients(
    x_XD: Tensor,
    gy_XD: Tensor,
    weights_XK: Tensor | None,
    w: ExpertWeights,
    hidden: HiddenGrad,
    order: RowOrder,
    tiling: ExpertTiling,
    need: tuple[bool, ...],
) -> list[Tensor | None]:
    """In the order of ExpertWeights; None where no gradient is needed."""
    ends_e = order.counts_e.cumsum(0)
    # gate and up together, because they read the same rows of x.
    lefts = [left for left, wanted in zip((hidden.gate, hidden.up), need, strict=False) if wanted]
    found = iter(run_weights(lefts, x_XD, order, ends_e, tiling, w.up) if lefts else [])
    grads = [next(found) if wanted else None for wanted in need[:2]]
    grads += run_weights([hidden.weighted], gy_XD, order, ends_e, tiling, w.out) if need[2] else [None]
    grads.append(run_bias(hidden.gate, order, ends_e, w.gate_bias) if need[3] else None)
    grads.append(run_bias(hidden.up, order, ends_e, w.up_bias) if need[4] else None)
    grads.append(run_bias(gy_XD, order, ends_e, w.out_bias, True, weights_XK) if need[5] else None)
    return grads


def _by_assignment(dots_R: Tensor, order: RowOrder) -> Tensor:
    """[R] -> [X, K], zero where the assignment was dropped."""
    if dots_R.numel() == 0:
        return dots_R.new_zeros(order.rows_XK.shape)
    return torch.where(order.kept_XK, dots_R[order.rows_XK], 0.0)


def _check(x_XD: Tensor, w: ExpertWeights, order: RowOrder, activation: str) -> None:
    assert all(t.is_contiguous() for t in (order.counts_e, order.slots_R, order.rows_XK, order.kept_XK))
    if activation not in FUNCTIONS:
        raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(FUNCTIONS)}")
    if gated(activation) != (w.gate is not None):
        given = "no gate" if w.gate is None else "a gate"
        raise ValueError(f"activation {activation!r} with {given}: {', '.join(GATED)} need one, others take none")
    if x_XD.dtype not in DTYPES:
        raise ValueError(f"experts=triton takes float32, bfloat16 or float16, not {x_XD.dtype}: use experts=grouped_mm")
    others = {tensor.dtype for tensor in w if tensor is not None} - {x_XD.dtype}
    if others:
        raise ValueError(f"experts=triton wants one dtype: x is {x_XD.dtype}, weights {others}; cast one to the other")
    if x_XD.device.type != "cuda" and not INTERPRETED.value:
        raise ValueError(f"experts=triton needs a GPU, tensors are on {x_XD.device}: use experts=grouped_mm")
