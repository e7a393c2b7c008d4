"""The engine that the configuration names."""

from moe_dist.config.schema import EngineConfig, OptimConfig
from moe_dist.engine.base import Engine
from moe_dist.engine.native import NativeEngine
from moe_dist.models.trainable import Trainable
from moe_dist.parallel.mesh import Mesh


def make_engine(
    model: Trainable, mesh: Mesh, engine: EngineConfig, optim: OptimConfig, micro_batch: int, accumulation: int
) -> Engine:
    """The engine named by config, owning `model` from now on."""
    if engine.name == "native":
        return NativeEngine(model, mesh, engine, optim, accumulation)
    from moe_dist.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(model, mesh, engine, optim, micro_batch, accumulation)
