"""Trading tokens for heads over a group: each rank holds some tokens with all heads, or all tokens with some heads.

Attention needs every token of a sequence but treats each head on its own, so one all-to-all before it and one after let
tokens stay cut everywhere else (DeepSpeed-Ulysses, arXiv 2309.14509, section 3.1). Rank order is token order.

Legend: t tokens of this rank, T those of the group, N numbers of a token over all heads, n those of this rank's heads.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.parallel.collectives import exchange_rows
from moe_dist.parallel.mesh import Group


def tokens_to_heads(x_tN: Tensor, group: Group) -> Tensor:
    """[t, N] -> [T, n]: the group's tokens, this rank's part of their numbers. The gradient travels back."""
    if x_tN.shape[1] % group.size:
        raise ValueError(f"{x_tN.shape[1]} numbers of a token cannot be cut into {group.size} equal parts")
    return _Trade.apply(x_tN, group, True) if group.size > 1 else x_tN


def heads_to_tokens(x_Tn: Tensor, group: Group) -> Tensor:
    """[T, n] -> [t, N], the inverse."""
    return _Trade.apply(x_Tn, group, False) if group.size > 1 else x_Tn


class _Trade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, to_heads: bool) -> Tensor:
        ctx.group, ctx.to_heads = group, to_heads
        return _trade(x, group, to_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _trade(grad, ctx.group, not ctx.to_heads), None, None


def _trade(x: Tensor, group: Group, to_heads: bool) -> Tensor:
    size = group.size
    if to_heads:
        tokens, width = len(x), x.shape[1] // size
        x = x.view(tokens, size, width).transpose(0, 1).reshape(size * tokens, width)
    else:
        tokens, width = len(x) // size, x.shape[1]
    equal = (tokens,) * size
    x = exchange_rows(x, equal, equal, group)
    # Rows came as (rank they are from, token): that rank's tokens, or its heads of this rank's tokens.
    return x if to_heads else x.view(size, tokens, width).transpose(0, 1).reshape(tokens, size * width)
