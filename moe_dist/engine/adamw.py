"""AdamW by torch's fused kernel: decoupled weight decay, moments in the masters' type (Loshchilov and Hutter,
arXiv:1711.05101).

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    w <- w - lr decay w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

The same kernel and bits as `torch.optim.AdamW(fused=True)`. The class is not used because making one imports torch's
compiler, a third of what starting a small run costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from moe_dist.config.schema import OptimConfig


def grad_of(param: Tensor) -> Tensor:
    assert param.grad is not None, "gradients exist from the last micro_step of a step until update"
    return param.grad


@dataclass(frozen=True)
class Moments:
    """Of one parameter: fp32 scalar t, and two tensors of its shape."""

    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass
class AdamW:
    """groups: (parameters, factor of the weight decay). Moments exist from a parameter's first update on."""

    groups: Sequence[tuple[Sequence[Tensor], float]]
    optim: OptimConfig
    state: dict[Tensor, Moments] = field(default_factory=dict)

    def moments(self, param: Tensor) -> Moments:
        """Zeros where there are none yet."""
        if param not in self.state:
            step = torch.zeros((), dtype=torch.float32, device=param.device)
            self.state[param] = Moments(step, torch.zeros_like(param), torch.zeros_like(param))
        return self.state[param]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter by its .grad."""
        for params, factor in self.groups:
            moments = [self.moments(param) for param in params]
            adamw(
                list(params),
                [grad_of(param) for param in params],
                [held.exp_avg for held in moments],
                [held.exp_avg_sq for held in moments],
                [],
                [held.step for held in moments],
                fused=True,
                amsgrad=False,
                beta1=self.optim.beta1,
                beta2=self.optim.beta2,
                lr=lr,
                weight_decay=self.optim.weight_decay * factor,
                eps=self.optim.eps,
                maximize=False,
            )
