"""Coordinate descent: each fast path against the papers' loop in float64, and what its scores mean for a choice."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.kernels.coordinate_descent import fused, reference, triton
from moe_dist.kernels.coordinate_descent.backend import Descent, coordinate_descent
from moe_dist.kernels.coordinate_descent.schedule import Schedule
from tests.unit.kernels.compiling import SHARED_LIMIT, SPILL_LIMIT, Kernel, resources, table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = {"fused": (fused.coordinate_descent, torch.float64), "triton": (triton.coordinate_descent, torch.float32)}
MODULE = "moe_dist.kernels.coordinate_descent.triton"


def by_hand(s: list[float], k: float, schedule: Schedule) -> tuple[list[float], float]:
    """One row in float64, number by number."""
    wide = torch.tensor(s, dtype=torch.float64)
    b = [-x for x in s]
    for eps in schedule.temperatures():
        a = eps * (float(torch.tensor(k).double().log()) - float(torch.logsumexp((wide + torch.tensor(b)) / eps, 0)))
        b = [-max(x + a, 0.0) for x in s]
    return [float(torch.tensor((x + a + y) / schedule.eps).exp()) for x, y in zip(s, b, strict=True)], a


def results(
    descend: Descent, s: Tensor, k: float | Tensor, mask: Tensor | None, schedule: Schedule | None, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Scores, threshold, and the gradient of s with something flowing into both."""
    s = s.to(dtype).requires_grad_()
    y, a = descend(s, k, mask, schedule)
    generator = torch.Generator().manual_seed(1)
    pulls = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (y, a)]
    some = torch.ones_like(a, dtype=torch.bool) if mask is None else mask.expand_as(s).any(-1, keepdim=True)
    a = a.masked_fill(~some, 0.0)  # means nothing there
    (grad,) = torch.autograd.grad((y, a), s, pulls)
    return tuple(t.detach().double() for t in (y, a, grad))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("shape", "scale"), [((5, 1), 1.0), ((3, 8), 0.1), ((4, 33), 0.35), ((2, 3, 100), 1.0), ((2, 700), 20.0)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_against_the_loop(path: str, shape: tuple[int, ...], scale: float, masked: bool) -> None:
    descend, dtype = PATHS[path]
    s = (torch.randn(shape, dtype=torch.float64, device=DEVICE) * scale).float().double()
    k: float | Tensor = 1 + torch.rand(shape[:-1], device=DEVICE) * shape[-1] / 3
    mask = None
    if masked:
        mask = torch.rand(shape, device=DEVICE) < 0.6
        mask[0] = False  # rows without a candidate
        k = max(shape[-1] / 4, 1.0)
    for schedule in (None, Schedule(iterations=3, eps=0.5, eps_init=1.0), Schedule(iterations=1)):
        expected = results(reference.coordinate_descent, s, k, mask, schedule, torch.float64)
        actual = results(descend, s, k, mask, schedule, dtype)
        # Temperatures of 0.03 multiply rounding of s + a, and of the gradient, by 33.
        tolerance = 1e-9 if dtype == torch.float64 else 2e-3 * max(scale, 1.0)
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.isfinite().all()
            size = 1.0 if dtype == torch.float64 else max(float(theirs.abs().max()), 1.0)
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * size)


def test_the_loop_itself() -> None:
    s, schedule = [0.3, -0.1, 0.25, 0.0, 0.31], Schedule(iterations=6, eps=0.1)
    y, a = by_hand(s, 2.0, schedule)
    found_y, found_a = reference.coordinate_descent(torch.tensor(s, dtype=torch.float64), 2.0, None, schedule)
    torch.testing.assert_close(found_y, torch.tensor(y, dtype=torch.float64))
    torch.testing.assert_close(found_a, torch.tensor([a], dtype=torch.float64))


def test_gradients_are_those_of_the_loop_by_finite_differences() -> None:
    s = (torch.randn(3, 9, dtype=torch.float64) * 0.3).requires_grad_()
    descend = partial(fused.coordinate_descent, k=2.5, schedule=Schedule(iterations=8, eps=0.2))
    torch.autograd.gradcheck(descend, (s,))


def cosines(rows: int, candidates: int, width: int = 512) -> Tensor:
    tokens = F.normalize(torch.randn(candidates * rows // 50, width), dim=-1)
    return (tokens @ F.normalize(torch.randn(width, 50), dim=0)).t().reshape(rows, candidates)


def test_scores_of_cosines_sum_to_k() -> None:
    for candidates, k, tolerance in ((512, 16, 1e-2), (896, 32, 1e-2), (128, 32, 1e-2 * 32)):
        y, _ = coordinate_descent("torch")(cosines(2000, candidates), float(k), None, None)
        assert float((y.sum(-1) - k).abs().max()) < tolerance


def test_the_highest_scores_are_the_highest_cosines() -> None:
    s, k = cosines(10_000, 128), 32
    y, _ = coordinate_descent("torch")(s, float(k), None, None)
    chosen, best = (torch.zeros_like(s, dtype=torch.bool).scatter(1, t.topk(k).indices, True) for t in (y, s))
    assert float((chosen == best).all(-1).float().mean()) >= 0.99


def test_more_than_k_full_scores_for_scores_as_large_as_dot_products() -> None:
    """Why routers divide by lengths: at a spread of 22 (dot products of 512 numbers) the threshold cannot get there."""
    y, _ = coordinate_descent("torch")(torch.randn(1000, 128) * 22, 32.0, None, None)
    assert float(((y >= 1).sum(-1) > 32).float().mean()) > 0.9


def test_mistakes() -> None:
    for settings in (dict(iterations=0), dict(eps=0.0), dict(eps=5.0), dict(decay=1.5)):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Schedule(**settings)
    with pytest.raises(ValueError, match="takes up to"):
        triton.coordinate_descent(torch.zeros(1, triton.MAX_CANDIDATES + 1, device=DEVICE), 1.0)
    with pytest.raises(ValueError, match="float64"):
        triton.coordinate_descent(torch.zeros(1, 4, device=DEVICE).double(), 1.0)
    assert coordinate_descent("triton") is triton.coordinate_descent


def compiled(candidates: int) -> list[Kernel]:
    padded, warps = triton.descent_tile(candidates)
    sizes = {"STEPS": 20, "N_PAD": padded}
    inputs = {f"{name}_ptr": "*fp32:16" for name in ("s", "log_k", "eps")}
    outputs = {"y_ptr": "*fp32:16", "a_ptr": "*fp32:16", "candidates": "i32"}
    grads = {f"{name}_ptr": "*fp32:16" for name in ("a", "grad_y", "grad_a", "grad_s")} | {"candidates": "i32"}
    return [
        Kernel(f"{MODULE}:_forward", inputs | outputs, sizes, warps, label=f"descent forward N={candidates}"),
        Kernel(f"{MODULE}:_backward", inputs | grads, sizes, warps, label=f"descent backward N={candidates}"),
    ]


@pytest.mark.timeout(120)
def test_compiles_for_sm_90_without_spills() -> None:
    found = resources([kernel for size in (100, 1024, triton.MAX_CANDIDATES) for kernel in compiled(size)])
    print("\n" + table(found))
    assert [entry for entry in found if entry.spill_bytes > SPILL_LIMIT] == []
    assert max(entry.shared_bytes for entry in found) <= SHARED_LIMIT
