"""AdamW: decoupled weight decay, moments in the masters' type (Loshchilov and Hutter, arXiv:1711.05101).

| optim.implementation | class     | what takes the step                       |
|----------------------|-----------|-------------------------------------------|
| torch                | AdamW     | torch's fused kernel                      |
| apex                 | ApexAdamW | FusedAdam of the package apex, on GPUs    |

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    w <- w - lr decay w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

`AdamW` has the same kernel and bits as `torch.optim.AdamW(fused=True)`. That class is not used because making one
imports torch's compiler, a third of what starting a small run costs. `ApexAdamW` rounds otherwise in the last digit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from moe_dist.config.schema import OptimConfig
from moe_dist.kernels.packages import APEX, check_package

Groups = Sequence[tuple[Sequence[Tensor], float]]
"""(parameters, factor of the weight decay)."""


def grad_of(param: Tensor) -> Tensor:
    assert param.grad is not None, "gradients exist from the last micro_step of a step until update"
    return param.grad


@dataclass(frozen=True)
class Moments:
    """Of one parameter: fp32 scalar t, and two tensors of its shape."""

    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def check_implementation(optim: OptimConfig, device_type: str) -> None:
    """Raises ValueError, one line, where optim.implementation cannot run."""
    if optim.implementation == "apex":
        check_package(APEX, "optim.implementation=apex", "torch", device_type)


def describe_implementation(optim: OptimConfig) -> str:
    """Who takes a step, for logs; of a package with its version."""
    return f"{APEX.describe()} FusedAdam" if optim.implementation == "apex" else f"torch {torch.__version__} AdamW"


def make_adamw(groups: Groups, optim: OptimConfig, device_type: str) -> "AdamW | ApexAdamW":
    """The optimizer that `optim` names. Raises ValueError where it cannot run."""
    check_implementation(optim, device_type)
    return ApexAdamW(groups, optim) if optim.implementation == "apex" else AdamW(groups, optim)


@dataclass
class AdamW:
    """Moments exist from a parameter's first update on."""

    groups: Groups
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

    def set_step(self, step: int) -> None:
        """As if `step` updates had been made."""
        for params, _ in self.groups:
            for param in params:
                self.moments(param).step.fill_(step)


class ApexAdamW:
    """The same by apex, in place of `AdamW`."""

    def __init__(self, groups: Groups, optim: OptimConfig) -> None:
        from apex.optimizers import FusedAdam

        named = [
            {"params": list(params), "weight_decay": optim.weight_decay * factor} for params, factor in groups if params
        ]
        betas = (optim.beta1, optim.beta2)
        self.optimizer: Any = FusedAdam(named, lr=optim.lr, betas=betas, eps=optim.eps, adam_w_mode=True)
        self.set_step(0)

    def moments(self, param: Tensor) -> Moments:
        """Zeros where there are none yet."""
        state = self.optimizer.state[param]
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        done = self.optimizer.param_groups[0]["step"]
        return Moments(torch.tensor(float(done)), state["exp_avg"], state["exp_avg_sq"])

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter by its .grad."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            for param in group["params"]:
                grad_of(param)  # apex passes over one without
        self.optimizer.step()

    def set_step(self, step: int) -> None:
        """As if `step` updates had been made; apex counts them by group."""
        for group in self.optimizer.param_groups:
            group["step"] = step
