"""The norms of queries and keys against torch's own, with and without autocast."""

import pytest
import torch
from torch import nn

from moe_dist.standalone.multi_query.norms import Norm

NAMES = ["layernorm", "low_precision_layernorm", "rmsnorm", "low_precision_rmsnorm"]


def pair(name: str, width: int = 24) -> tuple[Norm, nn.Module]:
    other: nn.Module = nn.LayerNorm(width) if name.endswith("layernorm") else nn.RMSNorm(width, eps=1e-5)
    norm = Norm(width, name)
    assert norm.state_dict().keys() == other.state_dict().keys()
    with torch.no_grad():
        for param in norm.parameters():
            param.normal_()
    other.load_state_dict(norm.state_dict())
    return norm, other


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_is_torchs_norm(name: str, dtype: torch.dtype) -> None:
    norm, other = (module.to(dtype) for module in pair(name))
    x = (torch.randn(3, 5, 24, dtype=dtype) * 3 + 1).requires_grad_()
    y, expected = norm(x), other(x)
    assert y.dtype == dtype and y.equal(expected)
    weight = torch.randn_like(y)
    found, wanted = (
        torch.autograd.grad((out * weight).sum(), [x, *module.parameters()])
        for out, module in ((y, norm), (expected, other))
    )
    assert all(a.equal(b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_low_precision_computes_in_the_autocast_dtype(name: str) -> None:
    norm, other = pair(name)
    for x in (torch.randn(3, 24), torch.randn(3, 24).bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            y = norm(x)
        if name.startswith("low_precision"):
            assert y.dtype == torch.bfloat16 and y.equal(other.bfloat16()(x.bfloat16()))
        else:
            assert y.dtype == torch.float32 and y.equal(other.float()(x.float()))
        other.load_state_dict(norm.state_dict())
