"""All layouts of a configuration on so many ranks, ranked by planned time; and what capacity costs.

| varied                      | over                                                                           |
|-----------------------------|--------------------------------------------------------------------------------|
| parallel.tp, ep, etp        | the divisors of the number of ranks                                            |
| engine.name, zero_stage     | native; deepspeed at 1, 2, 3 (at 0 it replicates, as native does)              |
| train.micro_batch           | what divides the sequences of a data-parallel rank; accumulation follows       |
| model.recompute             | none, activation, block: the first that fits, as each computes more            |
| model.moe.dispatch and wire | local where nothing travels, else all_to_all ragged and padded, hierarchical,  |
|                             | all_gather                                                                     |

What else the configuration says stays as it is; wire_dtype too, which changes numbers and not only their way. Valid is
what `validate` admits, and a layout fits when memory.py's total, its margin for skewed routing included, is within what
the hardware can give. A refused layout is counted under the first rule that it breaks.

Thousands are valid, so what computing alone takes (`least_seconds`) is asked first, and layouts are looked at
in that order, until it is more than the slowest of the `top` found takes in all: none of the rest can be among them.
Where one does not fit, none with a larger micro_batch is looked at.

    4 ranks, 2 experts: tp and ep of 1, 2, 4;  ep = 4 "num_experts=2 is not divisible by ep=4" falls out, whatever tp
"""

import re
from bisect import insort
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import product
from typing import Any, Literal

from moe_dist.config import Config, batch_shape, validate
from moe_dist.models.flops import flops_at_most
from moe_dist.plan.hardware import Hardware
from moe_dist.plan.kept import kept_shares
from moe_dist.plan.plan import Plan, layout_of, make_plan, needs, timed
from moe_dist.plan.size import largest, size, span
from moe_dist.plan.time import least_seconds, model_flops

_ENGINES = (("native", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3))
_WAYS = (("all_to_all", "ragged"), ("all_to_all", "padded"), ("hierarchical", "ragged"), ("all_gather", "ragged"))
_RECOMPUTE: tuple[Literal["none", "activation", "block"], ...] = ("none", "activation", "block")


@dataclass(frozen=True, slots=True)
class Choice:
    """One layout, in keys of the configuration."""

    ep: int
    tp: int
    etp: int
    engine: str
    zero_stage: int
    micro_batch: int
    recompute: str
    dispatch: str
    wire: str

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
class FallenOut:
    """Layouts that one reason keeps out. example: one of them, in its own words."""

    count: int
    example: str


@dataclass(frozen=True, slots=True)
class Search:
    """ranked: of those that fit, the `top` fastest. tried: all that there are, ranked and fallen out; layouts that
    differ in recompute alone are one. reasons: why they fell out, the commonest first."""

    ranked: list[tuple[Choice, Plan]]
    tried: int
    reasons: list[FallenOut]


@dataclass(frozen=True, slots=True)
class Price:
    """What one capacity factor costs. flops: of the step over all ranks, without what no capacity can hold."""

    factor: float | None
    plan: Plan
    flops: float


def search(config: Config, ranks: int, hardware: Hardware, skew: float = 1.0, top: int = 10) -> Search:
    """The `top` fastest. Raises ValueError where `hardware` lacks the precision."""
    hardware.peak(config.engine.precision)
    ranked: list[tuple[Choice, Plan]] = []
    out = _Reasons()
    full: dict[tuple[object, ...], int] = {}  # the smallest micro_batch that did not fit, of what is else the same
    valid = sorted(_valid(config, ranks, hardware, skew, out), key=lambda pair: pair[0])
    for place, (least, choice) in enumerate(valid):
        if len(ranked) == top and least >= ranked[-1][1].time.seconds:
            slowest = span(ranked[-1][1].time.seconds)
            message = f"not among the {top} fastest: computes for {span(least)} alone, and they take {slowest} at most"
            out.add(message, len(valid) - place, "slower")
            break
        others = astuple(replace(choice, micro_batch=0))
        if choice.micro_batch >= full.get(others, choice.micro_batch + 1):
            out.add("has a larger micro_batch than one that does not fit", 1)
        elif (found := _first_that_fits(config, ranks, hardware, choice, skew, out)) is None:
            full[others] = choice.micro_batch
        else:
            insort(ranked, found, key=lambda pair: pair[1].time.seconds)
            for slower, plan in ranked[top:]:
                out.add(f"fits, and takes {span(plan.time.seconds)} with {slower.flags()}", 1, "slower")
            del ranked[top:]
    return Search(ranked, len(ranked) + out.total, out.told())


def prices(
    config: Config, ranks: int, hardware: Hardware, factors: Sequence[float | None], skew: float = 1.0
) -> list[Price]:
    """A plan for each capacity factor of all MoE layers, in the order given. Raises ValueError as `make_plan`."""
    found = []
    for factor in factors:
        moe = replace(config.model.moe, capacity_factor=factor, capacity_schedule={})
        changed = replace(config, model=replace(config.model, moe=moe))
        plan = make_plan(changed, ranks, hardware, skew)
        kept = kept_shares(changed.model, plan.shape.micro_step_sequences * plan.shape.seq_len, ranks)
        each = flops_at_most(changed.model, model_flops(changed), *kept)
        found.append(Price(factor, plan, plan.shape.tokens_per_step * each))
    return found


def _valid(
    config: Config, ranks: int, hardware: Hardware, skew: float, out: "_Reasons"
) -> Iterator[tuple[float, Choice]]:
    """(seconds of a step that exchanges and updates nothing and computes nothing again, the layout)."""
    for ep, tp, etp in product(_divisors(ranks), repeat=3):
        choices = list(_choices(config, ranks, ep, tp, etp))
        hopeless = _refused_with_all_else(config, ranks, choices)
        if hopeless is not None:
            out.add(hopeless, len(choices))
            continue
        least: dict[int, float] = {}  # by micro_batch: engine and dispatch do not change it
        for choice in choices:
            changed = choice.applied(config)
            reason = _refused(changed, ranks)
            if reason is not None:
                out.add(reason, 1)
                continue
            if choice.micro_batch not in least:
                layout = layout_of(changed, ranks, hardware)
                shape = batch_shape(changed.train, layout.dp)
                least[choice.micro_batch] = least_seconds(changed, shape, layout, hardware, skew)
            yield least[choice.micro_batch], choice


def _choices(config: Config, ranks: int, ep: int, tp: int, etp: int) -> Iterator[Choice]:
    """All of one set of sizes, without what `_first_that_fits` varies."""
    sequences = config.train.global_batch * tp // ranks
    ways = _WAYS if ep * etp > 1 else (("local", "ragged"),)
    for micro_batch, (engine, stage), (dispatch, wire) in product(_divisors(sequences) or [1], _ENGINES, ways):
        yield Choice(ep, tp, etp, engine, stage, micro_batch, _RECOMPUTE[0], dispatch, wire)


def _refused(config: Config, ranks: int) -> str | None:
    """The first rule that is broken."""
    try:
        validate(config, ranks)
    except ValueError as error:
        return str(error).splitlines()[0]
    return None


def _refused_with_all_else(config: Config, ranks: int, choices: Sequence[Choice]) -> str | None:
    """Why sizes are refused with every engine and every way; None if any is admitted. A micro-batch that divides is
    never the reason, so the first stands for all."""
    reasons = []
    for choice in choices:
        if choice.micro_batch == choices[0].micro_batch:
            reasons.append(_refused(choice.applied(config), ranks))
            if reasons[-1] is None:
                return None
    return reasons[0]


def _first_that_fits(
    config: Config, ranks: int, hardware: Hardware, choice: Choice, skew: float, out: "_Reasons"
) -> tuple[Choice, Plan] | None:
    """With the least recomputation for which there is memory; None if there is none. The most comes first: most that do
    not fit need no other look."""
    most = replace(choice, recompute=_RECOMPUTE[-1])
    needed = needs(most.applied(config), ranks, hardware)
    if not needed.fit(hardware):
        name, part = largest(needed.memory)
        total, usable = size(needed.memory.total), size(hardware.memory.usable)
        message = f"needs {total} of {usable} with {most.flags()}, most of it {name} ({size(part)})"
        out.add(message, 1, f"memory: {name}")
        return None
    for recompute in _RECOMPUTE[:-1]:
        less = replace(choice, recompute=recompute)
        lighter = needs(less.applied(config), ranks, hardware)
        if lighter.fit(hardware):
            return less, timed(lighter, hardware, skew)
    return most, timed(needed, hardware, skew)


class _Reasons:
    """Why layouts fell out: messages that differ in numbers alone are one reason."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, message: str, count: int, kind: str | None = None) -> None:
        kind = re.sub(r"[\d.]+", "#", message) if kind is None else kind
        self._counts[kind] += count
        self._examples.setdefault(kind, message)

    @property
    def total(self) -> int:
        return self._counts.total()

    def told(self) -> list[FallenOut]:
        return [FallenOut(count, self._examples[kind]) for kind, count in self._counts.most_common()]


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
