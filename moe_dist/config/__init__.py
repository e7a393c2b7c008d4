"""What a run is: dataclasses, and every rule that ties two fields together.

Files and flags are read by `config.load`, which is not imported here: a layer that stands alone needs neither.
"""

from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.config.rules.batch import BatchShape, batch_shape
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
from moe_dist.config.validate import validate

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
    "validate",
]
