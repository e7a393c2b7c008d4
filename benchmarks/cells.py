"""What the layer benchmark compares: one shape, precision and capacity rule each, and the maths every layer must give.

Legend: T tokens, K top_k, D d_model, E experts, F expert hidden, C rows an expert takes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.moe.capacity import expert_capacity

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    title: str
    d_model: int
    d_ff: int
    experts: int
    top_k: int
    activation: str


SHAPES = {
    "a": Shape("switch top-1, d 512, ff 2048, 8 experts, ReLU", 512, 2048, 8, 1, "relu"),
    "b": Shape("top-2, d 512, ff 1024, 32 experts, SwiGLU", 512, 1024, 32, 2, "swiglu"),
    "m": Shape("Mixtral: top-2, d 4096, ff 14336, 8 experts, SwiGLU", 4096, 14336, 8, 2, "swiglu"),
    "q": Shape("Qwen3-30B: top-8, d 2048, ff 768, 128 experts, SwiGLU", 2048, 768, 128, 8, "swiglu"),
    "o": Shape("OLMoE: top-8, d 2048, ff 1024, 64 experts, SwiGLU", 2048, 1024, 64, 8, "swiglu"),
    "s": Shape("Switch-Base: top-1, d 768, ff 3072, 64 experts, ReLU", 768, 3072, 64, 1, "relu"),
    "t": Shape("a rehearsal: top-2, d 16, ff 24, 4 experts, SwiGLU", 16, 24, 4, 2, "swiglu"),
}
SKEW_FEATURE, SKEW_VALUE = 0, 4.0  # the input feature that leans to some experts, and what it is for every token


@dataclass(frozen=True)
class Cell:
    """One comparison. capacity: the capacity factor, or None where nothing is dropped. skewed: the logit of expert i
    is lower by log(i + 1), so that loads fall like Zipf's law."""

    letter: str
    precision: str
    capacity: float | None
    tokens: int
    skewed: bool = False

    @property
    def shape(self) -> Shape:
        return SHAPES[self.letter]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def name(self) -> str:
        rule = "dropless" if self.capacity is None else f"capacity {self.capacity:g}"
        return f"({self.letter}) {self.precision}, {rule}, T {self.tokens}" + (", skewed" if self.skewed else "")

    @property
    def limit(self) -> int | None:
        shape = self.shape
        return expert_capacity(self.capacity, shape.top_k, self.tokens, shape.experts, 1)

    @property
    def flops(self) -> int:
        """Of a forward and a backward pass of the experts a token chooses, with nothing dropped: 6 per weight."""
        matrices = 3 if self.shape.activation == "swiglu" else 2
        return 6 * self.tokens * self.shape.top_k * matrices * self.shape.d_model * self.shape.d_ff


@dataclass(frozen=True)
class Weights:
    """router: [E, D], fp32. gate (None without one), up, out: [E, F, D] in the cell's precision."""

    router: Tensor
    gate: Tensor | None
    up: Tensor
    out: Tensor

    @staticmethod
    def random(cell: Cell, generator: torch.Generator) -> "Weights":
        s = cell.shape

        def draw(*shape: int, fan_in: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=generator.device) * fan_in**-0.5

        def cube(fan_in: int) -> Tensor:
            return draw(s.experts, s.d_ff, s.d_model, fan_in=fan_in).to(cell.dtype)

        gate = cube(s.d_model) if s.activation == "swiglu" else None
        router = draw(s.experts, s.d_model, fan_in=s.d_model)
        if cell.skewed:
            router[:, SKEW_FEATURE] = -torch.arange(1.0, s.experts + 1, device=router.device).log() / SKEW_VALUE
        router = router.to(cell.dtype).float()
        return Weights(router, gate, cube(s.d_model), cube(s.d_ff))

    def inputs(self, cell: Cell, generator: torch.Generator) -> Tensor:
        """x_TD, new each time."""
        shape = (cell.tokens, cell.shape.d_model)
        x_TD = torch.randn(shape, generator=generator, device=generator.device, dtype=cell.dtype)
        if cell.skewed:
            x_TD[:, SKEW_FEATURE] = SKEW_VALUE
        return x_TD

    def to(self, device: torch.device) -> "Weights":
        gate = None if self.gate is None else self.gate.to(device)
        return Weights(self.router.to(device), gate, self.up.to(device), self.out.to(device))


def choose(x_TD: Tensor, router_ED: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(weights_TK, experts_TK): softmax in fp32, the best top_k, renormalised for more than one."""
    weights_TK, experts_TK = F.linear(x_TD.float(), router_ED).softmax(-1).topk(top_k, -1)
    return (weights_TK / weights_TK.sum(-1, keepdim=True) if top_k > 1 else weights_TK), experts_TK


def kept(experts_TK: Tensor, limit: int | None, experts: int) -> Tensor:
    """The first C assignments of each expert in token order stay."""
    if limit is None:
        return torch.ones_like(experts_TK, dtype=torch.bool)
    chosen_NE = F.one_hot(experts_TK.flatten(), experts)
    position_NE = chosen_NE.cumsum(0) * chosen_NE
    return (position_NE.sum(1) <= limit).view_as(experts_TK)


def plain(cell: Cell, w: Weights, x_TD: Tensor) -> Tensor:
    """sum over kept k of weight * E_i(x), every expert on every token, in fp32."""
    weights_TK, experts_TK = choose(x_TD, w.router, cell.shape.top_k)
    weights_TK = weights_TK * kept(experts_TK, cell.limit, cell.shape.experts)
    weight_TE = torch.zeros(len(x_TD), cell.shape.experts, device=x_TD.device).scatter(1, experts_TK, weights_TK)
    y_TD, wide_TD = torch.zeros_like(x_TD, dtype=torch.float32), x_TD.float()
    for e in range(cell.shape.experts):
        up_TF = wide_TD @ w.up[e].float().t()
        hidden_TF = up_TF.relu() if w.gate is None else F.silu(wide_TD @ w.gate[e].float().t()) * up_TF
        y_TD += weight_TE[:, e, None] * (hidden_TF @ w.out[e].float())
    return y_TD
