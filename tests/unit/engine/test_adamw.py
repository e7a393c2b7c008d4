"""AdamW against torch's class, bit by bit."""

import pytest
import torch

from moe_dist.config.schema import OptimConfig
from moe_dist.engine.adamw import AdamW


def test_same_bits_as_torch_over_steps_with_other_rates() -> None:
    optim = OptimConfig(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-5, weight_decay=0.3)
    ours, theirs = ([torch.randn(3, 5), torch.randn(7), torch.randn(2, 2)] for _ in range(2))
    for mine, other in zip(ours, theirs, strict=True):
        other.copy_(mine)
    optimizer = AdamW([(ours[:2], 1.0), (ours[2:], 0.5), ([], 0.0)], optim)
    groups = [{"params": theirs[:2], "weight_decay": 0.3}, {"params": theirs[2:], "weight_decay": 0.15}]
    oracle = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9), eps=1e-5, fused=True)
    for lr in (0.1, 0.02, 0.3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for group in oracle.param_groups:
            group["lr"] = lr
        optimizer.step(lr)
        oracle.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        held, state = optimizer.moments(mine), oracle.state[other]
        assert torch.equal(held.exp_avg, state["exp_avg"]) and torch.equal(held.exp_avg_sq, state["exp_avg_sq"])
        assert float(held.step) == float(state["step"]) == 3


def test_a_parameter_without_a_gradient_is_no_silent_zero() -> None:
    with pytest.raises(AssertionError, match="gradients exist from"):
        AdamW([([torch.zeros(2)], 1.0)], OptimConfig()).step(0.1)
