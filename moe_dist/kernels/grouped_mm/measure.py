"""Which fp32 products on CPU are fastest for experts of one shape: a short race on this machine.

The contestants of onednn.py run the experts' own loop (cpu.py), forward and backward, and take turns; the first turn
warms up, the fastest of the others counts. Numbers are random, as zeros would be faster; there are 8 experts, so that
weights come from memory as they do in a model.
"""

import time
from collections.abc import Callable

import torch

from moe_dist.kernels.activation import gated
from moe_dist.kernels.grouped_mm.cpu import feed_forward
from moe_dist.kernels.grouped_mm.onednn import CHOICES, Products
from moe_dist.kernels.grouped_mm.weights import ExpertWeights
from moe_dist.kernels.permute.order import RowOrder

_EXPERTS, _TURNS = 8, 5


def seconds_of_products(rows: int, d_model: int, d_ff: int, activation: str) -> dict[Products, float]:
    """Seconds of `rows` rows of an expert, forward and backward, by each choice."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(d_model**-0.5).requires_grad_()

    up, out = random(_EXPERTS, d_ff, d_model), random(_EXPERTS, d_ff, d_model)
    w = ExpertWeights(random(_EXPERTS, d_ff, d_model) if gated(activation) else None, up, out, None, None, None)
    x_XD = random(_EXPERTS * rows, d_model)
    experts_XK = torch.arange(len(x_XD))[:, None] % _EXPERTS
    order = RowOrder.of(experts_XK, torch.ones_like(experts_XK, dtype=torch.bool), _EXPERTS)
    leaves = [x_XD, *(part for part in w if part is not None)]

    def turn(products: Products) -> float:
        began = time.perf_counter()
        y_XD = feed_forward(x_XD, None, order, w, activation, products=products)
        torch.autograd.grad(y_XD, leaves, x_XD.detach())
        return time.perf_counter() - began

    return fastest_turns(turn)


def fastest_turns(turn: Callable[[Products], float]) -> dict[Products, float]:
    turns = [{products: turn(products) for products in CHOICES} for _ in range(_TURNS)]
    return {products: min(times[products] for times in turns[1:]) / _EXPERTS for products in CHOICES}
