"""The attention function of a backend; all of them take the same arguments and share one meaning.

| name   | what runs                                                                                      |
|--------|------------------------------------------------------------------------------------------------|
| torch  | plain maths (reference.py); the only one that can return the weights                           |
| flash  | the flash-attn package where it is installed and the tensors are on a GPU, else torch's SDPA    |
| packed | on CPU, whole causal sequences as one product for each key/value head; everything else as flash |
| triton | our kernels (triton.py)                                                                        |
"""

from collections.abc import Callable

from torch import Tensor

from moe_dist.kernels.attention import flash, packed, reference
from moe_dist.kernels.attention.pattern import Pattern

Attend = Callable[[Tensor, Tensor, Tensor, Pattern | None, float | None], Tensor]
"""(q [B, H, Q, P], k [B, G, K, P], v [B, G, K, P], pattern, scale) -> [B, H, Q, P]."""


def attention(backend: str) -> Attend:
    """Raises ValueError for a name that is none of them."""
    match backend:
        case "torch":
            return reference.attend
        case "flash":
            return flash.attend
        case "packed":
            return packed.attend
        case "triton":
            from moe_dist.kernels.attention.triton import attend

            return attend
    raise ValueError(f"unknown attention backend {backend!r}: choose torch, flash, packed or triton")
