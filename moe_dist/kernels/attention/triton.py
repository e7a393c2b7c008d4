"""Attention in Triton: every Pattern, forward and backward, also for sequences packed one after the other.

The query heads of a key/value head share its tiles (triton_parts.py), so a group's keys and values are read once, and
gradients of keys and values are summed over the group inside a product. Kept for backward: q, k, v, the output and one
number for each query and head. No atomics: every run gives the same bits. Sums are in fp32.

Only this module and the `triton_*` ones beside it need triton installed.

Legend: B batch, H query heads, G key/value heads, Q queries, K keys, P width of a head, N packed sequences, T tokens.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.kernels.attention.pattern import PackedSequences, Pattern, check_packed
from moe_dist.kernels.attention.triton_backward import run_key_value_gradient, run_query_gradient
from moe_dist.kernels.attention.triton_call import AttentionTiling, Call, choose_attention_tiling
from moe_dist.kernels.attention.triton_decode import decode, decode_splits
from moe_dist.kernels.attention.triton_forward import forward, run_forward
from moe_dist.kernels.attention.triton_parts import LOG2E
from moe_dist.kernels.launch import check_launch

MAX_WIDTH = 256


def attend(
    q_BHQP: Tensor,
    k_BGKP: Tensor,
    v_BGKP: Tensor,
    pattern: Pattern | None = None,
    scale: float | None = None,
    *,
    tiling: AttentionTiling | None = None,
) -> Tensor:
    """As reference.attend, in fp32, bf16 or fp16 with heads up to 256 wide; gradients of q, k, v, bias and sinks.

    Any strides; a last dimension that is not dense is copied. A bias that needs a gradient costs fp32 [B, H, Q, K] in
    backward. Where no gradient is needed, few queries with many keys are cut into splits (triton_decode.py), decided
    from shapes alone. tiling: block sizes, chosen by dtype and shape when None.
    Raises ValueError for what it cannot do.
    """
    return _attend(q_BHQP, k_BGKP, v_BGKP, pattern or Pattern(), scale, tiling, None)


def attend_varlen(
    q_THP: Tensor,
    k_TGP: Tensor,
    v_TGP: Tensor,
    packed: PackedSequences,
    pattern: Pattern | None = None,
    scale: float | None = None,
    *,
    tiling: AttentionTiling | None = None,
) -> Tensor:
    """As varlen.one_by_one, in one launch that does not wait for the lengths.

    What `packed` says is not checked: it ends at T, and no sequence is longer than it says.
    """
    pattern = pattern or Pattern()
    check_packed(pattern)
    cu_q, cu_k = (cu.to(torch.int32).contiguous() for cu in (packed.cu_q, packed.cu_k))
    packed = replace(packed, cu_q=cu_q, cu_k=cu_k)
    q_BHTP, k_BGTP, v_BGTP = (t.transpose(0, 1)[None] for t in (q_THP, k_TGP, v_TGP))
    return _attend(q_BHTP, k_BGTP, v_BGTP, pattern, scale, tiling, packed)[0].transpose(0, 1)


def _attend(
    q_BHQP: Tensor,
    k_BGKP: Tensor,
    v_BGKP: Tensor,
    pattern: Pattern,
    scale: float | None,
    tiling: AttentionTiling | None,
    packed: PackedSequences | None,
) -> Tensor:
    _check(q_BHQP, k_BGKP, v_BGKP, pattern)
    q_BHQP, k_BGKP, v_BGKP = (_dense(t) for t in (q_BHQP, k_BGKP, v_BGKP))
    bias, sinks_H = pattern.bias, None if pattern.sinks_H is None else pattern.sinks_H.contiguous()
    scale = q_BHQP.shape[-1] ** -0.5 if scale is None else scale
    each = q_BHQP.shape[1] // k_BGKP.shape[1]
    rows = each * (q_BHQP.shape[2] if packed is None else packed.max_q)
    tiling = tiling or choose_attention_tiling(q_BHQP.dtype, q_BHQP.shape[-1], rows, pattern)
    call = Call(replace(pattern, bias=None, sinks_H=None), float(scale), tiling, packed)
    leaves = [t for t in (q_BHQP, k_BGKP, v_BGKP, bias, sinks_H) if t is not None]
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in leaves)):
        splits = decode_splits(q_BHQP, k_BGKP, call)
        if splits > 1:
            with torch.cuda.device_of(q_BHQP):
                return decode(q_BHQP, k_BGKP, v_BGKP, bias, sinks_H, call, splits)
    return _Attention.apply(q_BHQP, k_BGKP, v_BGKP, bias, sinks_H, call)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BHQP: Tensor,
        k_BGKP: Tensor,
        v_BGKP: Tensor,
        bias: Tensor | None,
        sinks_H: Tensor | None,
        call: Call,
    ) -> Tensor:
        with torch.cuda.device_of(q_BHQP):
            (out_BHQP,), (lse_BHQ,) = run_forward(q_BHQP, k_BGKP, v_BGKP, bias, sinks_H, call)
        ctx.save_for_backward(q_BHQP, k_BGKP, v_BGKP, bias, sinks_H, out_BHQP, lse_BHQ)
        ctx.call = call
        return out_BHQP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHQP: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, sinks_H, out_BHQP, lse_BHQ = ctx.saved_tensors
        _, needs_k, needs_v, needs_bias, needs_sinks, _ = ctx.needs_input_grad
        bias, grad_BHQP = inputs[3], _dense(grad_BHQP)
        grad_k = grad_v = grad_bias = grad_sinks = None
        with torch.cuda.device_of(grad_BHQP):
            # delta, which everything below needs, comes with the gradient of q.
            grad_q, delta_BHQ, grad_scores = run_query_gradient(
                grad_BHQP, tuple(inputs), out_BHQP, lse_BHQ, ctx.call, needs_bias
            )
            if needs_k or needs_v:
                grad_k, grad_v = run_key_value_gradient(grad_BHQP, tuple(inputs), lse_BHQ, delta_BHQ, ctx.call)
        if grad_scores is not None:
            grad_bias = grad_scores.sum_to_size(bias.shape).to(bias.dtype)
        if needs_sinks:
            weight_BHQ = torch.exp2(sinks_H.float()[:, None] * LOG2E.value - lse_BHQ)
            grad_sinks = -(weight_BHQ * delta_BHQ).sum((0, 2)).to(sinks_H.dtype)
        return grad_q, grad_k, grad_v, grad_bias, grad_sinks, None


def _dense(x: Tensor) -> Tensor:
    """The kernels ask for numbers of one head side by side; the other dimensions may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(q_BHQP: Tensor, k_BGKP: Tensor, v_BGKP: Tensor, pattern: Pattern) -> None:
    check_launch("attention", forward, q_BHQP, "the attention backend torch or flash")
    (batch, heads, _, width), shape = q_BHQP.shape, k_BGKP.shape
    if k_BGKP.shape != v_BGKP.shape or (batch, width) != (shape[0], shape[3]) or heads % shape[1]:
        raise ValueError(
            f"attention: q {tuple(q_BHQP.shape)}, k {tuple(shape)} and v {tuple(v_BGKP.shape)} do not fit: give "
            "[B, H, Q, P] and twice [B, G, K, P], H a multiple of G"
        )
    if width > MAX_WIDTH:
        raise ValueError(f"attention: the Triton kernel takes heads up to {MAX_WIDTH} wide, not {width}: use torch")
    if not q_BHQP.dtype == k_BGKP.dtype == v_BGKP.dtype:
        raise ValueError(f"attention: q is {q_BHQP.dtype}, k {k_BGKP.dtype}, v {v_BGKP.dtype}: cast them to one dtype")
    slopes_H = pattern.slopes_H
    if slopes_H is not None and slopes_H.requires_grad and torch.is_grad_enabled():
        raise ValueError("attention: the Triton kernel has no gradient for slopes_H: use the attention backend torch")
