"""torch.compile, autocast, activation checkpointing and copies, on one process.

A compiled graph has the layer as one operation, which runs as it does without: `fullgraph=True` finds no break, and
dropout, capacity and counts are the same.
"""

import copy

import torch
from own_model import Model, batch, compare, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

EXPECTED = train(Model(dropout=0.1))


class Checkpointed(nn.Module):
    """A block that keeps its input alone, and runs once more in the backward pass, with the same dropout."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(self.block, x, use_reentrant=False)


def main() -> None:
    compare("compiled", train(torch.compile(Model(dropout=0.1), fullgraph=True)), EXPECTED)

    model = Model(dropout=0.1)
    model.blocks = nn.ModuleList(Checkpointed(block) for block in model.blocks)
    compare("checkpointed", train(model), EXPECTED)

    model = Model(dropout=0.1)
    twin = copy.deepcopy(model)
    train(model)
    compare("a copy made before", train(twin), EXPECTED)

    model = Model()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch(0))
    loss.backward()
    kinds = {parameter.grad.dtype for parameter in model.parameters()}
    apart = float(loss.detach()) - float(Model()(batch(0)).detach())
    print(f"autocast: loss {loss:.3f}, {apart:+.3f} from fp32, gradients {kinds}")


if __name__ == "__main__":
    main()
