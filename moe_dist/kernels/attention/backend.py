"""The attention function of a backend; all of them take the same arguments and share one meaning.

| name       | what runs                                                                                       |
|------------|-------------------------------------------------------------------------------------------------|
| torch      | plain maths (reference.py); the only one that can return the weights                            |
| flash      | torch's fused attention (SDPA), whose kernels are flash attention where they can                |
| packed     | on CPU, whole causal sequences as one product for each key/value head; everything else as flash |
| flash_attn | the flash-attn package, on GPUs                                                                 |
| triton     | our kernels (triton.py)                                                                         |
"""

from collections.abc import Callable

from torch import Tensor

from moe_dist.kernels.attention import flash, flash_attn, packed, reference
from moe_dist.kernels.attention.pattern import Pattern
from moe_dist.kernels.packages import FLASH_ATTN, check_package
from moe_dist.kernels.registry import check_triton

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
        case "flash_attn":
            return flash_attn.attend
        case "triton":
            from moe_dist.kernels.attention.triton import attend

            return attend
    raise ValueError(f"unknown attention backend {backend!r}: choose torch, flash, packed, flash_attn or triton")


def check_attention(backend: str, field: str, device_type: str) -> None:
    """Raises ValueError, one line, where a backend cannot run. field: what names it, as `model.attention.backend`."""
    if backend == "triton":
        check_triton(field, "flash", device_type)
    if backend == "flash_attn":
        check_package(FLASH_ATTN, f"{field}=flash_attn", "flash", device_type)


def describe_attention(backend: str) -> str:
    """What runs, for logs; of a package with its version."""
    return {"flash": "torch-sdpa", "flash_attn": FLASH_ATTN.describe()}.get(backend, backend)
