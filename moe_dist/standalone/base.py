"""What the layers of this room share: which pass a forward pass is, whose tokens it has, the loads of experts, and
PyTorch's ways of moving, filling and loading modules.

Everything random is a function of (seed, step), and `step` counts the forward passes in training. So that a pass which
is run again (activation checkpointing) is the same pass, each draws one number from torch's generator on the host,
which torch.utils.checkpoint puts back before it runs a pass again; the step is remembered by that number.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from difflib import get_close_matches
from operator import add
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe_dist.kernels.random import RandomKey
from moe_dist.moe.balance import Tally, reduced
from moe_dist.moe.router import Router
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.sharding import PlacedParameter, initialize

_REMEMBERED = 4096  # passes that wait for their backward pass, at most


class Layer(nn.Module):
    """A layer for anybody's model. `mesh` is what its user gave: with None it stands on every rank as a whole, as under
    DDP and FSDP, and ranks are told apart by torch.distributed."""

    def __init__(self, seed: int, mesh: Mesh | None = None) -> None:
        super().__init__()
        self.seed = seed
        self.step = 0
        self.cut_over = mesh
        self._steps: dict[int, int] = {}

    def reset_parameters(self) -> None:
        """The initial values of parameters and buffers once more, from the seed; `step` starts at 0. For layers that
        were made on the device `meta` and given memory by `to_empty`."""
        self._initialize()
        for part in self.modules():
            if isinstance(part, Router):
                part.reset_buffers()
        self.step = 0

    def _initialize(self) -> None:
        initialize(self, self.seed)

    def pass_of(self, given: int | None) -> int:
        """The step of this forward pass: the one given, or the next one, which is counted in training.

        Raises ValueError where a pass is run again, and nothing says which one it was.
        """
        if given is not None or not self.training:
            return self.step if given is None else given
        drawn = int(torch.randint(2**63 - 1, (), device="cpu"))
        if runs_again():
            if drawn not in self._steps:
                raise ValueError(
                    "this forward pass is run again inside a backward pass, but torch's generator is not where it was "
                    "in any earlier pass, so that other random numbers would be drawn: leave preserve_rng_state of "
                    "torch.utils.checkpoint at True, or give forward the same `step` both times"
                )
            return self._steps[drawn]
        self._steps[drawn] = self.step
        if len(self._steps) > _REMEMBERED:
            del self._steps[next(iter(self._steps))]
        self.step += 1
        return self._steps[drawn]

    def key_of(self, name: str, step: int) -> RandomKey:
        """Of all that is drawn in a pass. Ranks that hold the whole layer have tokens of their own, and draw their own
        numbers; with a mesh, numbers go by the global index of the token."""
        key = RandomKey.of(self.seed, name, step)
        rank = dist.get_rank() if self.cut_over is None and dist.is_initialized() else 0
        return key.fold("rank", rank) if rank else key

    def cut_parameters(self) -> list[tuple[str, PlacedParameter]]:
        """Those of which each rank of the mesh holds another part."""
        placed = [(name, param) for name, param in self.named_parameters() if isinstance(param, PlacedParameter)]
        return [(name, param) for name, param in placed if param.spec.shard != "replicated"]

    def check_wrapping(self) -> None:
        """Raises ValueError inside DistributedDataParallel where it treats experts that are cut over ranks as copies of
        each other: it has then written rank 0's over the others'."""
        if self.cut_over is None or DistributedDataParallel._get_active_ddp_module() is None:
            return
        for name, param in self.cut_parameters():
            if not getattr(param, "_ddp_ignored", False):
                raise ValueError(
                    f"{name} is cut over the ranks of mesh=, but DistributedDataParallel has made it rank 0's on all "
                    "of them: call moe_dist.standalone.ddp.prepare_for_ddp(model) before wrapping the model"
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Layer":
        """Parameters that are made anew, as by `to_empty`, keep their place in the logical model."""
        places = {name: param.spec for name, param in self.named_parameters() if isinstance(param, PlacedParameter)}
        super()._apply(fn, recurse)
        for name, param in self.named_parameters():
            if name in places and not isinstance(param, PlacedParameter):
                param.__class__ = PlacedParameter
                param.spec = places[name]  # type: ignore[attr-defined]
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str], *rest: Any
    ) -> None:
        """Seed and step stay as they are where a state dict has none: one of weights alone, as other tools write.
        torch.distributed.checkpoint puts something of its own there, which is no tensor."""
        extra = prefix + "_extra_state"
        if not isinstance(state_dict.get(extra), Tensor):
            state_dict.pop(extra, None)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        if extra in missing_keys:
            missing_keys.remove(extra)


class KeepsStep:
    """Seed and step are part of the state dict of what derives from this before `Layer`: of layers that draw by them.
    PyTorch asks the class of a module whether it has such a state, so that it is no part of `Layer`."""

    seed: int
    step: int

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.seed, self.step])

    def set_extra_state(self, state: Tensor) -> None:
        self.seed, self.step = state.tolist()


class Loads:
    """What the forward passes of a layer or model counted, router by router: in the last one, and in those in training
    since routers were balanced by it. mesh: over which they are cut; with None each rank holds them whole, and has a
    load of its own."""

    def __init__(self, mesh: Mesh | None) -> None:
        self.mesh = mesh
        self.last: Tensor | None = None
        self.since_balance: list[Tally] | None = None

    def count(self, tallies: Sequence[Tally], training: bool) -> None:
        """Of one pass: of each router. A pass that is run again was counted the first time."""
        if runs_again():
            return
        self.last = torch.stack([tally.load_E for tally in tallies])
        if training:
            earlier = self.since_balance
            self.since_balance = list(tallies) if earlier is None else list(map(add, earlier, tallies))

    def forget(self) -> None:
        """For other experts, or other weights."""
        self.last = self.since_balance = None

    def of_last_pass(self, routers: int, num_experts: int) -> Tensor:
        """Assignments before dropping, [routers, E]; zeros before one."""
        return torch.zeros(routers, num_experts, dtype=torch.int64) if self.last is None else self.last

    def take(self, routers: Sequence[Router]) -> list[Tally]:
        """What was counted since the last time, which is then forgotten; nothing of these routers without a pass."""
        tallies, self.since_balance = self.since_balance, None
        return [router.no_tally() for router in routers] if tallies is None else tallies

    def balance(self, routers: Sequence[Router], group: dist.ProcessGroup | None) -> None:
        """Let routers move their biases by what was counted since the last time."""
        balance_routers(routers, self.take(routers), self.mesh, group)


def balance_routers(
    routers: Sequence[Router], tallies: Sequence[Tally], mesh: Mesh | None, group: dist.ProcessGroup | None
) -> None:
    """By what all ranks counted, in one reduction: over `group` without a mesh, where each rank holds all, and must
    call whether or not it counted anything. With one, loads are of all its ranks already, and what tokens needed is
    summed over those that hold tokens. Nothing moves where nobody had a token."""
    loads = [tally.load_E for tally in tallies]
    needs = [tally.needs_EB for tally in tallies if tally.needs_EB is not None]
    if mesh is None and dist.is_initialized():
        summed = reduced([*loads, *needs], lambda flat: dist.all_reduce(flat, group=group))
        loads, needs = summed[: len(loads)], summed[len(loads) :]
    elif mesh is not None and needs:
        ranks = mesh.token_ranks
        needs = reduced(needs, lambda flat: all_reduce(flat, ranks))
    for number, (router, load_E) in enumerate(zip(routers, loads, strict=True)):
        router.balance(load_E, needs[number] if needs else None)


class WithAuxLoss(NamedTuple):
    """What a forward pass gives with return_aux_loss. aux_loss: weighted already, to be added to the model's."""

    y: Tensor
    aux_loss: Tensor


def drawn_seed(seed: int | None, ranks: int = 1) -> int:
    """`seed`, or one from torch's generator. Raises ValueError where `ranks` would draw different ones."""
    if seed is None:
        if ranks > 1:
            raise ValueError(f"seed=None on {ranks} ranks, which must draw the same weights: give a seed")
        return int(torch.randint(2**63 - 1, (), device="cpu"))
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} is outside 0 <= seed < 2**63")
    return seed


def refuse_unknown(options: Iterable[str], known: Collection[str]) -> None:
    """Raises TypeError, as Python does for keywords that a function does not have, naming the nearest right ones."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        near = [name for each in unknown for name in get_close_matches(each, known, n=1)]
        advice = f"did you mean {', '.join(near)}? There are" if near else "choose of"
        raise TypeError(f"unknown options {unknown}: {advice} {', '.join(sorted(known))}")


def device_of(given: torch.device | str | None) -> torch.device:
    """The one given, or the one that torch makes tensors on, as inside `with torch.device("meta")`."""
    return torch.get_default_device() if given is None else torch.device(given)


def runs_again() -> bool:
    """Whether this is inside a backward pass: a forward pass there is a recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)
