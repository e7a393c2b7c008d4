"""Small layers, their gradients, and the plain maths that they are compared with."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist import MultiQueryAttention
from moe_dist.attention.alibi import alibi_slopes

D, HEADS = 24, 6
OPTIONS: list[dict[str, Any]] = [
    dict(),
    dict(num_kv_heads=2, rotary=True, qk_ln=True),
    dict(num_kv_heads=HEADS, alibi=True, clip_qkv=0.5),
    dict(head_dim=6, alibi=True, rotary=True, rope_theta=100.0, window=3),
    dict(sinks=True, window=2, use_bias=False, softmax_scale=0.7),
    dict(qk_ln=True, clip_qkv=0.7, sinks=True, num_kv_heads=3),
]
IMPLS = ["torch", "flash", "triton"]
FUSED = IMPLS[1:]


def layer_of(impl: str = "torch", dtype: torch.dtype = torch.float64, **options: Any) -> MultiQueryAttention:
    """Every parameter random, so that each of them matters."""
    layer = MultiQueryAttention(D, options.pop("heads", HEADS), impl, device="cpu", seed=1, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, param in layer.named_parameters():
            if "proj.weight" not in name and "Wqkv.weight" not in name:
                param.add_(torch.randn(param.shape, generator=generator) / 2)
    return layer.to(dtype)


def precise(impl: str) -> tuple[torch.dtype, float]:
    """The widest type of an implementation, and how far it may be off."""
    return (torch.float32, 1e-5) if impl == "triton" else (torch.float64, 1e-11)


def results(layer: MultiQueryAttention, x: Tensor, **call: Any) -> dict[str, Tensor]:
    """The output and all gradients."""
    x = x.detach().clone().requires_grad_()
    y = layer(x, **call)[0]
    layer.zero_grad()
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (y * weight.to(y.dtype)).sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}


def by_heads(layer: MultiQueryAttention, x_BSD: Tensor, causal: bool = True, bias: Tensor | None = None) -> Tensor:
    """The layer by its definition, one row, head and query at a time, in float64."""
    state, width, groups = layer.state_dict(), layer.head_dim, layer.num_kv_heads
    inner, length = layer.heads * width, x_BSD.shape[1]
    y_BSD = torch.zeros_like(x_BSD)
    slopes = alibi_slopes(layer.heads, torch.float64) if layer.alibi else torch.zeros(layer.heads)
    for b in range(len(x_BSD)):
        qkv = x_BSD[b] @ state["Wqkv.weight"].t() + state.get("Wqkv.bias", 0.0)
        if layer.clip_qkv is not None:
            qkv = qkv.clamp(-layer.clip_qkv, layer.clip_qkv)
        q, k, v = qkv.split([inner, groups * width, groups * width], -1)
        if layer.q_ln is not None:
            q = F.layer_norm(q, (inner,), state["q_ln.weight"], state["q_ln.bias"])
        for head in range(layer.heads):
            mine, read = (slice(n * width, (n + 1) * width) for n in (head, head * groups // layer.heads))
            q_SP, k_SP, v_SP = q[:, mine], k[:, read], v[:, read]
            if layer.k_ln is not None:
                k_SP = F.layer_norm(k_SP, (width,), state["k_ln.weight"], state["k_ln.bias"])
            if layer.rope_theta is not None:
                q_SP, k_SP = turned(q_SP, layer.rope_theta), turned(k_SP, layer.rope_theta)
            for i in range(length):
                far = i - torch.arange(length)
                scores = k_SP @ q_SP[i] * layer.softmax_scale - slopes[head] * far.abs()
                if bias is not None:
                    scores = scores + bias.expand(len(x_BSD), layer.heads, length, length)[b, head, i]
                hidden = (far < 0) & causal
                if layer.window is not None:
                    hidden |= far.abs() >= layer.window
                scores = scores.masked_fill(hidden, -torch.inf)
                if layer.sinks is not None:
                    weights = torch.cat((scores, state["sinks"][head : head + 1])).softmax(0)[:-1]
                else:
                    weights = scores.softmax(0)
                y_BSD[b, i] += state["out_proj.weight"][:, mine] @ (weights @ v_SP)
    return y_BSD + state.get("out_proj.bias", 0.0)


def turned(x_SP: Tensor, theta: float) -> Tensor:
    half = x_SP.shape[1] // 2
    angles = torch.arange(len(x_SP)).double()[:, None] * theta ** (-torch.arange(half).double() / half)
    z = torch.complex(*x_SP.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag), -1)
