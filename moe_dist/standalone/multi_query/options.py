"""The rules between the options of `MultiQueryAttention`. All of them raise ValueError."""

from typing import get_args

from moe_dist.kernels.attention.backend import check_attention
from moe_dist.standalone.multi_query.norms import NormType


def check_sizes(d_model: int, heads: int, num_kv_heads: int, head_dim: int | None, tp: int) -> None:
    sizes = dict(d_model=d_model, heads=heads, num_kv_heads=num_kv_heads)
    for name, size in (sizes | ({} if head_dim is None else {"head_dim": head_dim})).items():
        if size < 1:
            raise ValueError(f"{name}={size} is below 1")
    if head_dim is None and d_model % heads:
        raise ValueError(f"d_model={d_model} is not divisible by heads={heads}: change one of them, or give head_dim")
    if heads % num_kv_heads:
        raise ValueError(f"heads={heads} is not divisible by num_kv_heads={num_kv_heads}: equally many must read each")
    if heads % tp:
        raise ValueError(f"heads={heads} is not divisible by tp={tp}: every rank takes equally many")


def check_options(
    attn_impl: str,
    clip_qkv: float | None,
    attn_pdrop: float,
    norm_type: str,
    fc_type: str,
    window: int | None,
    device_type: str,
) -> None:
    if attn_impl not in ("triton", "flash", "flash_attn", "torch"):
        raise ValueError(f"unknown attn_impl {attn_impl!r}: choose triton, flash, flash_attn or torch")
    check_attention(attn_impl, "attn_impl", device_type)
    if clip_qkv is not None and not clip_qkv > 0:
        raise ValueError(f"clip_qkv={clip_qkv} must be above 0, or None not to clip")
    if not 0.0 <= attn_pdrop < 1.0:
        raise ValueError(f"attn_pdrop={attn_pdrop} is outside 0 <= attn_pdrop < 1")
    if attn_pdrop > 0 and attn_impl == "flash_attn":
        raise ValueError(
            f"attn_pdrop={attn_pdrop} with attn_impl=flash_attn would draw numbers that no seed here fixes: "
            "set attn_impl to triton or torch, or attn_pdrop to 0"
        )
    if norm_type not in get_args(NormType):
        raise ValueError(f"unknown norm_type {norm_type!r}: choose one of {', '.join(get_args(NormType))}")
    if fc_type != "torch":
        raise ValueError(f"unknown fc_type {fc_type!r}: only torch is there")
    if window is not None and window < 1:
        raise ValueError(f"window={window} is below 1: a query's own position counts")
