"""What every Triton op asks before it launches: it says no in one line, and never runs something else instead."""

from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_launch(op: str, kernel: Any, x: Tensor, instead: str = "kernels=torch") -> None:
    """x must be where `kernel` runs (CPU only under TRITON_INTERPRET=1), and not wider than the fp32 it computes in.

    instead: what the message tells the user to choose.
    """
    if x.device.type == "cpu" and isinstance(kernel, JITFunction):
        raise ValueError(
            f"{op}: the Triton kernel needs a GPU but the tensor is on cpu: use {instead} "
            "(or set TRITON_INTERPRET=1 before Python starts, to test the kernel)"
        )
    if x.is_floating_point() and x.dtype not in _FLOATS:
        raise ValueError(f"{op}: the Triton kernel computes in float32 but the tensor is {x.dtype}: use {instead}")
