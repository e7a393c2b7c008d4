"""The experts held by this rank.

Legend: X rows that arrived, R rows sorted by expert, D d_model, F expert hidden width, E experts, e experts here.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from moe_dist.config.model import MoEConfig
from moe_dist.kernels.activation import gated
from moe_dist.kernels.grouped_mm import cpu, reference
from moe_dist.kernels.grouped_mm.onednn import named
from moe_dist.kernels.grouped_mm.weights import ExpertWeights
from moe_dist.kernels.permute.backend import permutation
from moe_dist.kernels.permute.order import RowOrder
from moe_dist.parallel.collectives import copy_to_group
from moe_dist.parallel.mesh import Group, Mesh
from moe_dist.parallel.sharding import ParamSpec, Shard, parameter
from moe_dist.parallel.told import told


class Experts(nn.Module):
    """E_i(x) = act(x W_up[i]^T) W_out[i], or (act(x W_gate[i]^T) * x W_up[i]^T) W_out[i]; biases if asked for.

    Every matrix is [E, F, D]: one hidden unit after the other, expert after expert. So a rank's part is a contiguous
    range however the experts are cut: over ep by expert, and over etp by hidden units, where a rank holds `E * etp`
    narrower experts of which an expert is the sum. Experts of different widths lie in [sum of widths, D].

    Where the experts are cut, their parameters belong to the edp group. Otherwise they are replicated like dense ones;
    the tp ranks then see different slices of the tokens, so their gradients are summed over tp here.
    """

    def __init__(
        self,
        moe: MoEConfig,
        d_model: int,
        d_ff: int,
        activation: str,
        mesh: Mesh,
        kernels: str = "torch",
        recompute: bool = False,
        out_std: float | None = None,
    ) -> None:
        """d_ff: where `moe` gives no width. out_std: of the initial w_out, None: mean_width ** -0.5."""
        super().__init__()
        etp, ep = mesh.etp, mesh.layout.ep
        if moe.num_experts % ep:
            raise ValueError(f"num_experts={moe.num_experts} is not divisible by ep={ep}")
        self.d_model = d_model
        self.activation = activation
        self.backend = moe.experts
        self.products = moe.cpu_products
        self.kernels = kernels
        self.permute = permutation(kernels)
        self.recompute = recompute
        self.world = mesh.world
        self.slices = mesh.tp if mesh.ep.size == 1 else Group()
        self.shard: Shard = "expert" if mesh.ep.size > 1 else "replicated"
        self.logical = expert_widths(moe, d_ff)
        self.uniform = len(set(self.logical)) == 1
        self.mean_width = sum(self.logical) // len(self.logical)
        self.out_std = self.mean_width**-0.5 if out_std is None else out_std
        # This rank's narrower experts, e of them: which part of the logical hidden units they are. With two experts of
        # width 6 and 4, etp 2 makes four: 3, 3, 2, 2. On two ranks the second holds 2, 2, from hidden unit 6 on.
        local = moe.num_experts * etp // mesh.ep.size
        first = mesh.ep.rank * local
        parts = [self.logical[index // etp] // etp for index in range(moe.num_experts * etp)]
        self.widths = tuple(parts[first : first + local])
        self.first_unit = sum(parts[:first])

        has_gate, in_std = gated(activation), d_model**-0.5
        self.w_gate = self._units(d_model, in_std) if has_gate else None
        self.w_up = self._units(d_model, in_std)
        self.w_out = self._units(d_model, self.out_std)
        self.b_gate = self._units(None, 0.0) if has_gate and moe.expert_bias else None
        self.b_up = self._units(None, 0.0) if moe.expert_bias else None
        spec = ParamSpec((moe.num_experts, d_model), self.shard, first * d_model, 0.0, vector=True)
        self.b_out = parameter((local, d_model), spec) if moe.expert_bias else None

    def _units(self, columns: int | None, std: float) -> nn.Parameter:
        """A row of `columns` numbers for every hidden unit, or one number each when None."""
        wide = () if columns is None else (columns,)
        each = columns or 1
        logical: tuple[int, ...] = (len(self.logical), self.logical[0]) if self.uniform else (sum(self.logical),)
        shape: tuple[int, ...] = (len(self.widths), self.widths[0]) if self.uniform else (sum(self.widths),)
        entries = tuple(width * each for width in self.logical)
        spec = ParamSpec(logical + wide, self.shard, self.first_unit * each, std, entries, vector=columns is None)
        return parameter(shape + wide, spec)

    def weights(self) -> ExpertWeights:
        """What the kernels take; gradients are summed over the ranks that see other slices of the tokens."""

        def summed(p: nn.Parameter | None) -> Tensor | None:
            return None if p is None else copy_to_group(p, self.slices)

        up, out = copy_to_group(self.w_up, self.slices), copy_to_group(self.w_out, self.slices)
        return ExpertWeights(summed(self.w_gate), up, out, summed(self.b_gate), summed(self.b_up), summed(self.b_out))

    def parts(self, number: int) -> list[Callable[[Tensor, Tensor | None, RowOrder], Tensor]]:
        """`forward` of consecutive parts of equally many experts, each with an order over its own. Each parameter is
        cut once: its gradient is put together once, not summed from as many of its full size."""
        each = len(self.widths) // number
        widths = [self.widths[first : first + each] for first in range(0, len(self.widths), each)]
        w = self.weights()
        cut: list[Sequence[Tensor | None]] = []
        for field, p in zip(w._fields, w, strict=True):
            if p is None:
                cut.append((None,) * number)
            else:
                by_expert = self.uniform or field == "out_bias"
                cut.append(p.split([each if by_expert else sum(part) for part in widths]))
        weights = map(ExpertWeights._make, zip(*cut, strict=True))
        return [partial(self, w=own, widths=wide) for own, wide in zip(weights, widths, strict=True)]

    def forward(
        self,
        x_XD: Tensor,
        weights_XK: Tensor | None,
        order: RowOrder,
        w: ExpertWeights | None = None,
        widths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """y[x] = sum over kept k of weights[x, k] * E_i(x), i the expert of the assignment: [X, D] -> [X, D].

        w, widths: of one of `parts`.
        """
        w = self.weights() if w is None else w
        widths = None if self.uniform else widths or self.widths
        compute = partial(self._compute, weights_XK=weights_XK, order=order, w=w, widths=widths)
        return told(self.world.trail, "experts", compute, x_XD)

    def _compute(
        self,
        x_XD: Tensor,
        weights_XK: Tensor | None,
        order: RowOrder,
        w: ExpertWeights,
        widths: tuple[int, ...] | None,
    ) -> Tensor:
        device_type = x_XD.device.type
        if torch.is_autocast_enabled(device_type):
            # The kernels are single functions, so their inputs are cast here, once.
            dtype = torch.get_autocast_dtype(device_type)
            x_XD, w = x_XD.to(dtype), ExpertWeights._make(None if p is None else p.to(dtype) for p in w)
            with torch.autocast(device_type, enabled=False):
                return self._compute(x_XD, weights_XK, order, w, widths)
        if cpu.replaces(self.backend, device_type) and order.fullest is None:
            return cpu.feed_forward(x_XD, weights_XK, order, w, self.activation, widths, named(self.products))
        if self.backend == "triton":
            from moe_dist.kernels.grouped_mm.triton import feed_forward as fused

            return fused(x_XD, weights_XK, order, w, self.activation, keep_activation=not self.recompute)
        return reference.feed_forward(
            x_XD, weights_XK, order, w, self.activation, self.backend, widths, self.recompute, self.permute
        )


def expert_widths(moe: MoEConfig, d_ff: int) -> Sequence[int]:
    """Hidden width of every expert: moe.d_ff for each, one number for all, or `d_ff`."""
    width = moe.d_ff or d_ff
    return tuple(width) if isinstance(width, list) else (width,) * moe.num_experts


def shared_width(moe: MoEConfig, d_ff: int) -> int:
    """Hidden width of all shared experts, side by side: each has moe.shared_d_ff, or the mean of the others."""
    if not moe.num_shared_experts:
        return 0
    widths = expert_widths(moe, d_ff)
    return moe.num_shared_experts * (moe.shared_d_ff or sum(widths) // len(widths))
