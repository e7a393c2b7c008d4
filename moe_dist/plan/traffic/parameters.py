"""The parameters of a rank: the model that it builds, without memory, is asked."""

from dataclasses import dataclass, replace

import torch

from moe_dist.config import BatchShape, Config
from moe_dist.models.classifier import Classifier
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import Axis, Layout, mesh_without_processes
from moe_dist.parallel.sharding import logical_parameters


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter as a rank holds it, before ZeRO cuts it. block: number of its block; -1 before the blocks, their
    number behind them."""

    numel: int
    expert: bool
    decay: bool
    block: int

    @property
    def axis(self) -> Axis:
        """Over which its gradient is reduced."""
        return "edp" if self.expert else "dp"


def parameters(config: Config, shape: BatchShape, layout: Layout, rank: int) -> list[Param]:
    """Of the model that `rank` builds, in its order. Raises ValueError when the number of classes is not known."""
    mesh = mesh_without_processes(layout, rank, config.parallel.sequence_parallel)
    model = replace(config.model, kernels="torch", attention=replace(config.model.attention, backend="torch"))
    if config.task == "classification" and model.num_classes is None:
        raise ValueError("num_classes=null is read from the data, which a plan does not: set model.num_classes")
    with torch.device("meta"):
        built = Decoder(model, mesh) if config.task != "classification" else Classifier(model, mesh, shape.seq_len)
    return [
        Param(param.numel(), spec.shard == "expert", spec.decay, _block(name, model.num_layers))
        for name, param, spec in logical_parameters(built)
    ]


def _block(name: str, blocks: int) -> int:
    place, _, rest = name.partition(".")
    if place == "blocks":
        return int(rest.partition(".")[0])
    return -1 if place in ("embedding", "positions") else blocks
