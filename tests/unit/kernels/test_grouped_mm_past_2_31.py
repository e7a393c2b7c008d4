"""Row * width past 2^31: three rows at the far end of buffers of which nothing else is ever touched.

On CPU the rest of the buffers is address space without memory behind it. Legend: as in test_grouped_mm_triton.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.kernels.grouped_mm.tiles import ExpertTiling, ProductBlock
from moe_dist.kernels.grouped_mm.triton_backward import run_bias, run_hidden, run_weights
from moe_dist.kernels.grouped_mm.triton_forward import run_down, run_up
from moe_dist.kernels.grouped_mm.weights import ExpertWeights
from moe_dist.kernels.permute.order import RowOrder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDE, NARROW, HERE = 2**16, 16, 3
FIRST = 2**31 // WIDE  # the first row that lies past the border
ROWS = FIRST + HERE


def few_programs(d_model: int, d_ff: int) -> ExpertTiling:
    """Large blocks for the interpreter. A GPU has no room for them."""
    most = 1024 if DEVICE == "cpu" else 64
    d, f = min(d_model, most), min(d_ff, most)
    hidden, model, weight = ProductBlock(f, d, 4, 2), ProductBlock(d, f, 4, 2), ProductBlock(d, 16, 4, 2)
    return ExpertTiling(16, f, hidden, model, hidden, model, weight, weight)


def far(width: int, scale: float = 1.0) -> Tensor:
    """[ROWS, width] with numbers in its last rows."""
    tensor = torch.empty(ROWS, width, dtype=torch.bfloat16, device=DEVICE)
    tensor[FIRST:] = scale * torch.randn(HERE, width, device=DEVICE)
    return tensor


def close(actual: Tensor, expected: Tensor) -> None:
    assert (actual.double() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize(("d_model", "d_ff"), [(NARROW, WIDE), (WIDE, NARROW)], ids=["wide d_ff", "wide d_model"])
def test_far_rows(d_model: int, d_ff: int) -> None:
    tiling, x_XD, gy_XD = few_programs(d_model, d_ff), far(d_model), far(d_model)
    gate, up, out = (
        torch.randn(1, d_ff, d_model, device=DEVICE).bfloat16() * n**-0.5 for n in (d_model, d_model, d_ff)
    )
    w = ExpertWeights(gate, up, out, up_bias=gate.new_zeros(1, d_ff))
    weights_XK = torch.empty(ROWS, 2, device=DEVICE)
    weights_XK[FIRST:] = torch.rand(HERE, 2, device=DEVICE)
    # The last three rows of x are the last three rows of the only expert; y has one row, that sums two of them.
    slots_R = torch.empty(ROWS, dtype=torch.int64, device=DEVICE)
    slots_R[FIRST:] = 2 * torch.arange(FIRST, ROWS, device=DEVICE)
    rows_XK = torch.tensor([[FIRST, ROWS - 1]], device=DEVICE)
    order = RowOrder(torch.tensor([HERE], device=DEVICE), slots_R, rows_XK, torch.ones_like(rows_XK, dtype=torch.bool))
    ends_e = torch.tensor([ROWS], device=DEVICE)
    tiles_3T = torch.tensor([[0], [FIRST], [ROWS]], device=DEVICE)

    x, gy, weight = x_XD[FIRST:].double(), gy_XD[FIRST:].double(), weights_XK[FIRST:, :1].double()
    gate_FD, up_FD, out_FD = (t[0].double() for t in (gate, up, out))
    pre_gate, pre_up = x @ gate_FD.t(), x @ up_FD.t()
    act, grad_act = F.silu(pre_gate) * pre_up, gy @ out_FD.t()

    saved = run_up(x_XD, order, tiles_3T, w, "silu", tiling)
    for actual, expected in zip(saved, (pre_gate, pre_up, act), strict=True):
        assert actual is not None
        close(actual[FIRST:], expected)
    y_XD = run_down([(saved[2], out)], None, weights_XK, order, tiles_3T, tiling)
    close(y_XD, (weight * (act @ out_FD))[[0, 2]].sum(0, keepdim=True))

    hidden = run_hidden(gy_XD, order, tiles_3T, w, weights_XK, (*saved[:2], None), "silu", tiling, (True, True))
    assert hidden.dots is not None and hidden.gate is not None
    close(hidden.dots[FIRST:], (grad_act * act).sum(1))
    grad_up = weight * grad_act * F.silu(pre_gate)
    sigmoid = pre_gate.sigmoid()
    grad_gate = weight * grad_act * pre_up * sigmoid * (1 + pre_gate * (1 - sigmoid))
    close(hidden.gate[FIRST:], grad_gate)
    grad_x = run_down([(hidden.gate, gate), (hidden.up, up)], None, None, order, tiles_3T, tiling, backward=True)
    close(grad_x, (grad_gate @ gate_FD + grad_up @ up_FD)[[0, 2]].sum(0, keepdim=True))
    grads = run_weights([hidden.gate, hidden.up], x_XD, order, ends_e, tiling, up)
    grads += run_weights([hidden.weighted], gy_XD, order, ends_e, tiling, out)
    wanted = (grad_gate.t() @ x, grad_up.t() @ x, (weight * act).t() @ gy)
    for actual, expected in zip(grads, wanted, strict=True):
        assert actual is not None
        close(actual[0], expected)
    close(run_bias(hidden.up, order, ends_e, w.up_bias)[0], grad_up.sum(0))
