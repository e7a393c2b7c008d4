"""A part of the model whose beginning and end, forward and backward, a Trail's listener is told."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_dist.parallel.trail import Trail


def told(trail: Trail, what: str, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """run(x), which the trail hears of as `what`. Backward begins with the gradient of what `run` gives and ends with
    that of x. Where nobody listens, and in a graph that torch.compile makes, just run(x)."""
    if torch.compiler.is_compiling() or trail.listener is None:
        return run(x)
    back = torch.is_grad_enabled() and x.requires_grad
    x = x.view_as(x) if back else x  # x may have other uses, whose gradients come later
    with trail.inside(what):
        y = run(x)
    if back:
        y.register_hook(lambda grad: trail.go_inside(what))
        x.register_hook(lambda grad: trail.go_inside(""))
    return y
