"""What a rank's parameter is in the logical model, and its initial values.

Every sharded parameter is cut along dim 0, so a rank holds a contiguous range of the flattened logical parameter.
Initial values are a function of (seed, logical name, index along dim 0 where that is the experts), never of the layout.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from moe_dist.kernels.permute.order import traced
from moe_dist.kernels.random import RandomKey

Shard = Literal["replicated", "tensor", "expert"]


@dataclass(frozen=True)
class ParamSpec:
    """One parameter's place in the logical model.

    shard: `replicated`, `tensor` (cut over tp) or `expert` (cut over ep; replicas of it form the edp group).
    flat_start: offset of this rank's first element in the flattened logical parameter; its range is contiguous.
    std: standard deviation of the initial normal values; None starts at one (norm scales), 0 at zero (biases).
    entries: elements of each part that is drawn on its own (one per expert), so that a rank draws only what it holds.
    vector: one number per unit, a bias: no weight decay, whatever its number of dimensions.
    """

    logical_shape: tuple[int, ...]
    shard: Shard = "replicated"
    flat_start: int = 0
    std: float | None = 0.02
    entries: tuple[int, ...] = ()
    vector: bool = False

    @property
    def decay(self) -> bool:
        """Weight decay applies to matrices, not to norm scales and biases."""
        return len(self.logical_shape) > 1 and not self.vector


class PlacedParameter(nn.Parameter):
    """A parameter that keeps its `spec` when it is copied, as the models of moving averages are."""

    spec: ParamSpec

    def __deepcopy__(self, memo: dict[int, Any]) -> "PlacedParameter":
        copied: PlacedParameter = super().__deepcopy__(memo)  # type: ignore[no-untyped-call]
        copied.spec = self.spec
        return copied


def parameter(shape: tuple[int, ...], spec: ParamSpec) -> nn.Parameter:
    """An uninitialised parameter that knows its place; `initialize` fills it."""
    param = PlacedParameter(torch.empty(shape))
    param.spec = spec
    return param


def spec_of(param: Tensor) -> ParamSpec:
    """The ParamSpec of a parameter made by `parameter`."""
    spec: ParamSpec = param.spec  # type: ignore[attr-defined]
    return spec


def logical_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, ParamSpec]]:
    """Name, parameter and place of every parameter; names are the same on all ranks and in all layouts."""
    for name, param in module.named_parameters():
        yield name, param, spec_of(param)


@torch.no_grad()
def initialize(module: nn.Module, seed: int, prefix: str = "") -> None:
    """Fill every parameter from (seed, name), so that all layouts start from the same logical model. `prefix`: the name
    of `module` within that model and a dot, where it is filled on its own.

    Of what FSDP2 has cut, each rank fills its own part. It puts parameters without a place where placed ones were: so
    `module` remembers the places that it was first filled by.
    """
    places: dict[str, ParamSpec] = module.__dict__.setdefault("places_of_parameters", {})
    for name, param in module.named_parameters():
        if isinstance(param, PlacedParameter):
            places[name] = param.spec
        if traced(param):  # without memory; filled when it has some
            continue
        key, spec = RandomKey.of(seed, prefix + name), places[name]
        if spec.std is None:
            param.fill_(1.0)
        elif is_cut_by_fsdp(param):
            whole = torch.empty(param.shape)
            _fill(whole, spec, key)
            write_whole(param, whole)
        else:
            _fill(param, spec, key)


def is_cut_by_fsdp(param: Tensor) -> bool:
    """Whether it is a DTensor, of whose numbers a rank has a part."""
    return hasattr(param, "device_mesh")


@torch.no_grad()
def write_whole(param: Tensor, whole: Tensor) -> None:
    """The numbers of `whole` into a parameter; where FSDP2 has cut that, a rank's part of them into its part."""
    if is_cut_by_fsdp(param):
        from torch.distributed.tensor import distribute_tensor  # who has such a parameter has imported it

        held: Any = param
        whole = distribute_tensor(whole, held.device_mesh, held.placements, src_data_rank=None).to_local()
        param = held.to_local()
    param.copy_(whole)


def _fill(param: Tensor, spec: ParamSpec, key: RandomKey) -> None:
    assert spec.std is not None
    flat, stop = param.view(-1), spec.flat_start + param.numel()
    start = 0
    for index, size in enumerate(spec.entries or (prod(spec.logical_shape),)):
        first, last = max(start, spec.flat_start), min(start + size, stop)
        if first < last:
            whole = _normal(size, spec.std, key.fold(index) if spec.entries else key)
            flat[first - spec.flat_start : last - spec.flat_start].copy_(whole[first - start : last - start])
        start += size


def _normal(size: int, std: float, key: RandomKey) -> Tensor:
    # Philox takes the whole key; torch's CPU generator would use 32 bits of it, and experts could start as twins.
    generator = np.random.Generator(np.random.Philox(key=key.value))
    return torch.from_numpy(generator.standard_normal(size, dtype=np.float32)).mul_(std)
