"""How many parameters a model has: the model itself is built, without any memory, and asked.

The same numbers whatever the parallel layout and the backend.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import prod

import torch
from torch import nn

from moe_dist.attention.switch import AttentionExperts
from moe_dist.config.model import ModelConfig
from moe_dist.models.backends import plainest
from moe_dist.models.classifier import Classifier
from moe_dist.models.decoder import Decoder
from moe_dist.models.flops import experts_of_a_token
from moe_dist.moe.experts import Experts
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.parallel.sharding import logical_parameters


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Logical parameters of a model."""

    total: int
    """All of them; tied embeddings count once."""
    active: int
    """Those that one token meets: of the experts of a layer, K out of E (flops.py)."""
    expert: int
    """Those of all routed and attention experts, which expert parallelism shards. Shared experts are not among them."""


def parameter_counts(model: ModelConfig) -> ParameterCounts:
    """Of the decoder."""
    with torch.device("meta"):
        return _counts(Decoder(plainest(model), single_process_mesh()), model)


def classifier_parameter_counts(model: ModelConfig, max_len: int) -> ParameterCounts:
    """Of the classifier for texts of up to max_len tokens."""
    with torch.device("meta"):
        return _counts(Classifier(plainest(model), single_process_mesh(), max_len), model)


def _counts(built: nn.Module, model: ModelConfig) -> ParameterCounts:
    expert, idle, moe_layers = 0, Fraction(0), 0
    for module in built.modules():
        if isinstance(module, Experts):
            met = experts_of_a_token(model.moe, moe_layers) / model.moe.num_experts
            moe_layers += 1
        elif isinstance(module, AttentionExperts):
            met = Fraction(model.attention.moe.top_k, model.attention.moe.num_experts)
        else:
            continue
        expert += _logical(module)
        idle += _logical(module) * (1 - met)
    total = _logical(built)
    return ParameterCounts(total=total, active=total - round(idle), expert=expert)


def _logical(module: nn.Module) -> int:
    return sum(prod(spec.logical_shape) for _, _, spec in logical_parameters(module))
