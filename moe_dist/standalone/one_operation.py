"""A layer as one operation of a compiled graph.

What routes tokens asks the host for numbers, which torch.compile cannot trace, and with fullgraph=True refuses. So a
graph has the layer as one operation, which is run as it is, forward and backward: the compiler knows its shapes alone.

forward    y, aux, token = layer(x, parameters): runs the pass with gradients, and keeps what autograd remembers of it
backward   grads = gradients(token, grad_y, grad_aux): goes back through what was kept

What is kept lives as long as the memory of `token`, one number that a compiled graph holds for its backward pass.
"""

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

_NUMBERS = itertools.count(1)
_LAYERS: "WeakValueDictionary[int, Operation]" = WeakValueDictionary()
_PASSES: "WeakValueDictionary[int, _Pass]" = WeakValueDictionary()


class Operation(Protocol):
    """A module that `as_operation` can run."""

    def run(self, x: Tensor, token_ids: Tensor | None, step: int | None) -> tuple[Tensor, Tensor]:
        """y of x's shape and dtype, or that of autocast; a loss of one number, in fp32, or x's dtype where wider."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class _Pass(bytearray):
    """Eight bytes that a tensor lies in, and what has to live as long: ends and beginnings of a pass."""

    outs: list[Tensor]
    ins: list[Tensor]


def handle_of(layer: Operation) -> Tensor:
    """What graphs know the layer by, on the CPU. A copy of the layer needs one of its own. A tensor, not a number:
    blocks that differ in it alone share one compiled graph."""
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return torch.tensor(number, device="cpu")


def as_operation(
    layer: Operation, handle: Tensor, x: Tensor, token_ids: Tensor | None, step: int | None
) -> tuple[Tensor, Tensor]:
    """layer.run(x, token_ids, step) where a graph is compiled: what is traced."""
    params, differentiable = list(layer.parameters()), torch.is_grad_enabled()
    needs = [differentiable and t.requires_grad for t in (x, *params)]
    y, aux, _ = torch.ops.moe_dist.layer(handle, x, params, token_ids, step, autocast_dtype(x), needs)
    return y, aux


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Of autocast, where it is on for x's device."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@torch.library.custom_op("moe_dist::layer", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _layer(
    handle: Tensor,
    x: Tensor,
    params: list[Tensor],
    token_ids: Tensor | None,
    step: int | None,
    autocast: torch.dtype | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    layer = _LAYERS[int(handle)]
    ins = [t.detach().requires_grad_(need) for t, need in zip((x, *params), needs, strict=True)]
    names = [f"layer.{name}" for name, _ in layer.named_parameters()]
    with _differentiable(any(needs)), torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        given = dict(zip(names, ins[1:], strict=True))
        outs = torch.func.functional_call(_Run(layer), given, (ins[0], token_ids, step))
    kept, number = _Pass(8), next(_NUMBERS)
    kept[:] = number.to_bytes(8, sys.byteorder)
    if any(needs):
        kept.ins, kept.outs = [t for t, need in zip(ins, needs, strict=True) if need], list(outs)
        _PASSES[number] = kept
    y, aux = (out.detach().contiguous() for out in outs)
    return y, aux, torch.frombuffer(kept, dtype=torch.int64)


@_layer.register_fake
def _(
    handle: Tensor,
    x: Tensor,
    params: list[Tensor],
    token_ids: Tensor | None,
    step: int | None,
    autocast: torch.dtype | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=autocast or x.dtype)
    aux = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    return y, aux, torch.empty(1, dtype=torch.int64, device="cpu")


@torch.library.custom_op("moe_dist::layer_gradients", mutates_args=())
def _gradients(
    token: Tensor, grad_y: Tensor, grad_aux: Tensor, x: Tensor, params: list[Tensor], needs: list[bool]
) -> list[Tensor]:
    kept = _PASSES.get(int(token))
    if kept is None:
        raise RuntimeError(
            "what a compiled layer kept for its backward pass has gone: the graph's saved tensors were copied, as "
            "saved_tensors_hooks that move them do; leave this layer outside of them"
        )
    ends = [(out, grad) for out, grad in zip(kept.outs, (grad_y, grad_aux), strict=True) if out.requires_grad]
    outs, grads = ([end[which] for end in ends] for which in (0, 1))
    with _differentiable(True):
        found = torch.autograd.grad(outs, kept.ins, grads, retain_graph=True, allow_unused=True)
    pairs = zip(found, kept.ins, strict=True)
    return [torch.zeros_like(t) if grad is None else grad.contiguous() for grad, t in pairs]


@_gradients.register_fake
def _(
    token: Tensor, grad_y: Tensor, grad_aux: Tensor, x: Tensor, params: list[Tensor], needs: list[bool]
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip((x, *params), needs, strict=True) if need]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, x, params, _, _, _, needs = inputs
    ctx.needs = needs
    ctx.save_for_backward(output[2], x, *params)


def _backward(ctx: Any, grad_y: Tensor, grad_aux: Tensor, _: Any) -> tuple[Any, ...]:
    token, x, *params = ctx.saved_tensors
    found = iter(torch.ops.moe_dist.layer_gradients(token, grad_y, grad_aux, x, params, ctx.needs))
    grad_x, *of_params = (next(found) if need else None for need in ctx.needs)
    return None, grad_x, of_params, None, None, None, None


_layer.register_autograd(_backward, setup_context=_remember)


class _Run(nn.Module):
    """`run` of a layer as a call, around which no hook of the layer is called once more."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = self.layer.run(*args)
        return out


@contextmanager
def _differentiable(wanted: bool) -> Iterator[None]:
    """Inside an operation, which torch calls below autograd: as outside of it."""
    below = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        below = below.remove(getattr(torch._C.DispatchKey, key))
    above = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), below)
    with above, torch.set_grad_enabled(wanted):
        yield
