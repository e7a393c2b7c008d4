"""What becomes of Adam's moments where experts change. A moment of power n, the mean of g^n (n = 1: exp_avg, n = 2:
exp_avg_sq), goes through the same surgery as the weights, and then follows the gradient, which changes too:

| operation | a parameter              | its gradient is                    | so its moment is                      |
|-----------|--------------------------|------------------------------------|---------------------------------------|
| upcycle   | an expert, 1 of c copies | 1 / c of the dense one, on average | the dense one's / c^n; the router's 0 |
| split     | a part's gate and up     | as it was                          | as it was, of its hidden units        |
|           | its output, times s      | 1 / s of what it was               | / s^n                                 |
|           | its row of the router    | 1 / parts of it, on average        | / parts^n                             |
| merge     | the mean of experts      |                                    | the mean of theirs, weighted as well  |
| add       | a new one, closed        | 0                                  | 0                                     |
| remove    | gone                     |                                    | gone; the others keep theirs          |
| open      | as it was                |                                    | as it was                             |
| close     | as it was                | 0 from here on                     | as it was                             |

"On average": copies share out the tokens, and their gradients add up to the dense one; parts are chosen together, and
the gradients of their rows add up to that of the row they come from. With `zero`, all of a changed layer's router and
experts are 0. What is no part of such a layer keeps its moments; Adam's count of steps goes on.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from moe_dist.engine.base import Kind
from moe_dist.moe.layer import MoE
from moe_dist.surgery.layers import split_experts, split_scale

How = Literal["carry", "zero"]
POWERS: dict[Kind, int] = {"exp_avg": 1, "exp_avg_sq": 2}
_SAID = {
    "add": "those of added experts are 0, all others stay",
    "remove": "they go with the experts, all others stay",
    "merge": "of experts that became one, their mean; all others stay",
    "split": "a part has those of its hidden units, as its gradients are: outputs and router rows smaller",
    "open": "they stay as they are",
    "close": "they stay as they are",
    "upcycle": "a copy's share of the dense layer's, as its gradients are; 0 for routers; all others stay",
}


def said_of(action: str, how: How) -> str:
    """One line for the person."""
    if how == "zero":
        return "those of routers and experts in changed layers are 0, all others stay"
    return _SAID[action]


def trained_parts(layer: MoE) -> Iterator[nn.Parameter]:
    """What the experts of a layer and their choice are made of."""
    yield from layer.router.parameters()
    yield from layer.experts.parameters()


@torch.no_grad()
def zero(layer: MoE) -> None:
    for param in trained_parts(layer):
        param.zero_()


@torch.no_grad()
def of_added(layer: MoE, first: int) -> None:
    """Experts from number `first` on were added."""
    count = layer.config.num_experts
    for param in trained_parts(layer):
        by_expert = param.shape[0] == count
        param[first if by_expert else sum(layer.experts.widths[:first]) :] = 0.0


@torch.no_grad()
def of_merged(layer: MoE) -> None:
    """Means of squares stay above zero, whatever rounding says."""
    for param in trained_parts(layer):
        param.clamp_(min=0.0)


@torch.no_grad()
def of_copies(layer: MoE, copies: int, power: int) -> None:
    """Every expert is a copy of the dense layer."""
    for param in layer.experts.parameters():
        param.mul_(float(copies) ** -power)
    for param in layer.router.parameters():
        param.zero_()


def split_carried(layer: MoE, parts: int, power: int) -> None:
    """`split_experts` of a layer that holds moments. It multiplies outputs by s, their biases by s / parts."""
    scale = split_scale(layer.config, parts)
    split_experts(layer, parts)
    with torch.no_grad():
        layer.experts.w_out.mul_(float(scale) ** -(power + 1))
        if layer.experts.b_out is not None:
            layer.experts.b_out.mul_(parts * float(scale) ** -(power + 1))
        for param in layer.router.parameters():
            param.mul_(float(parts) ** -power)
