"""The parameters of a rank, with what ZeRO asks of them: whose they are, and where in the model."""

from dataclasses import dataclass

from moe_dist.config import Config
from moe_dist.parallel.mesh import Axis, Layout
from moe_dist.plan.held import Held


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


def parameters(config: Config, layout: Layout, rank: int) -> list[Param]:
    """Of the model that `rank` builds, in its order. Raises ValueError when the number of classes is not known."""
    model = config.model
    if config.task == "classification" and model.num_classes is None:
        raise ValueError("num_classes=null is read from the data, which a plan does not: set model.num_classes")
    held = Held.of(config, layout, rank)
    exchanged = held if config.engine.zero_stage == 3 else held.trained  # it gathers what is frozen too
    return [
        Param(tensor.elements, tensor.expert, tensor.decay, _block(tensor.name, model.num_layers))
        for tensor in exchanged.tensors
    ]


def _block(name: str, blocks: int) -> int:
    place, _, rest = name.partition(".")
    if place == "blocks":
        return int(rest.partition(".")[0])
    return -1 if place in ("embedding", "positions") else blocks
