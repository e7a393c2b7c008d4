"""DistributedDataParallel: torchrun --nproc_per_node 2 examples/with_ddp.py

First the whole layer on every rank, each with tokens, capacity and dropout of its own. Then the experts are cut over
the ranks: tokens travel to them, and who is dropped is decided among the tokens of all ranks, as on one process. (On
GPUs: nccl for gloo, and model and batches on the rank's device.)
"""

import torch.distributed as dist
from own_model import STEPS, Model, batch, compare, optimizer_of, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe_dist.parallel.mesh import create_mesh
from moe_dist.standalone.ddp import prepare_for_ddp


def train_on_ranks(model: nn.Module) -> list[float]:
    """Every rank takes its part of the batch; the loss is the mean of theirs."""
    optimizer, losses = optimizer_of(model), []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(batch(step).chunk(dist.get_world_size())[dist.get_rank()])
        loss.backward()
        optimizer.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(float(mean))
    return losses


def main() -> None:
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    whole = train_on_ranks(DistributedDataParallel(Model()))

    model = Model(mesh=create_mesh(ep=ranks, tp=1), dropout=0.1)
    prepare_for_ddp(model)  # or DDP would take experts that differ for copies of each other
    cut = train_on_ranks(DistributedDataParallel(model))

    if dist.get_rank() == 0:
        compare("whole layers", whole, train(Model(), parts=ranks))
        compare("experts over ranks", cut, train(Model(dropout=0.1)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
