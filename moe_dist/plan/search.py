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

Thousands are valid, so what they share is worked out once (shared.py), and each is looked at no closer than it takes
to know that it is not among the `top`: what computing alone takes, then all of a step without recomputation, then
memory. The one that could be fastest comes next, until that is more than the slowest of the `top` takes in all. Where
one does not fit, none with a larger micro_batch is looked at.

    4 ranks, 2 experts: tp and ep of 1, 2, 4;  ep = 4 "num_experts=2 is not divisible by ep=4" falls out, whatever tp
"""

import re
from bisect import insort
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from itertools import product

from moe_dist.config import Config, validate
from moe_dist.models.flops import flops_at_most
from moe_dist.plan.hardware import Hardware
from moe_dist.plan.kept import kept_shares
from moe_dist.plan.plan import Plan, make_plan
from moe_dist.plan.shared import Choice, Recompute, Shared
from moe_dist.plan.size import largest, size, span
from moe_dist.plan.time import model_flops

_ENGINES = (("native", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3))
_WAYS = (("all_to_all", "ragged"), ("all_to_all", "padded"), ("hierarchical", "ragged"), ("all_gather", "ragged"))
_ROUNDED = 1 - 1e-9  # sums of the same seconds differ in their last digits
_RECOMPUTE: tuple[Recompute, ...] = ("none", "activation", "block")


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
    shared, out = Shared(config, ranks, hardware, skew), _Reasons()
    ranked: list[tuple[float, Choice]] = []
    full: dict[tuple[object, ...], int] = {}  # the smallest micro_batch that did not fit, of what is else the same
    # (seconds that it takes at least, number in the order of the product above, whether that is more than compute)
    choices = list(_valid(config, ranks, out))
    again = [] if not choices else _recomputations(config, ranks, choices[0])
    waiting = [(shared.compute_seconds(choice), number, False) for number, choice in enumerate(choices)]
    heapify(waiting)
    while waiting:
        least, number, whole = heappop(waiting)
        choice = choices[number]
        if len(ranked) == top and least * _ROUNDED >= ranked[-1][0]:
            slowest = span(ranked[-1][0])
            message = f"not among the {top} fastest: takes {span(least)} at least, and they take {slowest} at most"
            out.add(message, len(waiting) + 1, "slower")
            break
        others = (*choice.sizes, *choice.zero, *choice.way)
        if choice.micro_batch >= full.get(others, choice.micro_batch + 1):
            out.add("has a larger micro_batch than one that does not fit", 1)
        elif not whole:
            heappush(waiting, (shared.least_seconds(choice), number, True))
        elif (found := _first_that_fits(shared, choice, again, out)) is None:
            full[others] = choice.micro_batch
        else:
            insort(ranked, found, key=lambda pair: pair[0])
            for seconds, slower in ranked[top:]:
                out.add(f"fits, and takes {span(seconds)} with {slower.flags()}", 1, "slower")
            del ranked[top:]
    plans = [(choice, make_plan(choice.applied(config), ranks, hardware, skew)) for _, choice in ranked]
    plans.sort(key=lambda pair: pair[1].time.seconds)
    return Search(plans, len(plans) + out.total, out.told())


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


def _valid(config: Config, ranks: int, out: "_Reasons") -> Iterator[Choice]:
    """What rules admit. They are of engines or of how rows travel, and none is of both, nor of a micro_batch that
    divides: what is admitted in one way, and by one engine, is admitted together."""
    hopeless: set[str] = set()
    for ep, tp, etp in product(_divisors(ranks), repeat=3):
        choices = list(_choices(config, ranks, ep, tp, etp))
        first = choices[0]
        lines = _broken(first.applied(config), ranks)
        if hopeless.intersection(lines):  # known from other sizes: whatever the engine, however rows travel
            out.add(lines[0], len(choices))
            continue
        ways, engines = {first.way: lines}, {first.zero: lines}
        for choice in choices:
            if choice.micro_batch == first.micro_batch and choice.zero == first.zero and choice.way not in ways:
                ways[choice.way] = _broken(choice.applied(config), ranks)
            if choice.micro_batch == first.micro_batch and choice.way == first.way and choice.zero not in engines:
                engines[choice.zero] = _broken(choice.applied(config), ranks)
        always = set(lines).intersection(*ways.values(), *engines.values())
        if always:
            hopeless |= always
            out.add(lines[0], len(choices))
            continue
        for choice in choices:
            admitted = not ways[choice.way] and not engines[choice.zero]
            broken = [] if admitted else _broken(choice.applied(config), ranks)
            if broken:
                out.add(broken[0], 1)
            else:
                yield choice


def _choices(config: Config, ranks: int, ep: int, tp: int, etp: int) -> Iterator[Choice]:
    """All of one set of sizes, without what `_first_that_fits` varies. The first has the first engine and way."""
    sequences = config.train.global_batch * tp // ranks
    ways = _WAYS if ep * etp > 1 else (("local", "ragged"),)
    for micro_batch, (engine, stage), (dispatch, wire) in product(_divisors(sequences) or [1], _ENGINES, ways):
        yield Choice(ep, tp, etp, engine, stage, micro_batch, _RECOMPUTE[0], dispatch, wire)


def _broken(config: Config, ranks: int) -> list[str]:
    """A line for each rule."""
    try:
        validate(config, ranks)
    except ValueError as error:
        return str(error).splitlines()
    return []


def _recomputations(config: Config, ranks: int, choice: Choice) -> list[Recompute]:
    """Those that rules admit, in one layout as in all; the last computes most."""
    return [each for each in _RECOMPUTE if not _broken(replace(choice, recompute=each).applied(config), ranks)]


def _first_that_fits(
    shared: Shared, choice: Choice, again: Sequence[Recompute], out: "_Reasons"
) -> tuple[float, Choice] | None:
    """With the least recomputation for which there is memory, and the seconds of a step; None if there is none. What
    is there whatever is computed again comes first, and then the most of it: most that do not fit need no other look.
    """
    memory = shared.hardware.memory
    sure = shared.sure_memory(choice)
    if sure > memory.usable:
        what = "parameters, gradients and optimizer state alone"
        message = f"needs {size(sure)} of {size(memory.usable)} with {choice.flags()}, for {what}"
        out.add(message, 1, "memory: states")
        return None
    most = replace(choice, recompute=again[-1])
    rank, needed = shared.memory(most)
    if needed.total > memory.usable:
        name, part = largest(needed)
        total, usable = size(needed.total), size(memory.usable)
        message = f"needs {total} of {usable} with {most.flags()}, most of it {name} ({size(part)})"
        out.add(message, 1, f"memory: {name}")
        return None
    for recompute in again[:-1]:
        less = replace(choice, recompute=recompute)
        of_less, needed = shared.memory(less)
        if needed.total <= memory.usable:
            return shared.seconds(less, of_less), less
    return shared.seconds(most, rank), most


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
