"""A world of any size in one process: a rank's code runs on tensors without numbers, among ranks that are not there.

| what                                             | is   | why                                                        |
|--------------------------------------------------|------|------------------------------------------------------------|
| fractions, and bytes of a message (uint8)        | fake | shapes, types and memory are all that is asked of them     |
| whole numbers and truth values: ids, counts,     | real | they say how many rows go where, which the host reads and  |
| places, decisions                                |      | makes shapes of; they are small                            |
| what is made of both                             | fake |                                                            |
| a fraction that the host reads (a norm, a loss)  | 1.0  | nobody knows it; a flag of it is false                     |

Fake tensors are torch's (`FakeTensorMode`), the process group too (backend `fake`, which exchanges nothing). So routers
cannot choose by scores: `Balanced` decides for them, as a witness of the step (step.py), the way an even share is dealt
out (traffic/rows.py); and it knows what the others would have gathered: they decide as this rank does, each shifted by
the assignments before it. What another rank broadcasts is what it did broadcast, when it ran before.

Memory is counted by storage, of what operations make (live_memory.py).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from moe_dist.config.model import ModelConfig
from moe_dist.parallel.mesh import Layout
from moe_dist.plan.live_memory import Memory
from moe_dist.plan.recorder import Recorder, group_of
from moe_dist.step import Site

_READ = torch.ops.aten._local_scalar_dense.default
_DEVICE = torch.ops.prim.device.default
_SHARED = "c10d"
_INDEX = torch.ops.aten.index.Tensor
_OF_NUMBERS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
_REPLACES = ("set_", "resize_", "resize_as_")  # storage, or size


class FakeWorld(TorchDispatchMode):
    """Within, tensors are as the table above says, for `rank`. recorder: is told of every collective. others: what
    ranks of a group would have gathered, in their order, of whole numbers like these. said: what ranks that ran before
    have broadcast, by group; shared by all ranks of a dry run."""

    def __init__(
        self,
        rank: int,
        recorder: Recorder,
        memory: Memory,
        others: Callable[[Tensor, Sequence[int]], Tensor],
        said: dict[tuple[int, ...], list[list[Tensor]]],
    ) -> None:
        super().__init__()
        self.rank, self.recorder, self.memory, self.others, self.said = rank, recorder, memory, others, said
        self.heard: Counter[tuple[int, ...]] = Counter()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._given_back: dict[tuple[object, ...], int | str] = {}
        self._stand_ins: dict[tuple[object, ...], Tensor] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and keeping torch's compiler out takes longer than most operations."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # as often as everything else together
            return args[0].fake_device
        kwargs = kwargs or {}
        if func.namespace == _SHARED:
            self.recorder.note(func, args)
        given = list(_tensors(args)) + list(_tensors(kwargs.values()))
        if func is _READ and isinstance(given[0], FakeTensor):
            return 1.0 if given[0].is_floating_point() else 0
        out = self._run(func, args, kwargs, given)
        for made in _tensors((out,)):
            self.memory.note(made, func)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any, given: Sequence[Tensor]) -> Any:
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            return self._run_fake(func, args, kwargs)
        if given:
            out = func(*args, **kwargs)
            if func.namespace == _SHARED:
                self._exchange(func.overloadpacket.__name__, args)
            return out
        with self.fake:
            out = func(*args, **kwargs)
        faked = not isinstance(out, Tensor) or out.is_floating_point() or out.dtype == torch.uint8
        return out if faked else func(*args, **kwargs)

    def _run_fake(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What torch says of the operation. It remembers answers by the shapes that it is given, but neither where a
        tensor has numbers nor where the answer is an argument: these are remembered here. A view is made as it would be
        of tensors on the device meta, which takes less than remembering."""
        if func.namespace != "aten":
            with self.fake:
                return func(*args, **kwargs)
        if func.is_view and isinstance(args[0], FakeTensor):
            with in_kernel_invocation_manager(self.fake):
                viewed = func(*args, **kwargs)
            return tree_map_only(Tensor, partial(FakeTensor, self.fake, device=args[0].fake_device), viewed)
        args, kwargs = self._without_numbers(func, args, kwargs)
        key = _shapes(func, args, kwargs)
        if key in self._given_back:
            place = self._given_back[key]
            return args[place] if isinstance(place, int) else kwargs[place]
        out = self.fake.dispatch(func, (), args, kwargs)
        if key is not None and isinstance(out, Tensor):
            where = [place for place, value in [*enumerate(args), *kwargs.items()] if value is out]
            if where:
                self._given_back[key] = where[0]
        return out

    def _without_numbers(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Indices and masks that are only read, by fake ones of their shapes, where no shape hangs on their numbers."""
        read = _read_alone(func)
        lists = [value for value in args if isinstance(value, list)]
        if not read or any(isinstance(each, Tensor) and each.itemsize == 1 for value in lists for each in value):
            return args, kwargs  # of a mask among indices, the shape is how much of it is true
        new_args = tuple(self._stand_in(value) if place in read else value for place, value in enumerate(args))
        return new_args, {name: self._stand_in(value) if name in read else value for name, value in kwargs.items()}

    def _stand_in(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._stand_in(each) for each in value]
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor) or value.is_floating_point():
            return value
        key = (value.shape, value.stride(), value.dtype)
        if key not in self._stand_ins:
            with self.fake:
                self._stand_ins[key] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        return self._stand_ins[key]

    def _broadcast(self, ranks: tuple[int, ...], root: int, tensors: Sequence[Tensor]) -> None:
        told = self.said.setdefault(ranks, [])
        if root == self.rank:
            told.append([tensor.clone() for tensor in tensors])
            return
        if self.heard[ranks] >= len(told):
            raise NotImplementedError(f"rank {root} tells rank {self.rank} something: run it before, as one of `ranks`")
        for tensor, value in zip(tensors, told[self.heard[ranks]], strict=True):
            tensor.copy_(value)
        self.heard[ranks] += 1

    def __enter__(self) -> "FakeWorld":
        self._convert, nn.Module._apply = nn.Module._apply, _convert  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        nn.Module._apply = self._convert  # type: ignore[method-assign]

    def _exchange(self, name: str, args: Sequence[Any]) -> None:
        """Of whole numbers. Raises NotImplementedError for what no layer does with them, and where a rank would have to
        be heard that has not run."""
        ranks = tuple(torch.distributed.get_process_group_ranks(group_of(args)))
        if name == "_allgather_base_":
            args[0].copy_(self.others(args[1], ranks).reshape(args[0].shape))
        elif name == "allreduce_":  # a sum, and all ranks have as much
            for tensor in args[0]:
                tensor.mul_(len(ranks))
        elif name == "broadcast_":
            self._broadcast(ranks, ranks[args[2]], args[0])
        else:
            raise NotImplementedError(f"a fake world does not know what other ranks give to {name} of whole numbers")


@cache
def _read_alone(func: Any) -> frozenset[int | str]:
    """Places and names of the arguments that an operation only reads; none where its result is a view, or of a shape
    that numbers say."""
    arguments = func._schema.arguments
    views = any(arg.alias_info is not None and not arg.alias_info.is_write for arg in arguments)
    if views or (func is not _INDEX and _OF_NUMBERS.intersection(func.tags)):
        return frozenset()
    read = [(place, arg.name) for place, arg in enumerate(arguments) if arg.alias_info is None]
    return frozenset(key for both in read for key in both)


@cache
def _writes_numbers(func: Any) -> bool:
    """Whether an operation writes into an argument, and changes nothing but its numbers."""
    whole = torch.Tag.inplace_view in func.tags or func.overloadpacket.__name__ in _REPLACES
    return bool(func._schema.is_mutable) and not whole


def _shapes(func: Any, args: Any, kwargs: Any) -> tuple[object, ...] | None:
    """What hangs on whether a result fits into the argument that it is written to; None where there is none such."""
    if not _writes_numbers(func):
        return None
    key: list[object] = [func]
    for name, value in [*enumerate(args), *kwargs.items()]:
        if isinstance(value, FakeTensor):
            key.append((name, value.shape, value.stride(), value.dtype))
        elif isinstance(value, Tensor | list):
            return None
        else:
            key.append((name, type(value), value))
    return tuple(key)


def _convert(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """What `Module.to` does to tensors that have numbers: parameters stay the same objects. Fake ones torch would swap
    for others, and cannot while anybody remembers them, as DeepSpeed does."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for param in module.parameters(recurse=False):
        param.data = fn(param.data)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = fn(buffer)
    return module


class Balanced:
    """Decides for the routers of `rank`: assignment number g of a micro-step, in global order, goes to expert g mod E.

    It is a `Witness`, so it is asked where scores are compared. tokens: of this rank, in a micro-step.
    """

    def __init__(self, model: ModelConfig, layout: Layout, rank: int, tokens: int) -> None:
        self.layers = {"feed_forward": model.moe, "attention": model.attention.moe}
        self.layout, self.rank, self.tokens = layout, rank, tokens
        self.site: Site | None = None

    def scores(self, site: Site, what: str, scores: Tensor) -> Tensor:
        """Of the router, [T, E]: the K experts whose turn it is are best. Of queues, [N of all ranks]: first come first
        served, or under expert choice as many of each rank."""
        moe = self.layers[site.kind]
        if what == "router":
            self.site = site
            first_T1 = (torch.arange(self.tokens)[:, None] + self.rank * self.tokens) * moe.top_k
            return 1 - (torch.arange(moe.num_experts) - first_T1) % moe.num_experts / moe.num_experts
        if moe.router != "expert_choice":
            return torch.zeros(scores.shape, dtype=torch.int64).double()
        self.site = None  # all tokens ask all experts, on every rank
        return -(torch.arange(scores.numel()) // moe.num_experts % self.tokens).double()

    def decided(self, site: Site, experts_TK: Tensor, kept_TK: Tensor) -> None:
        pass

    def others(self, own: Tensor, ranks: Sequence[int]) -> Tensor:
        """Counts by expert [1, ..., E], or numbers of experts (E: none), as each rank has them. A single number, and
        what hash routing and expert choice count, is the same on all ranks, whose tokens are the same."""
        if self.site is None or own.numel() == 1:
            return own.expand(len(ranks), *own.shape)
        moe, parts = self.layers[self.site.kind], 1
        if own.dtype == torch.int32:  # targets of the all-gather dispatcher: parts of experts under etp
            parts = self.layout.etp
        experts = moe.num_experts * parts
        shift_r = (torch.tensor(ranks) - self.rank) * self.tokens * moe.top_k * parts
        if own.dim() > 1 and own.shape[0] == 1 and own.shape[-1] == experts:
            place_rE = (torch.arange(experts) - shift_r[:, None]) % experts
            return own.flatten(0, -2)[:, place_rE].movedim(1, 0)
        shift = shift_r.view(-1, *[1] * own.dim())
        return torch.where(own < experts, (own + shift) % experts, own).to(own.dtype)


def _tensors(values: Any) -> Any:
    """Among arguments or results, lists and tuples included."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
