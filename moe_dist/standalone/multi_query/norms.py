"""The norms of queries and keys, over what may be cut over tp.

Legend: C normalised width, c = C / tp.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.parallel.collectives import copy_to_group, own_slice
from moe_dist.parallel.mesh import Group
from moe_dist.parallel.norm import norm_over_group

NormType = Literal["layernorm", "low_precision_layernorm", "rmsnorm", "low_precision_rmsnorm"]
_EPS = 1e-5


class Norm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias (arXiv 1607.06450), or x / sqrt(mean(x^2) + eps) * weight (arXiv
    1910.07467), over the last dim; eps is 1e-5.

    low_precision: under autocast, in and out are of the autocast dtype; otherwise the wider one of x and the weight.
    cut: x is this tp rank's slice [..., c]; the statistics are those of all C. Weight and bias are whole on every rank,
    and their gradients are summed over tp.
    """

    def __init__(
        self, width: int, norm_type: str, device: torch.device | None = None, tp: Group | None = None, cut: bool = False
    ) -> None:
        super().__init__()
        assert norm_type in get_args(NormType)
        self.width = width
        self.tp = tp or Group()
        self.cut = cut and tp is not None and tp.size > 1
        self.low_precision = norm_type.startswith("low_precision")
        self.centred = norm_type.endswith("layernorm")
        self.weight = nn.Parameter(torch.ones(width, device=device))
        self.bias = nn.Parameter(torch.zeros(width, device=device)) if self.centred else None

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]; [..., c] -> [..., c] where cut."""
        kind = x.device.type
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        if self.low_precision and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        weight = self._own(self.weight).to(dtype)
        bias = None if self.bias is None else self._own(self.bias).to(dtype)
        with torch.autocast(kind, enabled=False):
            if self.cut:
                return norm_over_group(x.to(dtype), weight, bias, _EPS, self.tp)
            if self.centred:
                return F.layer_norm(x.to(dtype), (self.width,), weight, bias, _EPS)
            return F.rms_norm(x.to(dtype), (self.width,), weight, _EPS)

    def extra_repr(self) -> str:
        name = "layernorm" if self.centred else "rmsnorm"
        return f"{self.width}, {'low_precision_' if self.low_precision else ''}{name}"

    def _own(self, param: Tensor) -> Tensor:
        param = copy_to_group(param, self.tp)
        return own_slice(param, self.tp) if self.cut else param
