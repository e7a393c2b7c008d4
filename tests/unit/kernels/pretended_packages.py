"""flash-attn and apex for machines without them: their functions by plain torch, with the signatures and the layouts of
flash-attn 2.8.4 and of apex in July 2026, and as particular about what they are given."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@contextmanager
def pretended(*modules: ModuleType) -> Iterator[None]:
    """Within, they can be imported."""
    sys.modules.update({module.__name__: module for module in modules})
    try:
        yield
    finally:
        for module in modules:
            del sys.modules[module.__name__]


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None, origin="pretended")
    made.__dict__.update(contents)
    return made


def flash_attn() -> ModuleType:
    functions = (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache)
    return module("flash_attn", **{function.__name__: function for function in functions}, calls=CALLS)


def apex(optimizer: bool = True) -> list[ModuleType]:
    """optimizer: False is one that was built without amp_C."""
    names = ("apex", "apex.normalization", "fused_layer_norm_cuda", *(("amp_C",) if optimizer else ()))
    return [
        *(module(name) for name in names),
        module("apex.normalization.fused_layer_norm", fused_rms_norm_affine=fused_rms_norm_affine),
        module("apex.optimizers", FusedAdam=FusedAdam),
    ]


CALLS: list[dict[str, Any]] = []
"""What the functions of flash-attn were told besides tensors."""


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """q [B, Q, H, P]; k, v [B, K, G, P]."""
    assert dropout_p == 0.0 and softcap == 0.0 and not return_attn_probs
    CALLS.append(dict(name="func", deterministic=deterministic, window_size=window_size, causal=causal))
    rows = zip(q, k, v, strict=True)
    return torch.stack([_row(*row, softmax_scale, causal, window_size, alibi_slopes) for row in rows])


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """q [T, H, P]; cu_seqlens int32 [N + 1]."""
    assert dropout_p == 0.0 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert max(lengths_q) == max_seqlen_q and max(lengths_k) == max_seqlen_k
    CALLS.append(dict(name="varlen", deterministic=deterministic, window_size=window_size, causal=causal))
    rows = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat([_row(*row, softmax_scale, causal, window_size, alibi_slopes) for row in rows])


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    assert isinstance(cache_seqlens, Tensor) and cache_seqlens.dtype == torch.int32
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1
    CALLS.append(dict(name="kvcache", window_size=window_size, causal=causal))
    rows = zip(q, k_cache, v_cache, cache_seqlens.tolist(), strict=True)
    how = (softmax_scale, causal, window_size, alibi_slopes)
    return torch.stack([_row(q, k[:length], v[:length], *how) for q, k, v, length in rows]).detach()


def _row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    slopes: Tensor | None,
) -> Tensor:
    """q [Q, H, P]; k, v [K, G, P]: the documented maths, a head after another."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    (queries, heads, width), (keys, groups, _) = q.shape, k.shape
    assert heads % groups == 0 and width <= 256 and (slopes is None or slopes.dtype == torch.float32)
    if causal:
        window = (window[0], 0)
    behind = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    seen = torch.ones_like(behind, dtype=torch.bool)
    if window[0] >= 0:
        seen &= behind <= window[0]
    if window[1] >= 0:
        seen &= -behind <= window[1]
    outs = []
    for head in range(heads):
        group = head // (heads // groups)
        scores = (q[:, head].float() @ k[:, group].float().t()) * (width**-0.5 if scale is None else scale)
        if slopes is not None:
            scores = scores - slopes[head] * behind.abs()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        outs.append(weights @ v[:, group].float())
    return torch.stack(outs, 1).to(q.dtype)


def fused_rms_norm_affine(
    input: Tensor,
    weight: Tensor,
    normalized_shape: torch.Size | list[int],
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    assert input.dtype == weight.dtype and list(normalized_shape) == list(weight.shape) == [input.shape[-1]]
    wide = input.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(input.dtype)


class FusedAdam(torch.optim.Optimizer):
    """Steps counted by group, moments in fp32, parameters without a gradient passed over."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        assert bias_correction and adam_w_mode and not (amsgrad or capturable or master_weights)
        defaults = dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p).float() for _ in range(2))
                (beta1, beta2), m, v = group["betas"], state["exp_avg"], state["exp_avg_sq"]
                assert p.dtype == m.dtype == v.dtype == torch.float32
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                v.mul_(beta2).add_(p.grad.square(), alpha=1 - beta2)
                hat_m, hat_v = m / (1 - beta1 ** group["step"]), v / (1 - beta2 ** group["step"])
                p.sub_(group["lr"] * (hat_m / (hat_v.sqrt() + group["eps"]) + group["weight_decay"] * p))
