"""What a machine can do, as the planner needs it: one YAML file for each kind, from a datasheet or measured.

| question               | datasheet                               | measured (measure.py)                           |
|------------------------|-----------------------------------------|-------------------------------------------------|
| a matrix product       | the slower of FLOPs / (peak * reached)  | FLOPs / the rate that products of its size have |
|                        | and bytes / (bandwidth * reached)       |                                                 |
| attention scores       | FLOPs / (peak * attention)              | the same, its share measured                    |
| bytes through memory   | bytes / (bandwidth * reached)           | bytes / the rate of copies of that size         |
| a collective on a link | latency * log2(ranks)                   | the seconds of calls of that size               |
|                        | + bytes / (bandwidth * reached)         |                                                 |
| what the host does     | assumed for each block and each step    | seconds of the smallest model, on this host     |

This is the roofline of Williams, Waterman and Patterson (CACM 52, 2009), with the shares of its roofs that are
reached.

`inside`: bandwidth is what one rank sends to others of its node. `between`: what a node sends to others over all its
ports together, so ranks of a node share it. Both are bytes a second in one direction.

A file is found by its path, or by its name (`h100`) in ./configs/hardware, beside this package, or where pip put it.
"""

import math
import sysconfig
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal, get_args

import yaml

from moe_dist.config.model import STRICT
from moe_dist.config.parse import parse_as
from moe_dist.config.read import Dumper, read_yaml
from moe_dist.config.rules.parts import refuse
from moe_dist.config.values import user_path
from moe_dist.plan.transfer import Collective

_ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}


@dataclass(kw_only=True, slots=True)
class Products:
    """Matrix products in one precision."""

    __pydantic_config__ = STRICT

    peak: float
    """FLOP/s of one rank: dense, by the datasheet, or the best that was measured."""
    reached: float = 1.0
    """The share of it that large products reach."""
    attention: float = 1.0
    """The share of it that the products of attention reach, softmax included."""
    rates: list[tuple[float, float, float]] = field(default_factory=list)
    """Measured: (rows, side, FLOP/s) of products [rows, side] x [side, side], a full grid."""


@dataclass(kw_only=True, slots=True)
class Memory:
    """Of one rank."""

    __pydantic_config__ = STRICT

    bytes: int
    reserved: int = 0
    """What the driver, libraries and the gaps of the allocator take."""
    bandwidth: float
    """Bytes a second, read and written together."""
    reached: float = 1.0
    rates: list[tuple[float, float]] = field(default_factory=list)
    """Measured: (bytes read and written, bytes a second)."""

    @property
    def usable(self) -> int:
        return self.bytes - self.reserved


@dataclass(kw_only=True, slots=True)
class Curve:
    """Calls of one collective, measured."""

    __pydantic_config__ = STRICT

    ranks: int
    """Of the group."""
    seconds: list[tuple[float, float]]
    """(bytes that leave a rank inside a node, or a node between nodes; seconds of one call), by size."""


@dataclass(kw_only=True, slots=True)
class Link:
    """What ranks talk over."""

    __pydantic_config__ = STRICT

    bandwidth: float
    latency: float
    """Seconds of the smallest message between two ranks."""
    reached: dict[str, float] = field(default_factory=dict)
    """Share of the bandwidth, by collective; of one that is not named, that of all_reduce, else 1."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """By collective; one that is not named is taken for an all_reduce of as many bytes on the wire."""

    def seconds(self, collective: Collective, sent: float, ranks: int) -> float:
        """Of one call. sent: bytes that leave a rank (inside), or all ranks of a node together (between)."""
        curve = self.curves.get(collective) or self.curves.get("all_reduce")
        hops = math.log2(max(ranks, 2))
        if curve is None:
            share = self.reached.get(collective, self.reached.get("all_reduce", 1.0))
            return self.latency * hops + sent / (self.bandwidth * share)
        longer = hops / math.log2(max(curve.ranks, 2)) - 1
        return _seconds_at(curve.seconds, sent) + longer * curve.seconds[0][1]


@dataclass(kw_only=True, slots=True)
class Host:
    """Seconds in which Python and the launching of kernels keep a rank, whatever the sizes; forward and backward of one
    micro-step. On a GPU they pass while the device computes; on a CPU they add up."""

    __pydantic_config__ = STRICT

    dense_block: float = 0.0
    moe_block: float = 0.0
    micro_step: float = 0.0
    """Embedding, loss and what surrounds the blocks."""
    step: float = 0.0
    """The update, for each optimizer step."""


@dataclass(kw_only=True, slots=True)
class Hardware:
    """One kind of machine."""

    __pydantic_config__ = STRICT

    name: str
    device: Literal["cpu", "cuda"]
    source: Literal["datasheet", "measured"]
    origin: list[str]
    """Where each figure comes from; what is assumed says so."""
    when: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    ranks_per_node: int
    memory: Memory
    products: dict[str, Products]
    """By precision: fp32, bf16, fp8."""
    inside: Link | None = None
    between: Link | None = None
    host: Host = field(default_factory=Host)

    def peak(self, precision: str) -> float:
        """FLOP/s of one rank. Raises ValueError where the file does not say."""
        return self._products(precision).peak

    def product_seconds(self, precision: str, rows: float, fan_in: float, fan_out: float, groups: float = 1) -> float:
        """Of `groups` products, each [rows / groups, fan_in] x [fan_in, fan_out]. Raises ValueError for a precision
        that the file does not have."""
        products = self._products(precision)
        flops = 2 * rows * fan_in * fan_out
        if products.rates:
            return flops / _rate_at(products.rates, rows / groups, math.sqrt(fan_in * fan_out))
        moved = _ITEM_BYTES[precision] * (groups * fan_in * fan_out + rows * (fan_in + fan_out))
        return max(flops / (products.peak * products.reached), self.memory_seconds(moved))

    def attention_seconds(self, precision: str, flops: float) -> float:
        """Of scores, softmax and weighted sum together. Raises ValueError as `product_seconds`."""
        products = self._products(precision)
        return flops / (products.peak * products.attention)

    def memory_seconds(self, moved: float, times: float = 1) -> float:
        """Of `times` operations that read and write `moved` bytes each."""
        memory = self.memory
        if memory.rates and moved > 0:
            return times * moved / _line_at(memory.rates, moved)
        return times * moved / (memory.bandwidth * memory.reached)

    def link(self, where: Literal["inside", "between"]) -> Link:
        """Raises ValueError where the file does not say."""
        found = self.inside if where == "inside" else self.between
        if found is None:
            nodes = "two ranks of a node" if where == "inside" else "two nodes"
            raise ValueError(
                f"hardware {self.name} says nothing of the link {where}: measure it on {nodes}, or add `{where}:` to it"
            )
        return found

    def _products(self, precision: str) -> Products:
        if precision not in self.products:
            known = ", ".join(self.products)
            raise ValueError(
                f"hardware {self.name} does not say how fast {precision} products are, but {known}; "
                f"set engine.precision, or add products.{precision} to the file"
            )
        return self.products[precision]


def load_hardware(name: str) -> Hardware:
    """By name, such as `h100`, or path. Raises ValueError where there is none, and naming every key that is wrong."""
    path = _find(name)
    hardware = parse_as(Hardware, read_yaml(path), str(path))
    refuse(f"{path}: {problem}" for problem in _problems(hardware))
    return hardware


def dump_hardware(hardware: Hardware) -> str:
    """YAML that `load_hardware` reads back as an equal Hardware."""
    return yaml.dump(asdict(hardware), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def hardware_folders() -> list[Path]:
    """Where names are looked up."""
    return [
        Path("configs/hardware"),
        Path(__file__).parents[2] / "configs" / "hardware",
        Path(sysconfig.get_path("data")) / "share" / "moe_dist" / "hardware",
    ]


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return user_path(name)
    known: set[str] = set()
    for folder in hardware_folders():
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
        known |= {path.stem for path in folder.glob("*.yaml")}
    raise ValueError(
        f"--hardware {name!r} is none of {', '.join(sorted(known))}; give one of them or the path of a YAML file, "
        "which moe-dist plan --measure FILE writes"
    )


def _problems(hardware: Hardware) -> Iterator[str]:
    memory, products, links = hardware.memory, hardware.products, _links(hardware)
    above_zero = {
        "ranks_per_node": hardware.ranks_per_node,
        "memory.bytes": memory.bytes,
        "memory.bandwidth": memory.bandwidth,
        "memory.rates": min(chain.from_iterable(memory.rates), default=1.0),
    }
    shares = {"memory.reached": memory.reached}
    for name, of in products.items():
        above_zero[f"products.{name}.peak"] = of.peak
        above_zero[f"products.{name}.rates"] = min(chain.from_iterable(of.rates), default=1.0)
        shares |= {f"products.{name}.reached": of.reached, f"products.{name}.attention": of.attention}
    for where, link in links:
        above_zero[f"{where}.bandwidth"] = link.bandwidth
        shares |= {f"{where}.reached.{name}": share for name, share in link.reached.items()}
        for name, curve in link.curves.items():
            above_zero[f"{where}.curves.{name}.ranks"] = curve.ranks
            above_zero[f"{where}.curves.{name}.seconds"] = min(chain.from_iterable(curve.seconds), default=1.0)
    yield from (f"{key}: {value} is not above 0" for key, value in above_zero.items() if not value > 0)
    yield from (f"{key}: {value} is outside 0 < share <= 1" for key, value in shares.items() if not 0 < value <= 1)
    if not 0 <= memory.reserved < memory.bytes:
        yield f"memory.reserved: {memory.reserved} is not below memory.bytes={memory.bytes}"
    if not products:
        yield "products: says nothing; give fp32, bf16 or fp8"
    for name, of in products.items():
        if name not in _ITEM_BYTES:
            yield f"products.{name}: is none of {', '.join(_ITEM_BYTES)}"
        if of.rates and len({row for row, *_ in of.rates}) * len({side for _, side, _ in of.rates}) != len(of.rates):
            yield f"products.{name}.rates: is no grid; give each number of rows with each side, once"
    yield from _not_growing("memory.rates", memory.rates)
    not_below_zero = {f"host.{name}": seconds for name, seconds in asdict(hardware.host).items()}
    not_below_zero |= {f"{where}.latency": link.latency for where, link in links}
    yield from (f"{key}: {value} is below 0" for key, value in not_below_zero.items() if value < 0)
    for where, link in links:
        for key, names in (("reached", link.reached), ("curves", link.curves)):
            for name in sorted(names.keys() - set(get_args(Collective))):
                yield f"{where}.{key}.{name}: is none of {', '.join(get_args(Collective))}"
        for name, curve in link.curves.items():
            yield from _not_growing(f"{where}.curves.{name}.seconds", curve.seconds)
            if not curve.seconds:
                yield f"{where}.curves.{name}.seconds: says nothing; leave {name} out"


def _not_growing(key: str, points: Sequence[tuple[float, float]]) -> Iterator[str]:
    sizes = [size for size, _ in points]
    if any(left >= right for left, right in pairwise(sizes)):
        yield f"{key}: sizes must grow, got {sizes}"


def _links(hardware: Hardware) -> list[tuple[str, Link]]:
    both = (("inside", hardware.inside), ("between", hardware.between))
    return [(where, link) for where, link in both if link is not None]


def _seconds_at(points: Sequence[tuple[float, float]], size: float) -> float:
    """Between measured sizes in a straight line; below the smallest as long as it, above the largest in proportion."""
    sizes = [at for at, _ in points]
    place = bisect_left(sizes, size)
    if place == 0:
        return points[0][1]
    if place == len(points):
        return points[-1][1] * size / points[-1][0]
    (low, fast), (high, slow) = points[place - 1], points[place]
    return fast + (slow - fast) * (size - low) / (high - low)


def _line_at(points: Sequence[tuple[float, float]], size: float) -> float:
    """A rate by size: in a straight line over the logarithm of the size, and flat outside."""
    place = bisect_left([at for at, _ in points], size)
    if place in (0, len(points)):
        return points[min(place, len(points) - 1)][1]
    (low, left), (high, right) = points[place - 1], points[place]
    return left + (right - left) * math.log(size / low) / math.log(high / low)


def _rate_at(grid: Sequence[tuple[float, float, float]], rows: float, side: float) -> float:
    """Of a product, from a grid of (rows, side, rate): `_line_at` over both."""
    by_side: dict[float, list[tuple[float, float]]] = {}
    for at, across, rate in sorted(grid):
        by_side.setdefault(across, []).append((at, rate))
    return _line_at([(across, _line_at(line, rows)) for across, line in sorted(by_side.items())], side)
