"""What the experts at hand are made of."""

from typing import NamedTuple

from torch import Tensor


class ExpertWeights(NamedTuple):
    """E_i(x) = (act(x gate_i^T + gate_bias_i) * (x up_i^T + up_bias_i)) out_i + out_bias_i, or without a gate
    act(x up_i^T + up_bias_i) out_i + out_bias_i.

    gate, up, out: [e, F, D], one hidden unit after the other, so that cutting experts or their hidden units are both
    contiguous cuts. gate is None for activations without one. Biases: [e, F], [e, F], [e, D], or all None.
    """

    gate: Tensor | None
    up: Tensor
    out: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    out_bias: Tensor | None = None
