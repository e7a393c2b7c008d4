"""What one tp rank holds of the fused projection, and how its state dict stays the logical one.

A rank holds the rows of its query heads and those of the key/value heads that they read. So rows of the fused weight
are not one range, and where tp does not divide the key/value heads, some rows are on several ranks.

Legend: H query heads, G key/value heads, P width of a head, N entries held by this rank.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.kernels.random import RandomKey
from moe_dist.parallel.collectives import all_reduce, with_gradient
from moe_dist.parallel.heads import HeadAssignment
from moe_dist.parallel.mesh import Group
from moe_dist.parallel.sharding import write_whole


@dataclass(frozen=True, eq=False)
class Part:
    """Entries index_N, along `dim`, of a logical tensor of `size` there. owned_N: those that count when ranks are put
    together; every entry is owned once."""

    size: int
    index_N: Tensor
    owned_N: Tensor
    dim: int = 0

    @staticmethod
    def of(size: int, blocks: list[tuple[range, range]], dim: int = 0) -> "Part":
        """blocks: (entries held, those of them that are owned)."""
        index_N = torch.tensor([at for held, _ in blocks for at in held], device="cpu")
        owned_N = torch.tensor([at in owned for held, owned in blocks for at in held], device="cpu")
        return Part(size, index_N, owned_N, dim)

    def take(self, whole: Tensor) -> Tensor:
        """This rank's entries of a logical tensor."""
        return whole.index_select(self.dim, self.index_N.to(whole.device))

    @torch.no_grad()
    def whole(self, local: Tensor, tp: Group) -> Tensor:
        """The logical tensor. Every rank of tp must call."""
        mine_N = self.owned_N.nonzero().flatten().to(local.device)
        shape = list(local.shape)
        shape[self.dim] = self.size
        whole = local.new_zeros(shape)
        whole.index_copy_(self.dim, self.index_N.to(local.device)[mine_N], local.index_select(self.dim, mine_N))
        return all_reduce(whole, tp)


def qkv_part(heads: HeadAssignment, num_heads: int, num_kv_heads: int, head_dim: int) -> Part:
    """Rows of the fused weight [H * P + 2 * G * P, D]: queries, keys, values, head after head."""

    def rows(first: int, of: range) -> range:
        return range(first + of.start * head_dim, first + of.stop * head_dim)

    keys, values = num_heads * head_dim, (num_heads + num_kv_heads) * head_dim
    queries = rows(0, heads.queries)
    blocks = [(queries, queries)]
    blocks += [(rows(first, heads.kv_held), rows(first, heads.kv_owned)) for first in (keys, values)]
    return Part.of(values + num_kv_heads * head_dim, blocks)


@torch.no_grad()
def initialize_part(linear: nn.Linear, part: Part, key: RandomKey) -> None:
    """Normal with a standard deviation of (numbers summed)^-0.5, bias zero: the same logical weight in any layout."""
    shape = list(linear.weight.shape)
    shape[part.dim] = part.size
    generator = torch.Generator().manual_seed(key.value)
    whole = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * shape[1] ** -0.5
    write_whole(linear.weight, part.take(whole))
    if linear.bias is not None:
        linear.bias.zero_()


def logical_state(module: nn.Module, tp: Group, **parts: Part) -> None:
    """Let state_dict give, and load_state_dict take, the logical tensors of these parameters of `module`."""
    module.register_state_dict_post_hook(partial(_put_together, tp, parts))
    module.register_load_state_dict_pre_hook(partial(_cut, parts))


def _put_together(
    tp: Group, parts: dict[str, Part], module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    for name, part in parts.items():
        state[prefix + name] = part.whole(state[prefix + name], tp)


def _cut(
    parts: dict[str, Part], module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, *rest: Any
) -> None:
    errors: list[str] = rest[-1]
    for name, part in parts.items():
        tensor = state.get(prefix + name)
        if tensor is None:
            continue  # torch reports what is missing
        shape = list(module.get_parameter(name).shape)
        shape[part.dim] = part.size
        if list(tensor.shape) == shape:
            state[prefix + name] = part.take(tensor)
        else:
            errors.append(f"size mismatch for {prefix + name}: {list(tensor.shape)}, but the logical tensor is {shape}")
            state[prefix + name] = module.get_parameter(name).detach()


def sum_shared(x: Tensor, part: Part, first: int, tp: Group) -> Tensor:
    """Identity on a rank's fused weight or bias; the gradient of its entries from `first` on (keys and values), which
    other ranks may hold too, is summed over all that hold them."""

    def summed(grad: Tensor) -> Tensor:
        start = tp.size * first  # every rank has as many rows of queries
        index = part.index_N[first:].to(grad.device) - start
        whole = grad.new_zeros(part.size - start, *grad.shape[1:])
        whole = all_reduce(whole.index_copy_(0, index, grad[first:]), tp)
        return torch.cat((grad[:first], whole[index]))

    return with_gradient(x, lambda x: x.view_as(x), summed)
