"""The experts on CPU against one row after the other in float64: outputs and all gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dist.kernels.activation import NAMES, gated
from moe_dist.kernels.grouped_mm import cpu, onednn
from moe_dist.kernels.grouped_mm.onednn import Products
from moe_dist.kernels.grouped_mm.weights import ExpertWeights
from moe_dist.kernels.permute.order import RowOrder

D, HIDDEN = 5, 3
# The expert of each row of x, in [rows, K]; -1 is dropped.
CHOICES = {
    "top-1": [[2], [0], [2], [1], [0], [2], [2]],
    "top-1, dropped": [[2], [-1], [0], [-1], [2], [2]],
    "top-2": [[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]],
    "top-2, dropped, first row too": [[-1, -1], [1, -1], [-1, 0], [0, 2], [1, 0], [-1, -1]],
    "empty experts": [[1, 3], [3, 1], [1, 3]],
    "all on one": [[1]] * 19,
    "whole blocks": [[0]] * 16 + [[1]] * 32,
    "all dropped": [[-1, -1]] * 4,
    "no rows": [],
}
every_choice = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
ACTIVATIONS = {
    "swiglu": lambda gate, up: gate * gate.sigmoid() * up,
    "geglu": lambda gate, up: gate * 0.5 * (1 + torch.erf(gate / 2**0.5)) * up,
    "gelu": lambda gate, up: up * 0.5 * (1 + torch.erf(up / 2**0.5)),
    "gelu_tanh": lambda gate, up: up * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (up + 0.044715 * up**3))),
    "relu": lambda gate, up: up * (up > 0),
    "relu2": lambda gate, up: (up * (up > 0)) ** 2,
    "clamped_swiglu": lambda gate, up: (
        gate.clamp(max=7) * (1.702 * gate.clamp(max=7)).sigmoid() * (up.clamp(-7, 7) + 1)
    ),
}


def order_of(choice: list[list[int]], experts: int) -> RowOrder:
    experts_XK = torch.tensor(choice).view(len(choice), -1) if choice else torch.zeros(0, 2, dtype=torch.int64)
    return RowOrder.of(experts_XK, experts_XK >= 0, experts)


def inputs(
    order: RowOrder,
    activation: str,
    bias: bool = False,
    weighted: bool = True,
    widths: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor | None]:
    """x, weights, then the fields of ExpertWeights."""
    experts, (rows, top_k) = len(order.rows_per_expert), order.kept_XK.shape
    hidden = (experts, HIDDEN) if widths is None else (sum(widths),)
    gate, gate_bias = gated(activation), gated(activation) and bias
    shapes = [(*hidden, D) if gate else None, (*hidden, D), (*hidden, D)]
    shapes += [hidden if gate_bias else None, hidden if bias else None, (experts, D) if bias else None]
    made = [torch.randn(rows, D), torch.rand(rows, top_k) if weighted else None]
    made += [None if shape is None else torch.randn(shape) for shape in shapes]
    wide = [index == 1 and dtype in (torch.bfloat16, torch.float16) for index in range(len(made))]
    return [
        None if part is None else part.to(torch.float32 if keep else dtype).requires_grad_()
        for part, keep in zip(made, wide, strict=True)
    ]


def run(
    order: RowOrder,
    activation: str,
    args: list[Tensor | None],
    widths: tuple[int, ...] | None = None,
    products: Products = onednn.CHOICES[0],
) -> Tensor:
    return cpu.feed_forward(args[0], args[1], order, ExpertWeights(*args[2:]), activation, widths, products)


def plain(order: RowOrder, activation: str, args: list[Tensor | None], widths: tuple[int, ...] | None = None) -> Tensor:
    """One assignment after the other, with the formulas written out; the experts' rows are counted again."""
    x_XD, weights_XK, gate, up, out, gate_bias, up_bias, out_bias = args
    ends = order.counts_e.cumsum(0)

    def of(part: Tensor, e: int) -> Tensor:
        return part[e] if widths is None else part.split(widths)[e]

    rows = []
    for x in range(order.kept_XK.shape[0]):
        total = x_XD[x] * 0.0
        for k in range(order.kept_XK.shape[1]):
            if not order.kept_XK[x, k]:
                continue
            e = int((order.rows_XK[x, k] >= ends).sum())
            g = None if gate is None else of(gate, e) @ x_XD[x] + (0 if gate_bias is None else of(gate_bias, e))
            u = of(up, e) @ x_XD[x] + (0 if up_bias is None else of(up_bias, e))
            y = ACTIVATIONS[activation](g, u) @ of(out, e) + (0 if out_bias is None else out_bias[e])
            total = total + (y if weights_XK is None else weights_XK[x, k] * y)
        rows.append(total)
    return torch.stack(rows) if rows else x_XD * 0.0


def all_of(y: Tensor, args: list[Tensor | None], grad: Tensor) -> list[Tensor]:
    """The output and the gradient of every argument; what played no part has gradient zero."""
    given = [arg for arg in args if arg is not None]
    found = torch.autograd.grad(y, given, grad, allow_unused=True)
    return [y.detach()] + [torch.zeros_like(a) if g is None else g for a, g in zip(given, found, strict=True)]


def compare(
    order: RowOrder,
    activation: str,
    args: list[Tensor | None],
    widths: tuple[int, ...] | None = None,
    products: Products = onednn.CHOICES[0],
) -> None:
    y = run(order, activation, args, widths, products)
    grad = torch.randn_like(y)
    wide = [None if arg is None else arg.detach().double().requires_grad_() for arg in args]
    wanted = all_of(plain(order, activation, wide, widths), wide, grad.double())
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}[y.dtype]
    for ours, theirs in zip(all_of(y, args, grad), wanted, strict=True):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
    given = [arg for arg in args if arg is not None]
    assert [g.dtype for g in torch.autograd.grad(run(order, activation, args, widths), given, grad)] == [
        arg.dtype for arg in given
    ]


@every_choice
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", NAMES)
def test_is_the_loop_over_rows(choice: list[list[int]], activation: str, bias: bool) -> None:
    order = order_of(choice, 4)
    compare(order, activation, inputs(order, activation, bias))


@every_choice
@pytest.mark.parametrize("activation", ["geglu", "relu2"])
def test_experts_of_different_widths(choice: list[list[int]], activation: str) -> None:
    order, widths = order_of(choice, 4), (3, 1, 4, 2)
    compare(order, activation, inputs(order, activation, True, widths=widths), widths)


@every_choice
@pytest.mark.parametrize("bias", [False, True])
def test_without_weights(choice: list[list[int]], bias: bool) -> None:
    order = order_of(choice, 4)
    compare(order, "swiglu", inputs(order, "swiglu", bias, weighted=False))


@every_choice
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(choice: list[list[int]], dtype: torch.dtype) -> None:
    """Also the blocks of zero rows, which only low precision has. Weights stay in fp32."""
    order = order_of(choice, 4)
    for weighted in (True, False):
        compare(order, "swiglu", inputs(order, "swiglu", True, weighted, dtype=dtype))
    compare(order, "relu", inputs(order, "relu", dtype=dtype))


def test_low_precision_in_larger_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which oneDNN takes over, several blocks per expert, experts of uneven load."""
    monkeypatch.setitem(globals(), "D", 48)
    monkeypatch.setitem(globals(), "HIDDEN", 64)
    generator = torch.Generator().manual_seed(0)
    experts_XK = torch.rand(150, 5, generator=generator).argsort(1)[:, :2].square() // 4
    order = RowOrder.of(experts_XK, torch.rand(150, 2, generator=generator) < 0.8, 5)
    for dtype in (torch.bfloat16, torch.float32):
        compare(order, "swiglu", inputs(order, "swiglu", dtype=dtype))


class _Calls(TorchDispatchMode):
    """Counts products: of oneDNN's operator, and of torch.mm, which is MKL's."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in ("_linear_pointwise", "mm", "addmm", "addmm_"):
            self.names.append("onednn" if name == "_linear_pointwise" else "mkl")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("products", onednn.CHOICES)
def test_who_computes_products(products: Products, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are the same but for rounding. Of one expert's seven products forward and backward, beside three for
    its weights' gradients, three go into hidden units and three out of them; one of those adds."""
    monkeypatch.setitem(globals(), "D", 48)
    monkeypatch.setitem(globals(), "HIDDEN", 64)
    order = order_of([[0]] * 40, 1)
    for activation in ("swiglu", "relu"):
        for bias in (True, False):
            compare(order, activation, inputs(order, activation, bias, dtype=torch.float32), products=products)
    args = inputs(order, "swiglu", dtype=torch.float32)
    with _Calls() as calls:
        run(order, "swiglu", args, products=products).sum().backward()
    by_onednn = {"onednn": 6, "mixed": 3, "mkl": 0}[products]
    assert [calls.names.count(name) for name in ("onednn", "mkl")] == [by_onednn, 9 - by_onednn]


@pytest.mark.parametrize("products", onednn.CHOICES)
def test_a_row_does_not_hang_on_the_others(products: Products, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, whether its expert has 1 or 300 of them."""
    monkeypatch.setitem(globals(), "D", 48)
    monkeypatch.setitem(globals(), "HIDDEN", 64)
    args = inputs(order_of([[0]] * 300, 1), "swiglu", weighted=False, dtype=torch.float32)
    everything = run(order_of([[0]] * 300, 1), "swiglu", args, products=products)
    for count in (1, 7, 33, 150):
        few = run(order_of([[0]] * count, 1), "swiglu", [args[0][:count], *args[1:]], products=products)
        assert torch.equal(few, everything[:count]), count


def test_a_row_does_not_hang_on_neighbouring_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, whether its expert shares a lot with others, which lie behind it, or is alone."""
    monkeypatch.setitem(globals(), "D", 48)
    monkeypatch.setitem(globals(), "HIDDEN", 64)
    counts = [5, 1, 0, 29, 40, 3, 3, 0]  # lots of experts 0, 1 and 3; of 4; of 5 and 6
    choice = [[expert] for expert, count in enumerate(counts) for _ in range(count)]
    args = inputs(order_of(choice, 8), "swiglu", weighted=False, dtype=torch.float32)
    together = all_of(run(order_of(choice, 8), "swiglu", args), args, torch.ones_like(args[0]))
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        rows = slice(sum(counts[:expert]), sum(counts[: expert + 1]))
        own = [None if arg is None else arg.detach()[rows if i == 0 else slice(None)] for i, arg in enumerate(args)]
        leaves = [None if arg is None else arg.requires_grad_() for arg in own]
        alone = all_of(run(order_of([[expert]] * count, 8), "swiglu", leaves), leaves, torch.ones_like(leaves[0]))
        assert torch.equal(together[0][rows], alone[0]), expert
        assert torch.equal(together[1][rows], alone[1]), expert
        for of_all, of_one in zip(together[2:], alone[2:], strict=True):  # sums over rows, with or without zeros
            torch.testing.assert_close(of_all[expert], of_one[expert])


def test_products_are_named() -> None:
    assert onednn.named("auto") == onednn.CHOICES[0]
    with pytest.raises(ValueError, match=r"cpu_products=measured: this torch has .*mkl; `measured` is what `moe-dist"):
        onednn.named("measured")


def test_buffers_come_uninitialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled with NaN, nothing of it may be left: not in zero rows, not in the gradients of idle experts."""
    order = order_of(CHOICES["empty experts"], 4)
    empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kind: empty(*args, **kind).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *args: empty_like(*args).fill_(torch.nan))
    for dtype in (torch.float64, torch.bfloat16):
        args = inputs(order, "swiglu", True, dtype=dtype)
        y = run(order, "swiglu", args)
        grads = torch.autograd.grad(y.sum(), args)
        assert all(tensor.isfinite().all() for tensor in (y, *grads))
        assert all((grad[[0, 2]] == 0).all() for grad in grads[2:])


def test_same_bits_every_run() -> None:
    order = order_of(CHOICES["top-2, dropped, first row too"], 4)
    args = inputs(order, "geglu", True, dtype=torch.bfloat16)
    grad = torch.randn_like(args[0])
    first, second = (all_of(run(order, "geglu", args), args, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_backward_twice() -> None:
    order = order_of(CHOICES["top-2"], 4)
    args = inputs(order, "swiglu")
    y = run(order, "swiglu", args)
    given = [arg for arg in args if arg is not None]
    first, second = (torch.autograd.grad(y.sum(), given, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("activation", NAMES)
def test_gradcheck(activation: str) -> None:
    order = order_of(CHOICES["top-2, dropped, first row too"], 4)
    args = inputs(order, activation, True)
    given = [index for index, arg in enumerate(args) if arg is not None]

    def function(*tensors: Tensor) -> Tensor:
        parts: list[Tensor | None] = [None] * len(args)
        for index, tensor in zip(given, tensors, strict=True):
            parts[index] = tensor
        return run(order, activation, parts)

    assert torch.autograd.gradcheck(function, [args[index] for index in given])


def test_strided_input_and_gradient() -> None:
    order = order_of(CHOICES["top-2"], 4)
    args = inputs(order, "relu")
    grad = torch.randn(D, 5, dtype=torch.float64).t()
    wanted = all_of(plain(order, "relu", args), args, grad)
    args[0] = args[0].detach().t().contiguous().t().requires_grad_()
    for ours, theirs in zip(all_of(run(order, "relu", args), args, grad), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_identity_experts_return_the_sum_of_weights_times_x() -> None:
    """E(x) = relu(x) relu(1) with unit weights: x itself where x >= 0, so y = (w0 + w1) x and nothing squared."""
    eye = torch.eye(D, dtype=torch.float64)[None].repeat(3, 1, 1)
    order = order_of([[0, 1], [1, 2], [2, 0]], 3)
    x_XD, weights_XK = torch.rand(3, D, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)
    y_XD = cpu.feed_forward(x_XD, weights_XK, order, ExpertWeights(None, eye, eye), "relu")
    torch.testing.assert_close(y_XD, weights_XK.sum(1, keepdim=True) * x_XD)


def test_gate_must_fit_the_activation() -> None:
    order = order_of([[0]], 1)
    args = inputs(order, "relu")
    with pytest.raises(AssertionError, match="swiglu: gate missing"):
        run(order, "swiglu", args)


def test_formulas_are_torch_s() -> None:
    gate, up = torch.randn(2, 7, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS["swiglu"](gate, up), F.silu(gate) * up)
    torch.testing.assert_close(ACTIVATIONS["geglu"](gate, up), F.gelu(gate) * up)
