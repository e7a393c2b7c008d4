"""The dense feed-forward, cut over tp: also the shared experts of an MoE layer."""

from torch import Tensor, nn

from moe_dist.kernels.activation import activate, gated
from moe_dist.parallel.linear import ColumnParallelLinear, RowParallelLinear, SharedBias, enter, leave
from moe_dist.parallel.mesh import Mesh


class FeedForward(nn.Module):
    """y = act(x W_up) W_down, or with a gate (act(x W_gate) * x W_up) W_down; each product plus a bias if asked for.
    x: [T, D] -> [T, D]."""

    def __init__(
        self, d_model: int, d_ff: int, activation: str, mesh: Mesh, out_std: float, bias: bool = False
    ) -> None:
        super().__init__()
        self.activation = activation
        self.mesh = mesh
        std = d_model**-0.5
        self.gate = ColumnParallelLinear(d_model, d_ff, mesh.tp, std, bias) if gated(activation) else None
        self.up = ColumnParallelLinear(d_model, d_ff, mesh.tp, std, bias)
        self.down = RowParallelLinear(d_ff, d_model, mesh.tp, out_std)
        self.out_bias = SharedBias(d_model, mesh) if bias else None

    def forward(self, x_TD: Tensor) -> Tensor:
        x_TD = enter(x_TD, self.mesh)
        gate_TF = None if self.gate is None else self.gate(x_TD)
        hidden_TF = activate(self.up(x_TD), self.activation, gate_TF)
        y_TD = leave(self.down(hidden_TF), self.mesh)
        return y_TD if self.out_bias is None else self.out_bias(y_TD)
