"""The experts held by this rank: two grouped matrix products with an activation between them.

Legend: R rows, D d_model, F expert hidden width, e experts on this rank.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from moe_dist.kernels.activation import activate, input_width
from moe_dist.kernels.grouped_mm import cpu
from moe_dist.kernels.grouped_mm.reference import GROUPED_MM
from moe_dist.parallel.collectives import copy_to_group
from moe_dist.parallel.mesh import Group, Mesh
from moe_dist.parallel.sharding import ParamSpec, parameter


class Experts(nn.Module):
    """E_i(x) = act(x W_in[i]) W_out[i] for rows sorted by expert.

    At ep > 1 each rank holds num_experts / ep of them and the parameters belong to the edp group. At ep = 1 they are
    replicated like dense parameters; the tp ranks then see different slices of the tokens, so their gradients are
    summed over tp here.
    """

    def __init__(
        self, num_experts: int, d_model: int, d_ff: int, activation: str, backend: str, mesh: Mesh, out_std: float
    ) -> None:
        super().__init__()
        if num_experts % mesh.ep.size:
            raise ValueError(f"num_experts={num_experts} is not divisible by ep={mesh.ep.size}")
        local = num_experts // mesh.ep.size
        self.activation, self.backend = activation, backend
        self.slices = mesh.tp if mesh.ep.size == 1 else Group()
        wide = input_width(d_ff, activation)

        shard: Literal["expert", "replicated"] = "expert" if mesh.ep.size > 1 else "replicated"

        def stacked(rows: int, columns: int, std: float) -> nn.Parameter:
            spec = ParamSpec((num_experts, rows, columns), shard, mesh.ep.rank * local, std, stacked=True)
            return parameter((local, rows, columns), spec)

        self.w_in = stacked(d_model, wide, d_model**-0.5)
        self.w_out = stacked(d_ff, d_model, out_std)

    def forward(self, rows_RD: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        w_in, w_out = copy_to_group(self.w_in, self.slices), copy_to_group(self.w_out, self.slices)
        if cpu.replaces(self.backend, rows_RD.device.type):
            return cpu.feed_forward(rows_RD, w_in, w_out, rows_per_expert, self.activation)
        if rows_RD.shape[0] == 0:
            # Nothing arrived: stay in the graph, so that idle experts get zero gradients and no exchange is skipped.
            return rows_RD + 0.0 * (w_in.sum() + w_out.sum())
        matmul = GROUPED_MM[self.backend]
        hidden_RF = activate(matmul(rows_RD, w_in, rows_per_expert), self.activation)
        return matmul(hidden_RF, w_out, rows_per_expert)
