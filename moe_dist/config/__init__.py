"""What a run is: dataclasses, strict loading, and every rule that ties two fields together."""

from moe_dist.config.load import dump_config, load_config
from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.config.schema import (
    Config,
    DataConfig,
    EngineConfig,
    GuardConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from moe_dist.config.validate import BatchShape, batch_shape, validate

__all__ = [
    "BatchShape",
    "Config",
    "DataConfig",
    "EngineConfig",
    "GuardConfig",
    "ModelConfig",
    "MoEConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainConfig",
    "batch_shape",
    "dump_config",
    "load_config",
    "validate",
]
