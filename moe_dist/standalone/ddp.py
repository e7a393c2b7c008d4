"""Layers cut over ranks by `mesh=`, inside torch's DistributedDataParallel.

DDP takes every parameter for a copy of rank 0's and means its gradient over all ranks. That is right for what all ranks
hold, and wrong for experts of which each rank holds others.
"""

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Group
from moe_dist.standalone.base import Layer


def prepare_for_ddp(model: nn.Module) -> None:
    """To be called once, before `DistributedDataParallel(model)`, on every rank.

    DDP then leaves cut parameters alone: neither writes rank 0's over them nor means their gradients. A rank's experts
    are given the tokens of all ranks of their ep group, so their gradient is a sum over that group; here it is summed
    over the edp group, which holds the same experts, and divided by the number of data-parallel ranks. That is what DDP
    makes of the other parameters: the gradient of the mean of all ranks' losses.
    """
    left_alone = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for path, layer in model.named_modules():
        if not isinstance(layer, Layer) or layer.cut_over is None:
            continue
        mesh = layer.cut_over
        for name, param in layer.cut_parameters():
            whole_name = f"{path}.{name}" if path else name
            if whole_name in left_alone:  # of a layer around this one
                continue
            left_alone.add(whole_name)
            param.register_hook(_Mean(mesh.edp if param.spec.shard == "expert" else mesh.dp, mesh.dp.size))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(left_alone))


class _Mean:
    """Of a gradient that has been summed over the ranks outside of `group`."""

    def __init__(self, group: Group, ranks: int) -> None:
        self.group, self.ranks = group, ranks

    def __call__(self, grad: Tensor) -> Tensor:
        return all_reduce(grad.clone(), self.group) / self.ranks
