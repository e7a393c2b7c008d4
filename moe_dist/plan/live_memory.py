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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Memory:
    """Bytes of the storages that it has been told of and that are still there: `live`, and `peak`, the most there were.

    where: says where the program is, kept in `peak_at`. limit: the first time that there are more, what was made then
    is noted in `over`. Storages of the device `meta` have no bytes.
    """

    def __init__(self, limit: int | None = None, where: Callable[[], str] = lambda: "") -> None:
        self.limit, self.where = limit, where
        self.live = self.peak = 0
        self.peak_at = self.over = ""
        self._sizes: dict[weakref.ref[torch.UntypedStorage], int] = {}

    def note(self, tensor: Tensor, maker: object = "") -> None:
        """Count the tensor's storage, if that is not done yet, or has another size now. maker: what made it."""
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        known = weakref.ref(storage, self._gone)
        self.live += storage.nbytes() - self._sizes.get(known, 0)
        self._sizes[known] = storage.nbytes()
        if self.live > self.peak:
            self.peak, self.peak_at = self.live, self.where()
            if self.limit is not None and self.live > self.limit and not self.over:
                shape = " x ".join(map(str, tensor.shape))
                self.over = f"{maker} makes {shape} {str(tensor.dtype).removeprefix('torch.')} in {self.peak_at}"

    def forget_peak(self) -> None:
        """The most from now on."""
        self.peak = self.live

    def _gone(self, known: "weakref.ref[torch.UntypedStorage]") -> None:
        self.live -= self._sizes.pop(known, 0)


class LiveMemory(TorchDispatchMode):
    """Tells a Memory of what operations within take and make."""

    def __init__(self, memory: Memory | None = None) -> None:
        super().__init__()
        self.memory = memory or Memory()

    @property
    def now(self) -> int:
        return self.memory.live

    @property
    def peak(self) -> int:
        return self.memory.peak

    def forget_peak(self) -> None:
        self.memory.forget_peak()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            if isinstance(value, Tensor):
                self.memory.note(value, func)
        return out
