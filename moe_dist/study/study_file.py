"""What a study's file asks."""

from dataclasses import dataclass, field
from typing import Literal

from moe_dist.config.model import STRICT

Scalar = bool | int | float | str | None


@dataclass(kw_only=True, slots=True)
class Question:
    """What is compared with what, stated before the runs."""

    __pydantic_config__ = STRICT

    baseline: dict[str, Scalar]
    compare: dict[str, list[Scalar]] = field(default_factory=dict)
    metric: str = "validation_loss"
    smallest_difference: float | None = None
    decide_by: Literal["time", "flops", "bytes", "memory"] = "time"
    spread: float | None = None
