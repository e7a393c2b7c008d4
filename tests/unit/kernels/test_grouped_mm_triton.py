"""The Triton experts against plain products in float64: output and all gradients. On CPU in Triton's interpreter.

Legend: X rows of x, K assignments of each, R rows sorted by expert, e experts, D d_model, F expert hidden.
"""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dist.kernels.grouped_mm.tiles import ExpertTiling, ProductBlock, choose_expert_tiling, tile_table
from moe_dist.kernels.grouped_mm.triton import feed_forward
from moe_dist.kernels.grouped_mm.weights import ExpertWeights
from moe_dist.kernels.permute.order import RowOrder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, HIDDEN = 40, 24  # multiples of no block
GATED = ("swiglu", "geglu", "clamped_swiglu")


class Case(NamedTuple):
    x_XD: Tensor
    weights_XK: Tensor | None
    w: ExpertWeights
    order: RowOrder
    experts_XK: Tensor
    grad_XD: Tensor

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x_XD, self.weights_XK, *self.w) if t is not None]

    def names(self) -> list[str]:
        named = zip(("x", "weights", *ExpertWeights._fields), (*self[:2], *self.w), strict=True)
        return [name for name, tensor in named if tensor is not None]


def a_case(
    experts_XK: Tensor,
    num_experts: int,
    activation: str = "swiglu",
    dtype: torch.dtype = torch.float32,
    biases: bool = False,
    weighted: bool = True,
    kept_XK: Tensor | None = None,
) -> Case:
    """Random tensors for assignments to these experts."""

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device=DEVICE)).to(dtype).requires_grad_()

    experts_XK = experts_XK.to(DEVICE)
    kept_XK = torch.ones_like(experts_XK, dtype=torch.bool) if kept_XK is None else kept_XK.to(DEVICE)
    gate = random(num_experts, HIDDEN, WIDTH, scale=WIDTH**-0.5) if activation in GATED else None
    up = random(num_experts, HIDDEN, WIDTH, scale=WIDTH**-0.5)
    out = random(num_experts, HIDDEN, WIDTH, scale=HIDDEN**-0.5)
    bias: list[Tensor | None] = [None, None, None]
    if biases:
        shapes = (HIDDEN, HIDDEN, WIDTH)
        bias = [random(num_experts, n) if i or gate is not None else None for i, n in enumerate(shapes)]
    weights_XK = torch.rand(experts_XK.shape, device=DEVICE).requires_grad_() if weighted else None
    num_x = experts_XK.shape[0]
    return Case(
        random(num_x, WIDTH),
        weights_XK,
        ExpertWeights(gate, up, out, *bias),
        RowOrder.of(experts_XK, kept_XK, num_experts),
        experts_XK,
        random(num_x, WIDTH).detach(),
    )


def expert(x_RD: Tensor, w: list[Tensor | None], activation: str) -> Tensor:
    gate, up, out, gate_bias, up_bias, out_bias = w
    plus = lambda y, bias: y if bias is None else y + bias  # noqa: E731
    up_RF = plus(x_RD @ up.t(), up_bias)
    if activation == "clamped_swiglu":
        gate_RF = plus(x_RD @ gate.t(), gate_bias).clamp(max=7)
        up_RF = (up_RF.clamp(-7, 7) + 1) * gate_RF * (1.702 * gate_RF).sigmoid()
    elif activation in GATED:
        gate_RF = plus(x_RD @ gate.t(), gate_bias)
        up_RF = up_RF * (F.silu(gate_RF) if activation == "swiglu" else F.gelu(gate_RF))
    else:
        bend = {"gelu": F.gelu, "relu": F.relu, "relu2": lambda x: F.relu(x) ** 2}
        up_RF = (bend | {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh")})[activation](up_RF)
    return plus(up_RF @ out, out_bias)


def plain(case: Case, activation: str) -> tuple[Tensor, ...]:
    """Output and gradients of all leaves in float64: every expert on every row of x, and a mask."""
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (case.x_XD, case.weights_XK, *case.w)]
    x_XD, weights_XK, *w = wide
    y_XD = 0 * x_XD
    for e in range(w[1].shape[0]):
        each_XK = ((case.experts_XK == e) & case.order.kept_XK).double()
        if weights_XK is not None:
            each_XK = each_XK * weights_XK
        y_XD = y_XD + each_XK.sum(1, keepdim=True) * expert(x_XD, [None if t is None else t[e] for t in w], activation)
    leaves = [t for t in wide if t is not None]
    return y_XD, *torch.autograd.grad(y_XD, leaves, case.grad_XD.double())


def ours(case: Case, activation: str, **options: object) -> tuple[Tensor, ...]:
    options.setdefault("tiling", small())
    y_XD = feed_forward(case.x_XD, case.weights_XK, case.order, case.w, activation, **options)
    return y_XD, *torch.autograd.grad(y_XD, case.leaves(), case.grad_XD)


def small() -> ExpertTiling:
    """Several tiles and blocks also in small matrices, several pieces of every sum."""
    block, wide = ProductBlock(16, 16, 4, 2, halves=True), ProductBlock(32, 16, 4, 2)
    return ExpertTiling(16, 16, up=block, down=wide, hidden_grad=block, input_grad=wide, up_grad=wide, out_grad=block)


def check(case: Case, activation: str, tolerance: float = 1e-5, **options: object) -> tuple[Tensor, ...]:
    actual, expected = ours(case, activation, **options), plain(case, activation)
    for name, mine, theirs in zip(["y", *case.names()], actual, expected, strict=True):
        assert mine.dtype == (torch.float32 if name == "weights" else case.x_XD.dtype), name
        assert mine.shape == theirs.shape, name
        if mine.numel():
            error = (mine.double() - theirs).abs().max().item()
            assert error <= tolerance * theirs.abs().max().item(), (name, error)
    return actual


def random_experts(num_x: int, top_k: int, num_experts: int) -> Tensor:
    return torch.rand(num_x, num_experts).argsort(-1)[:, :top_k]


@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu", "relu2", "clamped_swiglu", "gelu_tanh"])
def test_activations(activation: str, biases: bool) -> None:
    kept_XK = torch.rand(35, 2) < 0.8
    case = a_case(random_experts(35, 2, 3), 3, activation, biases=biases, kept_XK=kept_XK)
    if activation == "clamped_swiglu":
        case.x_XD.detach().mul_(8)  # so that some are beyond where they are clamped
    check(case, activation)


ROUTES = {
    "one row": (torch.tensor([[1]]), 3),
    "67 rows": (torch.arange(67)[:, None] % 3, 3),
    "all on one": (torch.full((35, 1), 2), 4),
    "empty experts": (torch.tensor([[1], [3]]).repeat(10, 1), 5),
    "top 3": (torch.rand(11, 4).argsort(-1)[:, :3], 4),
    "a single expert": (torch.zeros(16, 1, dtype=torch.int64), 1),
    "no rows": (torch.zeros(0, 2, dtype=torch.int64), 2),
}
every_route = pytest.mark.parametrize("route", ROUTES)


@every_route
@pytest.mark.parametrize("weighted", [False, True], ids=["no weights", "weights"])
def test_routes(route: str, weighted: bool) -> None:
    check(a_case(*ROUTES[route], weighted=weighted, biases=True), "swiglu")


@pytest.mark.parametrize("top_k", [1, 2])
def test_everything_dropped(top_k: int) -> None:
    kept_XK = torch.zeros(5, top_k, dtype=torch.bool)
    case = a_case(random_experts(5, top_k, 3), 3, biases=True, kept_XK=kept_XK)
    assert all((tensor == 0).all() for tensor in ours(case, "swiglu"))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, top_k: int) -> None:
    kept_XK = torch.rand(40, top_k) < 0.9
    check(a_case(random_experts(40, top_k, 3), 3, "swiglu", dtype, biases=True, kept_XK=kept_XK), "swiglu", 2e-2)


SHIPPED = {  # chosen for these matrices, and chosen for large ones: most of a block is then outside
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "bf16, large": (torch.bfloat16, choose_expert_tiling(torch.bfloat16, 10**6, 2, 2048, 1024)),
    "bf16, large and short": (torch.bfloat16, choose_expert_tiling(torch.bfloat16, 64, 2, 2048, 1024)),
}


@pytest.mark.parametrize("shipped", SHIPPED)
def test_tilings_that_ship(shipped: str) -> None:
    dtype, tiling = SHIPPED[shipped]
    case = a_case(random_experts(150, 1, 2), 2, "geglu", dtype, biases=True)
    check(case, "geglu", 2e-2 if dtype == torch.bfloat16 else 1e-5, tiling=tiling)


def test_tiling_follows_the_shape() -> None:
    large = choose_expert_tiling(torch.bfloat16, 10**6, 8, 4096, 14336)
    assert (large.rows, large.up.n, large.down.n) == (128, 128, 256)
    assert choose_expert_tiling(torch.bfloat16, 64 * 8, 8, 4096, 14336).rows == 64
    assert choose_expert_tiling(torch.bfloat16, 10**6, 8, 4097, 14336).up.k == 32
    narrow = choose_expert_tiling(torch.bfloat16, 10**6, 8, 32, 48)
    assert (narrow.up, narrow.down.n, narrow.grad_rows) == (replace(large.up, n=64, k=32), 32, 64)


@pytest.mark.parametrize("weighted", [False, True], ids=["no weights", "weights"])
@pytest.mark.parametrize(("activation", "dtype"), [("geglu", torch.float32), ("relu2", torch.bfloat16)])
def test_keeping_the_activation_changes_nothing(activation: str, dtype: torch.dtype, weighted: bool) -> None:
    case = a_case(random_experts(35, 2, 3), 3, activation, dtype, weighted=weighted)
    kept = check(case, activation, 2e-2 if dtype == torch.bfloat16 else 1e-5, keep_activation=True)
    if DEVICE == "cpu":  # a compiler may contract the two ways differently
        assert all(torch.equal(mine, again) for mine, again in zip(kept, ours(case, activation), strict=True))


def test_the_same_bits_twice() -> None:
    case = a_case(random_experts(67, 2, 3), 3, biases=True)
    assert all(
        torch.equal(first, second) for first, second in zip(ours(case, "swiglu"), ours(case, "swiglu"), strict=True)
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("top_k", [1, 2])
def test_no_uninitialised_memory_is_left(top_k: int) -> None:
    """Buffers come uninitialised: filled with NaN, nothing of it may be left, and idle experts get exact zeros."""
    kept_XK = torch.rand(20, top_k) < 0.7
    case = a_case(2 * random_experts(20, top_k, 3), 6, biases=True, kept_XK=kept_XK)
    # Room for rows that did not come: slots that must not be looked at.
    nowhere = torch.full((37,), 2**40, device=DEVICE)
    case = case._replace(order=replace(case.order, slots_R=torch.cat([case.order.slots_R, nowhere])))
    check(case, "swiglu")
    grads = dict(zip(case.names(), ours(case, "swiglu")[1:], strict=True))
    assert all((grads[name][1::2] == 0).all() for name in ExpertWeights._fields)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_infinite_rows_stay_with_their_expert() -> None:
    case = a_case(torch.arange(20)[:, None] % 2, 2)
    with torch.no_grad():
        case.x_XD[0] = torch.inf
    y_XD, grad_x, _, *grads = ours(case, "swiglu")
    assert not y_XD[0].isfinite().all() and y_XD[1:].isfinite().all() and grad_x[1::2].isfinite().all()
    assert all(grad[1].isfinite().all() for grad in grads)


@pytest.mark.parametrize("wanted", ["x", "weights", "gate", "up", "out", "gate_bias", "up_bias", "out_bias"])
def test_only_one_gradient_is_wanted(wanted: str) -> None:
    case = a_case(random_experts(20, 2, 3), 3, biases=True)
    expected = dict(zip(case.names(), ours(case, "swiglu")[1:], strict=True))[wanted]
    for name, leaf in zip(case.names(), case.leaves(), strict=True):
        leaf.requires_grad_(name == wanted)
    y_XD = feed_forward(case.x_XD, case.weights_XK, case.order, case.w, "swiglu", tiling=small())
    (leaf,) = (leaf for leaf in case.leaves() if leaf.requires_grad)
    found = torch.autograd.grad(y_XD, leaf, case.grad_XD)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # other blocks, so other last digits


def test_tensors_may_come_strided() -> None:
    case = a_case(random_experts(20, 2, 3), 3)
    expected = ours(case, "swiglu")
    strided = [leaf.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for leaf in case.leaves()]
    x_XD, weights_XK, *w = strided
    case = case._replace(
        x_XD=x_XD, weights_XK=weights_XK, w=ExpertWeights(*w), grad_XD=case.grad_XD.t().contiguous().t()
    )
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours(case, "swiglu"), expected, strict=True))


class _Waits(TorchDispatchMode):
    """Refuses what reads a number from the device, or makes a shape of one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert not any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"))
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_nothing() -> None:
    case = a_case(random_experts(20, 2, 3), 3, biases=True)
    with _Waits():
        ours(case, "swiglu")
        with pytest.raises(AssertionError):
            case.order.counts_e.sum().item()


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("counts", [(3, 0, 9, 4), (0, 0), (16,), (0, 1, 1, 0, 33)])
def test_tile_table(counts: tuple[int, ...], block: int) -> None:
    expected, start = [], 0
    for expert, count in enumerate(counts):
        expected += [[expert, start + first, start + count] for first in range(0, count, block)]
        start += count
    table_3T = tile_table(torch.tensor(counts), sum(counts), block)
    assert table_3T.dtype == torch.int64
    assert table_3T[:, : len(expected)].t().tolist() == expected
    assert (table_3T[1, len(expected) :] >= table_3T[2, len(expected) :]).all()


@pytest.mark.parametrize(
    ("activation", "dtype", "message"),
    [
        ("tanh", torch.float32, "unknown activation 'tanh': choose one of swiglu, geglu, gelu, relu, relu2"),
        ("gelu", torch.float32, "'gelu' with a gate: swiglu, geglu, clamped_swiglu need one"),
        ("swiglu", torch.float64, "not torch.float64: use experts=grouped_mm"),
    ],
)
def test_refusals(activation: str, dtype: torch.dtype, message: str) -> None:
    case = a_case(random_experts(4, 1, 2), 2, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        ours(case, activation)


def test_mixed_dtypes_are_refused() -> None:
    case = a_case(random_experts(4, 1, 2), 2)
    with pytest.raises(ValueError, match=r"x is torch.bfloat16, weights \{torch.float32\}"):
        feed_forward(case.x_XD.bfloat16(), None, case.order, case.w, "swiglu")


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    case = a_case(random_experts(4, 1, 2), 2)
    case = case._replace(x_XD=case.x_XD.cpu())
    monkeypatch.setattr("moe_dist.kernels.grouped_mm.triton.INTERPRETED", tl.constexpr(False))
    with pytest.raises(ValueError, match="needs a GPU, tensors are on cpu: use experts=grouped_mm"):
        ours(case, "swiglu")
