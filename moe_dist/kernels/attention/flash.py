"""Fused causal attention: the flash-attn package when it is installed and the tensors are on a GPU, else torch's SDPA.

Legend: B batch, H query heads, G key/value heads, S sequence, P width of a head.
"""

import importlib.util

import torch.nn.functional as F
from torch import Tensor


def flash_provider(device_type: str) -> str:
    """What `flash` means on this machine: `flash-attn` or `torch-sdpa`."""
    installed = importlib.util.find_spec("flash_attn") is not None
    return "flash-attn" if device_type == "cuda" and installed else "torch-sdpa"


def sdpa_attention(q_BHSP: Tensor, k_BGSP: Tensor, v_BGSP: Tensor) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, keys and values shared by groups of query heads."""
    grouped = q_BHSP.shape[1] != k_BGSP.shape[1]
    return F.scaled_dot_product_attention(q_BHSP, k_BGSP, v_BGSP, is_causal=True, enable_gqa=grouped)


def flash_attn_attention(q_BHSP: Tensor, k_BGSP: Tensor, v_BGSP: Tensor) -> Tensor:
    """The flash-attn package (arXiv 2307.08691); fp16 and bf16 only."""
    from flash_attn import flash_attn_func

    q, k, v = (t.transpose(1, 2) for t in (q_BHSP, k_BGSP, v_BGSP))
    return flash_attn_func(q, k, v, causal=True).transpose(1, 2)
