"""Plans of many layouts of one configuration, from what they have in common, worked out once.

| what                                    | hangs on                                                                   |
|-----------------------------------------|----------------------------------------------------------------------------|
| parameters, kinds of ranks              | ep, tp, etp                                                                |
| parameters, gradients, optimizer state  | these, the engine, whether there are several micro-steps                   |
| compute                                 | these sizes, micro_batch                                                   |
| activations                             | the same, dispatch, wire, recompute                                        |
| exchanges of a micro-step               | the same, but for recompute = activation, which exchanges nothing          |
| the other exchanges                     | ep, tp, etp, the engine, and under ZeRO-3 whether blocks are recomputed    |

What is asked here is what `make_plan` says, but for the last digits of seconds, which are added up in another order.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from moe_dist.config import BatchShape, Config, batch_shape
from moe_dist.parallel.mesh import Layout
from moe_dist.plan.hardware import Hardware
from moe_dist.plan.held import Held
from moe_dist.plan.memory import MemoryPlan, at_fullest, blocks, unlike
from moe_dist.plan.plan import layout_of, resolved
from moe_dist.plan.states import States, states
from moe_dist.plan.time import Exchanges, parts_of_step
from moe_dist.plan.traffic import micro_step_traffic, update_traffic
from moe_dist.plan.work import Seconds, micro_step

T = TypeVar("T")
Recompute = Literal["none", "activation", "block"]
_FEW = 4  # kinds of ranks whose exchanges are worked out before it is known which of them needs most memory


@dataclass(frozen=True, slots=True)
class Choice:
    """One layout, in keys of the configuration."""

    ep: int
    tp: int
    etp: int
    engine: str
    zero_stage: int
    micro_batch: int
    recompute: Recompute
    dispatch: str
    wire: str

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.ep, self.tp, self.etp

    @property
    def zero(self) -> tuple[str, int]:
        return self.engine, self.zero_stage

    @property
    def way(self) -> tuple[str, str]:
        """In which rows travel."""
        return self.dispatch, self.wire

    def applied(self, config: Config) -> Config:
        """`config` in this layout."""
        sequences = config.parallel.sequence_parallel and self.tp > 1
        moe: dict[str, Any] = {"dispatch": self.dispatch, "wire": self.wire}
        if self.ep * self.etp == 1:  # nothing travels
            moe |= {"overlap_chunks": 1, "wire_dtype": "same"}
        parallel = replace(config.parallel, ep=self.ep, tp=self.tp, etp=self.etp, sequence_parallel=sequences)
        how: dict[str, Any] = {"recompute": self.recompute, "moe": replace(config.model.moe, **moe)}
        zero: dict[str, Any] = {"name": self.engine, "zero_stage": self.zero_stage}
        model, engine = replace(config.model, **how), replace(config.engine, **zero)
        train = replace(config.train, micro_batch=self.micro_batch, accumulation=None)
        return replace(config, parallel=parallel, model=model, engine=engine, train=train)

    def flags(self) -> str:
        """What to give `moe-dist train` for it."""
        values = {
            "parallel.ep": self.ep,
            "parallel.tp": self.tp,
            "parallel.etp": self.etp,
            "engine.name": self.engine,
            "engine.zero-stage": self.zero_stage,
            "train.micro-batch": self.micro_batch,
            "model.recompute": self.recompute,
            "model.moe.dispatch": self.dispatch,
            "model.moe.wire": self.wire,
        }
        return " ".join(f"--{key} {value}" for key, value in values.items())


@dataclass(frozen=True, slots=True)
class _Case:
    """A choice as it would run."""

    config: Config
    shape: BatchShape
    layout: Layout


@dataclass
class Shared:
    """Layouts of `config` on so many ranks. skew: as for `make_plan`. Choices are valid ones."""

    config: Config
    ranks: int
    hardware: Hardware
    skew: float = 1.0
    _known: dict[tuple[object, ...], Any] = field(default_factory=dict)

    def compute_seconds(self, choice: Choice) -> float:
        """What a step takes at least: forward and backward passes, without exchanges, update and recomputation."""

        def all_micro_steps() -> float:
            one = sum(seconds.forward + seconds.backward for seconds in self._compute(choice).values())
            return self._case(choice).shape.accumulation * one

        return self._once(("least", *choice.sizes, choice.micro_batch), all_micro_steps)

    def least_seconds(self, choice: Choice) -> float:
        """What a step takes whichever rank it is planned for: the least of those that are not alike."""
        kinds = self._kinds(choice)
        if len(kinds) > _FEW:
            return self.compute_seconds(choice)
        return min(self.seconds(choice, rank) for rank in kinds)

    def seconds(self, choice: Choice, rank: int) -> float:
        """Of a step, planned for `rank`."""
        case, again = self._case(choice), choice.recompute == "block"

        def of_micro_step() -> Exchanges:
            lines = micro_step_traffic(case.config, case.shape, case.layout, rank, device_type=self.hardware.device)
            return Exchanges.of(lines, case.layout, self.hardware)

        def of_engine() -> tuple[Exchanges, Exchanges]:
            step, each = update_traffic(case.config, case.layout, rank)
            return Exchanges.of(step, case.layout, self.hardware), Exchanges.of(each, case.layout, self.hardware)

        one = self._once(("micro", *choice.sizes, choice.micro_batch, *choice.way, again, rank), of_micro_step)
        engine = (*choice.zero, again and choice.zero_stage == 3)
        rest, each = self._once(("engine", *choice.sizes, *engine, rank), of_engine)
        parts, hidden = parts_of_step(
            case.config,
            case.shape,
            case.layout,
            self.hardware,
            self._compute(choice),
            rest.and_then(one.and_then(each), case.shape.accumulation),
            self._held(choice, rank),
            self.skew,
        )
        return sum(parts.values()) - hidden

    def memory(self, choice: Choice) -> tuple[int, MemoryPlan]:
        """The rank that needs most, and what it needs."""
        plans = [(rank, self._memory(choice, rank)) for rank in self._kinds(choice)]
        return max(plans, key=lambda each: each[1].total)

    def sure_memory(self, choice: Choice) -> int:
        """Bytes of parameters, gradients and optimizer state on the rank that has most of them."""
        return max(self._states(choice, rank).total for rank in self._kinds(choice))

    def _memory(self, choice: Choice, rank: int) -> MemoryPlan:
        case, device = self._case(choice), self.hardware.device
        held = self._held(choice, rank)
        key = ("blocks", *choice.sizes, choice.micro_batch, *choice.way, choice.recompute, rank)
        even, skewed = self._once(
            key,
            lambda: [
                blocks(case.config, case.shape, case.layout, held, rank, device_type=device, skewed=skewed)
                for skewed in (False, True)
            ],
        )
        return at_fullest(self._states(choice, rank), even, skewed)

    def _states(self, choice: Choice, rank: int) -> States:
        case = self._case(choice)
        key = ("states", *choice.sizes, *choice.zero, case.shape.accumulation > 1, rank)
        held, device = self._held(choice, rank), self.hardware.device
        return self._once(key, lambda: states(case.config, case.layout, held, rank, device_type=device))

    def _held(self, choice: Choice, rank: int) -> Held:
        case = self._case(choice)
        return self._once(("held", *choice.sizes, rank), lambda: Held.of(case.config, case.layout, rank))

    def _compute(self, choice: Choice) -> dict[str, Seconds]:
        case = self._case(choice)
        return self._once(
            ("compute", *choice.sizes, choice.micro_batch),
            lambda: micro_step(case.config, case.shape, case.layout, self.hardware, self.skew),
        )

    def _kinds(self, choice: Choice) -> list[int]:
        case = self._case(choice)
        return self._once(("kinds", *choice.sizes), lambda: unlike(case.config.model, case.layout))

    def _case(self, choice: Choice) -> _Case:
        """Engines differ in nothing else, so most of it is made once."""
        of_engine = (*choice.sizes, choice.micro_batch, *choice.way, choice.recompute)
        case = self._once(("case", *of_engine), lambda: self._made(choice))
        return self._once(("case", *of_engine, *choice.zero), lambda: self._with_engine(case, choice))

    def _made(self, choice: Choice) -> _Case:
        changed = choice.applied(self.config)
        layout = layout_of(changed, self.ranks, self.hardware)
        return _Case(resolved(changed), batch_shape(changed.train, layout.dp), layout)

    def _with_engine(self, case: _Case, choice: Choice) -> _Case:
        zero: dict[str, Any] = {"name": choice.engine, "zero_stage": choice.zero_stage}
        engine = self._once(("of config", *choice.zero), lambda: replace(self.config.engine, **zero))
        return _Case(replace(case.config, engine=engine), case.shape, case.layout)

    def _once(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        if key not in self._known:
            self._known[key] = make()
        found: T = self._known[key]
        return found
