"""FSDP2: torchrun --nproc_per_node 2 examples/with_fsdp2.py

`fully_shard` cuts every parameter, experts too, over the ranks, and gathers those of a block while it computes. The
model is made without memory, cut, and filled after that, so that no rank ever holds all of it.
"""

import torch
import torch.distributed as dist
from own_model import Model, compare, train
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from with_ddp import train_on_ranks

from moe_dist import MixtureOfExperts


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    with torch.device("meta"):
        model: nn.Module = Model()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    for layer in model.modules():
        if isinstance(layer, MixtureOfExperts):
            layer.reset_parameters()  # from its seed, each rank its own part
    others = {name: tensor for name, tensor in Model().state_dict().items() if ".experts." not in name}
    set_model_state_dict(model, others, options=StateDictOptions(full_state_dict=True, strict=False))

    losses = train_on_ranks(model)
    if dist.get_rank() == 0:
        compare("FSDP2", losses, train(Model(), parts=dist.get_world_size()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
