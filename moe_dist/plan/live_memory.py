"""How many bytes of tensors are alive, and how many were at most: counted while a step runs, on CPU, on a GPU, or fake.

A tensor's memory is its storage, which views share; it is alive from the operation that makes it until nobody refers to
it any more, neither Python nor autograd. So every operation is looked at, each storage is counted once, at its size,
and a weak reference tells when it is gone. What an operation takes and gives back inside itself is not seen, and
neither is what an allocator keeps, so this is less than what `nvidia-smi` shows.

    with LiveMemory() as live:
        engine = make_engine(...)       # what was made before is counted from when it is first used
        live.forget_peak()
        engine.micro_step(...)
    live.peak
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages that operations within have touched and that are still there: `now`, and `peak`, the most
    since the beginning or `forget_peak`. Storages of the device `meta` have none."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[weakref.ref[torch.UntypedStorage], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            if isinstance(value, Tensor):
                self.see(value)
        return out

    def see(self, tensor: Tensor) -> None:
        """Count its storage, if that is not done yet, or has another size now."""
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        known = weakref.ref(storage, self._gone)
        self.now += storage.nbytes() - self._sizes.get(known, 0)
        self._sizes[known] = storage.nbytes()
        self.peak = max(self.peak, self.now)

    def forget_peak(self) -> None:
        """The most from now on."""
        self.peak = self.now

    def _gone(self, known: "weakref.ref[torch.UntypedStorage]") -> None:
        self.now -= self._sizes.pop(known, 0)
