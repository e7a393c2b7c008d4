"""Small models, and what tests ask of them."""

from dataclasses import replace

import torch
from torch import nn

from moe_dist.config.model import AttentionConfig, ModelConfig, MoEConfig
from moe_dist.kernels.random import RandomKey
from moe_dist.models.backends import resolve_backends
from moe_dist.step import StepContext


def tiny_model(device: str = "cpu", **changes: object) -> ModelConfig:
    """Two blocks, 4 query heads on 2 key/value heads, 4 experts; fields of MoEConfig go to its `moe`. attention: the
    name of a backend, or an AttentionConfig. device: for which `auto` is resolved."""
    of_moe = {name: value for name, value in changes.items() if name in MoEConfig.__slots__ and name != "d_ff"}
    of_model = {name: value for name, value in changes.items() if name not in of_moe}
    moe = replace(MoEConfig(num_experts=4, top_k=2, capacity_factor=None), **of_moe)
    settings = dict(vocab_size=32, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=24, attention="torch")
    settings |= of_model
    if isinstance(settings["attention"], str):
        settings["attention"] = AttentionConfig(backend=settings["attention"])
    return resolve_backends(ModelConfig(**settings, moe=moe), ep=1, device_type=device)


def context(*parts: int, phase: str = "train", witness: object = None) -> StepContext:
    return StepContext(RandomKey.of("test", *parts), phase, witness)


def random_ids(rows: int, length: int, vocab: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    """All gradients by name; a parameter without one fails here."""
    grads = {name: param.grad for name, param in module.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None] == []
    return grads
