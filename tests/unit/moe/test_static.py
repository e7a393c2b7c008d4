"""Blocks of fixed size under a limit: without looking at numbers a layer does what it does where it looks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import moe_dist.moe.capacity
import moe_dist.moe.dispatch.all_to_all
import moe_dist.moe.dispatch.base
from moe_dist.config.model import MoEConfig
from moe_dist.moe.drops import marks
from moe_dist.moe.layer import MoE
from moe_dist.parallel.mesh import Group, Mesh, create_mesh, single_process_mesh
from moe_dist.step import StepContext
from tests.unit.helpers import context

T, D, E = 37, 8, 6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of Triton kernels
STATIC = MoEConfig(num_experts=E, top_k=2, d_ff=12, capacity_factor=0.7, dispatch="all_to_all", wire="padded")
AT_HOME = replace(STATIC, dispatch="local", wire="ragged")


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and layers treat this CPU as a device for whose numbers the host would have to wait."""

    def close_eyes() -> None:
        for module in (moe_dist.moe.capacity, moe_dist.moe.dispatch.all_to_all, moe_dist.moe.dispatch.base):
            monkeypatch.setattr(module, "readable", lambda x: False)

    return close_eyes


def layer_of(moe: MoEConfig, dtype: torch.dtype = torch.float64, kernels: str = "torch") -> MoE:
    layer = MoE(moe, D, 12, "swiglu", layer=0, mesh=single_process_mesh(), kernels=kernels).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.5
    return layer


def marked(x_TD: Tensor) -> StepContext:
    """As in a run, with tokens of classes 0, 1, 2, ..., 7, 0, ..."""
    ids_T = torch.arange(len(x_TD), device=x_TD.device)
    return replace(context(), marks_XT=marks(ids_T, Group(), 16, ids_T % 8))


def found_by(layer: Callable[..., Any], parameters: list[Tensor], x_TD: Tensor) -> list[Tensor]:
    """Output, losses, what was kept, and all gradients."""
    x_TD = x_TD.clone().requires_grad_()
    y_TD, stats = layer(x_TD, marked(x_TD))
    loss = (y_TD * torch.linspace(-1, 1, y_TD.numel(), dtype=y_TD.dtype).view_as(y_TD)).sum() + stats.aux_loss
    gradients = torch.autograd.grad(loss, [x_TD, *parameters])
    return [y_TD.detach(), stats.aux_loss.detach(), stats.kept_E.to(y_TD), *gradients]


CASES = {
    "top-2": STATIC,
    "top-1": replace(STATIC, top_k=1),
    "at home": AT_HOME,
    "local scope": replace(STATIC, capacity_scope="local"),
    "score": replace(STATIC, drop_policy="score"),
    "random": replace(AT_HOME, drop_policy="random"),
    "choice after choice": replace(STATIC, drop_order="choice"),
    "rerouted": replace(STATIC, overflow="reroute", top_k=1),
    "biases": replace(STATIC, expert_bias=True),
    "one row each": replace(STATIC, capacity_factor=1e-6),
    "room for all": replace(AT_HOME, capacity_factor=float(E)),
    "pools": replace(STATIC, capacity_pool=3),
    "in parts": replace(STATIC, overlap_chunks=3),
    "pools in parts": replace(STATIC, capacity_pool=3, overlap_chunks=2),
    "pools with a floor, at home": replace(AT_HOME, capacity_pool=2, pool_floor=0.5),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("experts", ["loop", "bmm"])
@pytest.mark.parametrize("moe", CASES.values(), ids=CASES)
def test_numbers_are_those_of_a_dispatch_that_looks(moe: MoEConfig, experts: str, blind: Callable[[], None]) -> None:
    layer = layer_of(replace(moe, experts=experts))  # type: ignore[arg-type]
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = found_by(layer, list(layer.parameters()), x_TD)
    blind()
    found = found_by(layer, list(layer.parameters()), x_TD)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[2], wanted[2])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("moe", [STATIC, AT_HOME], ids=["padded", "at home"])
def test_triton_kernels_never_look_past_the_rows(moe: MoEConfig, blind: Callable[[], None]) -> None:
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    plain = layer_of(replace(moe, experts="loop"), torch.float32).to(DEVICE)
    wanted = found_by(plain, list(plain.parameters()), x_TD)
    blind()
    layer = layer_of(replace(moe, experts="triton"), torch.float32, kernels="triton").to(DEVICE)
    torch.testing.assert_close(found_by(layer, list(layer.parameters()), x_TD), wanted, rtol=1e-4, atol=1e-5)


class _Looks(TorchDispatchMode):
    """Counts operations for which a GPU would make the host wait."""

    names = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique_dim", "_unique2", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        masked = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in self.names or unsized or masked:
            self.seen.append(name)
        return func(*args, **kwargs)


@contextmanager
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is looked at while this lasts; lists and copies to the CPU do not pass the dispatcher."""
    mode = _Looks()
    for name in ("tolist", "cpu"):
        of = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda x, of=of, name=name: mode.seen.append(name) or of(x))
    with mode:
        yield mode.seen


WAITS = {
    "padded": (STATIC, "bmm", []),
    "padded, pools": (CASES["pools"], "bmm", []),
    "padded, rerouted": (CASES["rerouted"], "bmm", []),
    "padded, in parts": (replace(STATIC, overlap_chunks=3), "bmm", []),
    "padded, pools in parts": (replace(CASES["pools"], overlap_chunks=2), "bmm", []),
    "padded, by score": (CASES["score"], "bmm", []),
    "at home, a limit": (AT_HOME, "bmm", []),
    "at home, Triton": (AT_HOME, "triton", []),
    "at home, dropless, Triton": (replace(AT_HOME, capacity_factor=None), "triton", []),
    "ragged, a limit, Triton": (replace(STATIC, wire="ragged"), "triton", ["cpu"]),
    "ragged, dropless, Triton": (replace(STATIC, wire="ragged", capacity_factor=None), "triton", ["cpu"]),
}


@pytest.mark.parametrize("moe, experts, expected", WAITS.values(), ids=WAITS)
def test_how_often_a_layer_waits(
    moe: MoEConfig, experts: str, expected: list[str], blind: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward of one layer. Once the counts are on the host (`cpu`), its own arithmetic is no wait."""
    kernels, device = ("triton", DEVICE) if experts == "triton" else ("torch", "cpu")
    layer = layer_of(replace(moe, experts=experts), torch.float32, kernels).to(device)  # type: ignore[arg-type]
    x_TD = torch.randn(T, D, device=device)
    found_by(layer, list(layer.parameters()), x_TD)  # which experts are open is read once
    blind()
    with looks(monkeypatch) as seen:
        found_by(layer, list(layer.parameters()), x_TD)
    after = seen.index("cpu") if "cpu" in seen else len(seen)
    assert seen[: after + 1] == expected


@pytest.fixture
def eight_ranks() -> Iterator[Mesh]:
    """One rank of eight that are not there: exchanges return at once, with anything."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield create_mesh(8, 1)
    dist.destroy_process_group()


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_rank_of_eight_runs_without_numbers_and_is_one_graph(top_k: int, scope: Any, eight_ranks: Mesh) -> None:
    moe = replace(STATIC, num_experts=16, top_k=top_k, experts="grouped_mm", capacity_scope=scope)
    with FakeTensorMode():
        layer = MoE(moe, D, 12, "swiglu", layer=0, mesh=eight_ranks)
        x_TD = torch.empty(T, D, requires_grad=True)
        y_TD, stats = layer(x_TD, context())
        (y_TD.sum() + stats.aux_loss).backward()
        assert x_TD.grad is not None and stats.sent_bytes > 0
    if scope == "local":
        return
    torch._dynamo.reset()
    layer = MoE(moe, D, 12, "swiglu", layer=0, mesh=eight_ranks)
    x_TD = torch.randn(T, D, requires_grad=True)
    y_TD, stats = torch.compile(layer, fullgraph=True, backend="aot_eager")(x_TD, marked(x_TD))
    (y_TD.sum() + stats.aux_loss).backward()
    assert y_TD.shape == x_TD.shape and x_TD.grad is not None


@pytest.mark.parametrize("experts", ["bmm", "grouped_mm"])
@pytest.mark.parametrize("moe", [STATIC, AT_HOME, replace(STATIC, top_k=1)], ids=["padded", "at home", "switch"])
def test_it_runs_without_numbers(moe: MoEConfig, experts: str) -> None:
    with FakeTensorMode():
        layer = MoE(replace(moe, experts=experts), D, 12, "swiglu", layer=0, mesh=single_process_mesh())  # type: ignore[arg-type]
        x_TD = torch.empty(T, D, requires_grad=True)
        y_TD, stats = layer(x_TD, context())
        (y_TD.sum() + stats.aux_loss).backward()
        assert y_TD.shape == x_TD.shape and x_TD.grad is not None
        assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("moe", [CASES[name] for name in ("top-2", "top-1", "pools with a floor, at home")])
def test_it_is_one_graph(moe: MoEConfig) -> None:
    torch._dynamo.reset()
    layer = layer_of(replace(moe, experts="grouped_mm"), torch.float32)
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(2))
    wanted = found_by(layer, list(layer.parameters()), x_TD)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(found_by(compiled, list(layer.parameters()), x_TD), wanted, rtol=1e-4, atol=1e-5)
