"""A CUDA device that is not there: computed on the CPU, but a tensor left on the host is an error, as on a GPU.

Inside `pretended_cuda()`, `device="cuda"` gives tensors that report that device, hold real numbers and know gradients.
An operation on such tensors and a host tensor raises HostTensorError, by the rules of CUDA: numbers without dimensions,
copies, and indices in square brackets may come from the host. Code that asks `x.device.type` takes the GPU's way, so
what runs is what a GPU would be given, up to its own kernels (Triton, flash-attn).

To autograd the tensors are of the device `meta`, the only one beside the CPU for which a build without CUDA can run a
backward pass; whoever asks from Python is told `cuda`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
_INSIDE, _HOST = torch.device("meta"), torch.device("cpu")
_aten = torch.ops.aten
# The device of the result is said by an argument, or that of the first one.
_BETWEEN_DEVICES = {_aten._to_copy.default, _aten.copy_.default}
_INDICES_FROM_HOST = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}


class HostTensorError(RuntimeError):
    """What CUDA would refuse."""


class _DeviceTensor(Tensor):
    on_host: Tensor
    device = CUDA
    is_cuda = True
    is_meta = False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_host: Tensor) -> "_DeviceTensor":
        made = Tensor._make_wrapper_subclass(
            cls,
            on_host.shape,
            strides=on_host.stride(),
            storage_offset=on_host.storage_offset(),
            dtype=on_host.dtype,
            device=_INSIDE,
        )
        made.on_host = on_host
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"on cuda: {self.on_host!r}"

    # Where torch would copy a list to the device `meta`, its numbers would be lost.

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(tuple(map(_as_tensor, index)) if isinstance(index, tuple) else _as_tensor(index))

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA, **kwargs)

    def tolist(self) -> Any:
        return self.on_host.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = any(isinstance(t, _DeviceTensor) for t in tensors)
    if here and func not in _BETWEEN_DEVICES:
        _check(func, args, tensors)
    out = func(*tree_map(_to_host, args), **tree_map(_to_host, kwargs))
    device = kwargs.get("device")
    if device is not None:
        here = _is_device(device)
    elif func in _BETWEEN_DEVICES:
        here = isinstance(args[0], _DeviceTensor)
    if not here:
        return out
    wrapped = tree_map(lambda t: _DeviceTensor(t) if isinstance(t, Tensor) else t, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _check(func: Any, args: Any, tensors: list[Tensor]) -> None:
    if func in _INDICES_FROM_HOST:
        tensors = [t for t in (args[0], args[2] if len(args) > 2 else None) if isinstance(t, Tensor)]
    for t in tensors:
        if not isinstance(t, _DeviceTensor) and t.dim() > 0:
            raise HostTensorError(f"{func} was given a tensor of shape {list(t.shape)} on the host and one on cuda")


def _to_host(leaf: Any) -> Any:
    if isinstance(leaf, _DeviceTensor):
        return leaf.on_host
    return _HOST if _is_device(leaf) else leaf


def _as_tensor(index: Any) -> Any:
    return torch.tensor(index) if isinstance(index, list) else index


def _is_device(leaf: Any) -> bool:
    return isinstance(leaf, torch.device) and leaf.type in (CUDA.type, _INSIDE.type)


class _Making(TorchDispatchMode):
    """Operations without a tensor of the device among their arguments: those that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_module_to = nn.Module.to


def _to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """nn.Module.to would make new parameters, which do not know their place in the model."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if not _is_device(device):
        return _module_to(module, *args, **kwargs)
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, param in part._parameters.items():
            if param is None or isinstance(param.data, _DeviceTensor):
                continue
            if id(param) not in moved:
                wide = dtype if param.is_floating_point() else None
                new = nn.Parameter(param.detach().to(CUDA, wide), param.requires_grad)
                vars(new).update({key: value for key, value in vars(param).items() if key != "on_host"})
                moved[id(param)] = new
            part._parameters[name] = moved[id(param)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(CUDA)
    return module


@contextmanager
def pretended_cuda() -> Iterator[torch.device]:
    from_lists = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes one on the host and moves it
    try:
        with _Making(), mock.patch.object(nn.Module, "to", _to), mock.patch.object(torch.cuda, "_lazy_init"):
            yield CUDA
    finally:
        torch._C._set_only_lift_cpu_tensors(from_lists)


def on_host(t: Tensor) -> Tensor:
    """Its numbers, outside of `pretended_cuda` too."""
    return t.on_host if isinstance(t, _DeviceTensor) else t
