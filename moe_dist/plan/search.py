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
to know that it is not among the `top`: what computing alone takes, then all of a step, then whether memory is there
without recomputation, and so on with more of it. The one that could be fastest comes next, until that is more than the
slowest of the `top` takes in all. Where one does not fit, a larger micro_batch does not either.

    4 ranks, 2 experts: tp and ep of 1, 2, 4;  ep = 4 "num_experts=2 is not divisible by ep=4" falls out, whatever tp
"""

import math
import re
from bisect import insort
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
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
    node = hardware.ranks_per_node if hardware.ranks_per_node < ranks else None
    choices = list(_valid(config, ranks, node, out))
    looked = _Looked(shared, _recomputations(config, ranks, choices[0]) if choices else [], top, out)
    # (seconds that it takes at least, number in the order of the product above, looks so far)
    waiting = [(shared.compute_seconds(choice), number, 0) for number, choice in enumerate(choices)]
    heapify(waiting)
    while waiting:
        least, number, looks = heappop(waiting)
        if least * _ROUNDED >= looked.slowest:
            they, count = f"they take {span(looked.slowest)} at most", len(waiting) + 1
            out.add(f"not among the {top} fastest: takes {span(least)} at least, and {they}", count, "slower")
            break
        more = looked.closer(choices[number], looks)
        if more is not None:
            heappush(waiting, (more, number, looks + 1))
    plans = [(choice, make_plan(choice.applied(config), ranks, hardware, skew)) for _, choice in looked.ranked]
    plans.sort(key=lambda pair: pair[1].time.seconds)
    return Search(plans, len(plans) + out.total, out.told())


@dataclass
class _Looked:
    """Layouts that were looked at. again: kinds of recomputation, the least first. ranked: the fastest that fit, `top`
    at most, with their seconds. full: the smallest micro_batch that does not fit, of what is else the same."""

    shared: Shared
    again: Sequence[Recompute]
    top: int
    out: "_Reasons"
    ranked: list[tuple[float, Choice]] = field(default_factory=list)
    full: dict[tuple[object, ...], int] = field(default_factory=dict)

    @property
    def slowest(self) -> float:
        """Of the fastest; infinite while there are fewer."""
        return self.ranked[-1][0] if len(self.ranked) == self.top else math.inf

    def closer(self, choice: Choice, looks: int) -> float | None:
        """The seconds that it takes at least, after one more look; None if it is ranked or has fallen out. looks: so
        far; of those behind the first, each found that it does not fit with one of `again`."""
        if looks == 0:
            return self.shared.least_seconds(choice) if self._could_fit(choice) else None
        last = looks == len(self.again)
        if self._fits(replace(choice, recompute=self.again[looks - 1]), last) or last:
            return None
        return self.shared.least_seconds(replace(choice, recompute=self.again[looks]))

    def _could_fit(self, choice: Choice) -> bool:
        """Whatever is computed again."""
        sure, usable = self.shared.sure_memory(choice), self.shared.hardware.memory.usable
        if sure > usable:
            what = "parameters, gradients and optimizer state alone"
            message = f"needs {size(sure)} of {size(usable)} with {choice.flags()}, for {what}"
            self.out.add(message, 1, "memory: states")
        return sure <= usable

    def _fits(self, choice: Choice, last: bool) -> bool:
        """Whether it does; then it is ranked. last: there is no other way, so if not, the reason is told."""
        usable, kind = self.shared.hardware.memory.usable, None
        others = (*choice.sizes, *choice.zero, *choice.way, choice.recompute)
        if choice.micro_batch >= self.full.get(others, choice.micro_batch + 1):
            reason = "has a larger micro_batch than one that does not fit"
        else:
            rank, needed = self.shared.memory(choice)
            if needed.total <= usable:
                self._rank(self.shared.seconds(choice, rank), choice)
                return True
            self.full[others] = choice.micro_batch
            name, part = largest(needed)
            most = f"most of it {name} ({size(part)})"
            reason = f"needs {size(needed.total)} of {size(usable)} with {choice.flags()}, {most}"
            kind = f"memory: {name}"
        if last:
            self.out.add(reason, 1, kind)
        return False

    def _rank(self, seconds: float, choice: Choice) -> None:
        insort(self.ranked, (seconds, choice), key=lambda pair: pair[0])
        for slower_seconds, slower in self.ranked[self.top :]:
            self.out.add(f"fits, and takes {span(slower_seconds)} with {slower.flags()}", 1, "slower")
        del self.ranked[self.top :]


def prices(
    config: Config, ranks: int, hardware: Hardware, factors: Sequence[float | None], skew: float = 1.0
) -> list[Price]:
    """A plan for each capacity factor of all MoE layers, in the order given. Raises ValueError as `make_plan`, and for
    a model without such layers."""
    if not config.model.moe.num_experts:
        raise ValueError("num_experts=0: a dense model has no capacity to price; set model.moe.num_experts")
    found = []
    for factor in factors:
        moe = replace(config.model.moe, capacity_factor=factor, capacity_schedule={})
        changed = replace(config, model=replace(config.model, moe=moe))
        plan = make_plan(changed, ranks, hardware, skew)
        kept = kept_shares(changed.model, plan.shape.micro_step_sequences * plan.shape.seq_len, ranks)
        each = flops_at_most(changed.model, model_flops(changed), *kept)
        found.append(Price(factor, plan, plan.shape.tokens_per_step * each))
    return found


def _valid(config: Config, ranks: int, node: int | None, out: "_Reasons") -> Iterator[Choice]:
    """What rules admit. They are of engines or of how rows travel, and none is of both, nor of a micro_batch that
    divides: what is admitted in one way, and by one engine, is admitted together. node: as for `_broken`."""
    hopeless: set[str] = set()
    for ep, tp, etp in product(_divisors(ranks), repeat=3):
        choices = list(_choices(config, ranks, ep, tp, etp))
        first = choices[0]
        lines = _broken(first.applied(config), ranks, node)
        if hopeless.intersection(lines):  # known from other sizes: whatever the engine, however rows travel
            out.add(lines[0], len(choices))
            continue
        ways, engines = {first.way: lines}, {first.zero: lines}
        for choice in choices:
            if choice.micro_batch == first.micro_batch and choice.zero == first.zero and choice.way not in ways:
                ways[choice.way] = _broken(choice.applied(config), ranks, node)
            if choice.micro_batch == first.micro_batch and choice.way == first.way and choice.zero not in engines:
                engines[choice.zero] = _broken(choice.applied(config), ranks, node)
        always = set(lines).intersection(*ways.values(), *engines.values())
        if always:
            hopeless |= always
            out.add(lines[0], len(choices))
            continue
        for choice in choices:
            admitted = not ways[choice.way] and not engines[choice.zero]
            broken = [] if admitted else _broken(choice.applied(config), ranks, node)
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


def _broken(config: Config, ranks: int, node: int | None = None) -> list[str]:
    """A line for each rule. node: ranks of one, where there are several and the configuration does not say."""
    if config.model.moe.dispatch == "hierarchical" and config.parallel.node_size is None:
        config = replace(config, parallel=replace(config.parallel, node_size=node))
    try:
        validate(config, ranks)
    except ValueError as error:
        return str(error).splitlines()
    return []


def _recomputations(config: Config, ranks: int, choice: Choice) -> list[Recompute]:
    """Those that rules admit, in one layout as in all; the last computes most."""
    return [each for each in _RECOMPUTE if not _broken(replace(choice, recompute=each).applied(config), ranks)]


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
