"""A plan: what one configuration needs and takes on so many ranks of a kind of machine.

`make_plan` asks memory.py, traffic.py and time.py about one rank, the fullest; nothing is allocated and no process is
started. `as_json` is all of it for other programs.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moe_dist.config import BatchShape, Config, validate
from moe_dist.config.model import MoEConfig
from moe_dist.parallel.mesh import Layout
from moe_dist.plan.hardware import Hardware
from moe_dist.plan.held import Held
from moe_dist.plan.memory import MemoryPlan, fullest
from moe_dist.plan.time import TimePlan, exchange_seconds, step_time
from moe_dist.plan.traffic import traffic
from moe_dist.plan.transfer import Transfer, links


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """rank: the one whose memory this is, the fullest. transfers: its own, in one optimizer step."""

    config: Config
    shape: BatchShape
    layout: Layout
    hardware: Hardware
    rank: int
    memory: MemoryPlan
    transfers: Sequence[Transfer]
    time: TimePlan

    @property
    def fits(self) -> bool:
        """With the margin that skewed routing needs."""
        return self.memory.total <= self.hardware.memory.usable

    def as_json(self) -> dict[str, Any]:
        """Numbers alone, in bytes and seconds."""
        layout, hardware = self.layout, self.hardware
        sizes = {"world": layout.world, "dp": layout.dp, "tp": layout.tp, "ep": layout.ep, "etp": layout.etp}
        return {
            "layout": sizes | {"edp": layout.edp, "ranks_per_node": hardware.ranks_per_node},
            "batch": asdict(self.shape),
            "hardware": {"name": hardware.name, "source": hardware.source, "usable_bytes": hardware.memory.usable},
            "fits": self.fits,
            "rank": self.rank,
            "memory": self.memory.parts | {"total": self.memory.total, "moment": self.memory.moment},
            "transfers": [self._transfer(each) for each in self.transfers],
            "time": asdict(self.time) | {"tokens_per_second": self.tokens_per_second, "tflops": self.tflops},
        }

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks."""
        return self.shape.tokens_per_step / self.time.seconds

    @property
    def tflops(self) -> float:
        """10^12 model FLOP/s of one rank."""
        return self.time.flops / self.time.seconds / self.layout.world / 1e12

    def sent(self) -> tuple[int, int]:
        """Bytes that leave the rank in a step: (inside a node, between nodes)."""
        both = [links(each, self.hardware.ranks_per_node) for each in self.transfers]
        return sum(inside for inside, _ in both), sum(between for _, between in both)

    def _transfer(self, each: Transfer) -> dict[str, Any]:
        inside, between = links(each, self.hardware.ranks_per_node)
        seconds = exchange_seconds(each, self.layout, self.hardware)
        told: dict[str, Any] = {
            "collective": each.collective,
            "axis": each.axis,
            "ranks": len(each.ranks),
            "phase": each.phase,
        }
        told |= {"what": each.what, "calls": each.calls, "bytes": each.bytes}
        return told | {"inside": inside, "between": between, "seconds": seconds}


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """The first half of a plan, and the cheaper one: what the fullest rank needs. config: with `auto` resolved."""

    config: Config
    shape: BatchShape
    layout: Layout
    rank: int
    memory: MemoryPlan

    def fit(self, hardware: Hardware) -> bool:
        """With the margin that skewed routing needs."""
        return self.memory.total <= hardware.memory.usable


def make_plan(config: Config, ranks: int, hardware: Hardware, skew: float = 1.0) -> Plan:
    """skew: rows of the busiest rank's experts over an even share, for the time; memory has a margin of its own.

    Raises ValueError with a line for every rule that the configuration breaks on so many ranks, and where `hardware`
    lacks its precision.
    """
    if not math.isfinite(skew):
        raise ValueError(f"skew={skew} is no finite number; write how busy the busiest rank is, such as 1.5")
    if skew < 1:
        raise ValueError(f"skew={skew} is below 1, an even share; nobody is busier than the busiest rank")
    return timed(needs(config, ranks, hardware), hardware, skew)


def needs(config: Config, ranks: int, hardware: Hardware) -> Needs:
    """Raises ValueError with a line for every rule that the configuration breaks on so many ranks."""
    shape = validate(config, ranks)
    config = resolved(config)
    layout = layout_of(config, ranks, hardware)
    rank, needed = fullest(config, shape, layout, device_type=hardware.device)
    return Needs(config=config, shape=shape, layout=layout, rank=rank, memory=needed)


def timed(needs: Needs, hardware: Hardware, skew: float = 1.0) -> Plan:
    """The other half."""
    config, shape, layout, rank = needs.config, needs.shape, needs.layout, needs.rank
    transfers = traffic(config, shape, layout, rank, device_type=hardware.device)
    time = step_time(config, shape, layout, hardware, transfers, Held.of(config, layout, rank), skew)
    return Plan(
        config=config,
        shape=shape,
        layout=layout,
        hardware=hardware,
        rank=rank,
        memory=needs.memory,
        transfers=transfers,
        time=time,
    )


def layout_of(config: Config, ranks: int, hardware: Hardware) -> Layout:
    """On nodes of this hardware, unless parallel.node_size says otherwise."""
    parallel = config.parallel
    node_size = parallel.node_size or hardware.ranks_per_node
    return Layout(ranks, parallel.ep, parallel.tp, node_size, parallel.etp)


def resolved(config: Config) -> Config:
    """`auto` dispatch by its name, and the capacity factor with which training begins."""
    model, ranks = config.model, config.parallel.expert_ranks

    def of(moe: MoEConfig) -> MoEConfig:
        dispatch = moe.dispatch if moe.dispatch != "auto" else "local" if ranks == 1 else "all_to_all"
        return replace(moe, dispatch=dispatch, capacity_factor=moe.factor_at(0), capacity_schedule={})

    attention, moe = model.attention, model.moe
    if attention.kind == "switch":
        attention = replace(attention, moe=of(attention.moe))
    if moe.num_experts:
        moe = of(moe)
    return replace(config, model=replace(model, moe=moe, attention=attention))
