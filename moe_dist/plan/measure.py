"""`moe-dist plan --measure FILE`: this machine, or under torchrun the nodes of this job, as a hardware file.

| what           | how                                                                                            |
|----------------|------------------------------------------------------------------------------------------------|
| products       | forward and both backward products of [rows, side] x [side, side], in fp32 and bf16            |
| attention      | torch's fused attention, causal, forward and backward, as a share of the best product          |
| memory         | copies of growing size                                                                         |
| host           | the smallest models of one and three blocks: what a block takes that computes next to nothing  |
| inside         | all_reduce, all_to_all, all_gather and reduce_scatter by size, among the ranks of each node    |
| between        | the same among the ranks with the same place on each node                                      |

All ranks do the same at once, as in training: what they share, cores, memory or cables, they share here too, and a
figure is that of the slowest. It takes tens of seconds; sizes stop growing where one call takes longer than a second.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe_dist.config import EngineConfig, ModelConfig, MoEConfig, OptimConfig
from moe_dist.config.rules.memory import machine_memory
from moe_dist.config.values import user_path
from moe_dist.disk import replace_text
from moe_dist.engine.native import NativeEngine
from moe_dist.kernels.random import RandomKey
from moe_dist.models.backends import resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.collectives import all_gather, all_reduce, exchange_rows, reduce_scatter
from moe_dist.parallel.launch import rank_from_environment, start, stop
from moe_dist.parallel.mesh import Group, create_mesh, single_process_mesh
from moe_dist.plan.hardware import Curve, Hardware, Host, Link, Memory, Products, dump_hardware
from moe_dist.plan.size import size, span
from moe_dist.plan.transfer import Collective, wire_bytes
from moe_dist.step import StepContext

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_GRIDS = {"cpu": ((8, 64, 512, 2048), (128, 512, 1024)), "cuda": ((64, 512, 4096, 16384), (1024, 4096, 8192))}
_COPIES = {"cpu": (2**16, 2**19, 2**22, 2**25, 2**27), "cuda": (2**18, 2**22, 2**26, 2**30)}
_MESSAGES = (2**12, 2**15, 2**18, 2**20, 2**22, 2**24, 2**26)
_COLLECTIVES: tuple[Collective, ...] = ("all_reduce", "all_to_all", "all_gather", "reduce_scatter")
_ENOUGH = 0.05  # seconds of one timing
_LONGEST = 1.0  # seconds of a call after which messages grow no more
_TIMES = 3
_ASLEEP = 16  # width and tokens of a model that computes next to nothing


def measure(own: argparse.Namespace) -> int:
    """own: of measure_arguments. Every rank must call. Returns the exit code."""
    rank = rank_from_environment(os.environ)
    device = start(rank, own.device)
    try:
        found = measured(device, rank.world, int(os.environ["LOCAL_WORLD_SIZE"]), own.name)
    finally:
        stop()
    if rank.rank == 0:
        path = user_path(own.measure)
        replace_text(path, dump_hardware(found))
        print("\n".join([*told(found), f"written to {path}; plan with --hardware {path}"]))
    return 0


def measured(device: torch.device, world: int, ranks_per_node: int, name: str | None = None) -> Hardware:
    """Every rank of the default group must call, and gets the same. ranks_per_node divides world, or is refused with a
    ValueError."""
    if world % ranks_per_node:
        raise ValueError(f"{world} ranks lie unevenly on nodes of {ranks_per_node}: start as many on every node")
    mesh = create_mesh(ep=ranks_per_node, tp=1, node_size=ranks_per_node)
    memory = _memory(device, ranks_per_node)
    products = {precision: _products(device, dtype) for precision, dtype in _PRECISIONS.items()}
    host = _host(device)
    inside = _link(mesh.ep, device, 1) if ranks_per_node > 1 else None
    between = _link(mesh.edp, device, ranks_per_node) if world > ranks_per_node else None
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    threads = f", {torch.get_num_threads()} threads a rank" if device.type == "cpu" else ""
    return Hardware(
        name=name or f"{chip}{threads}, {world // ranks_per_node} x {ranks_per_node} ranks",
        device="cuda" if device.type == "cuda" else "cpu",
        source="measured",
        origin=[f"moe-dist plan --measure, {world} ranks on {world // ranks_per_node} nodes"],
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={"torch": str(torch.__version__), "python": platform.python_version()},
        ranks_per_node=ranks_per_node,
        memory=memory,
        products=products,
        inside=inside,
        between=between,
        host=host,
    )


def told(found: Hardware) -> Iterator[str]:
    """For people."""
    yield found.name
    for precision, products in found.products.items():
        share = f"attention {products.attention:.0%} of it"
        yield f"  {precision:<8} {products.peak / 1e9:.4g} GFLOP/s at best, {share}"
    yield f"  memory   {size(found.memory.usable)} a rank, copies at {found.memory.bandwidth / 1e9:.3g} GB/s at best"
    host = found.host
    blocks = f"{span(host.dense_block)} a dense block, {span(host.moe_block)} an MoE block"
    yield f"  host     {blocks}, {span(host.micro_step)} a micro-step, {span(host.step)} a step"
    for name, link in (("inside", found.inside), ("between", found.between)):
        if link is None:
            yield f"  {name:<8} not measured: no two ranks so"
        else:
            yield f"  {name:<8} {link.bandwidth / 1e9:.3g} GB/s, {span(link.latency)} the smallest message"


def _products(device: torch.device, dtype: torch.dtype) -> Products:
    rows, sides = _GRIDS[device.type]
    rates = [(float(m), float(side), _product_rate(device, dtype, m, side)) for side in sides for m in rows]
    peak = max(rate for *_, rate in rates)
    return Products(peak=peak, attention=min(1.0, _attention_rate(device, dtype) / peak), rates=rates)


def _product_rate(device: torch.device, dtype: torch.dtype, rows: int, side: int) -> float:
    x, w, dy = (torch.randn(*shape, device=device).to(dtype) for shape in ((rows, side), (side, side), (rows, side)))

    def work() -> None:
        F.linear(x, w)
        dy @ w
        dy.t() @ x

    return 6 * rows * side * side / _seconds(work, device)


def _attention_rate(device: torch.device, dtype: torch.dtype) -> float:
    heads, length, width = 8, 1024, 64
    q, k, v = (torch.randn(1, heads, length, width, device=device).to(dtype).requires_grad_() for _ in range(3))

    def work() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()  # type: ignore[no-untyped-call]

    return 3 * 4 * heads * width * length * (length + 1) / 2 / _seconds(work, device)


def _memory(device: torch.device, ranks_per_node: int) -> Memory:
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        reserved = whole - free
    else:
        whole, reserved = machine_memory() // ranks_per_node, 0
    rates = []
    for count in _COPIES[device.type]:
        x = torch.ones(count // 4, device=device)
        y = torch.empty_like(x)
        rates.append((2.0 * count, 2 * count / _seconds(partial(y.copy_, x), device)))
    best = max(rate for _, rate in rates)
    return Memory(bytes=whole, reserved=reserved, bandwidth=best, rates=rates)


def _host(device: torch.device) -> Host:
    dense = [_model_seconds(device, layers, experts=0) for layers in (1, 3)]
    sparse = [_model_seconds(device, layers, experts=4) for layers in (1, 3)]
    block = max(0.0, dense[1][0] - dense[0][0]) / 2
    return Host(
        dense_block=block,
        moe_block=max(0.0, sparse[1][0] - sparse[0][0]) / 2,
        micro_step=max(0.0, dense[0][0] - block),
        step=dense[0][1],
    )


def _model_seconds(device: torch.device, layers: int, experts: int) -> tuple[float, float]:
    """(a micro-step, an update) of a model too small to compute anything."""
    moe = MoEConfig(num_experts=experts, top_k=2 if experts else 1, d_ff=_ASLEEP)
    model = ModelConfig(vocab_size=64, d_model=_ASLEEP, num_layers=layers, num_heads=4, d_ff=_ASLEEP, moe=moe)
    mesh = single_process_mesh()
    built = Decoder(resolve_backends(model, 1, device.type, _ASLEEP), mesh).to(device)
    engine = NativeEngine(built, mesh, EngineConfig(), OptimConfig(), accumulation=1)
    tokens = torch.zeros(1, _ASLEEP, dtype=torch.int64, device=device)
    context = StepContext(RandomKey.of(0))
    spent = []

    def work() -> None:
        engine.micro_step(tokens, tokens, context)
        _finished(device)
        began = time.perf_counter()
        engine.update(1e-3)
        _finished(device)
        spent.append(time.perf_counter() - began)

    whole = _seconds(work, device)
    update = _slowest(statistics.median(spent), device)
    return max(0.0, whole - update), update


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call: all ranks begin together, the median of a few timings that are long enough to be told, and of these
    the slowest rank's."""
    work()  # thread pools, handles of libraries, choice of kernels
    number, spent = 1, 0.0
    while True:
        spent = _slowest(_timed(work, number, device), device)
        if spent >= _ENOUGH or number >= 2**16:
            break
        number = max(2 * number, round(number * 1.2 * _ENOUGH / max(spent, 1e-6)))
    timings = [spent, *(_slowest(_timed(work, number, device), device) for _ in range(_TIMES - 1))]
    return statistics.median(timings) / number


def _timed(work: Callable[[], object], number: int, device: torch.device) -> float:
    _finished(device)
    if dist.get_world_size() > 1:
        dist.barrier()
    began = time.perf_counter()
    for _ in range(number):
        work()
    _finished(device)
    return time.perf_counter() - began


def _slowest(seconds: float, device: torch.device) -> float:
    if dist.get_world_size() == 1:
        return seconds
    both = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return float(both)


def _finished(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _link(group: Group, device: torch.device, ranks_here: int) -> Link:
    """ranks_here: how many groups leave a node together; bytes are counted for all of them."""
    curves: dict[str, Curve] = {name: _curve(name, group, device, ranks_here) for name in _COLLECTIVES}
    reduces = curves["all_reduce"].seconds
    return Link(
        bandwidth=max(sent / seconds for sent, seconds in reduces),
        latency=reduces[0][1] / max(1.0, (group.size - 1).bit_length()),
        curves=curves,
    )


def _curve(name: Collective, group: Group, device: torch.device, ranks_here: int) -> Curve:
    points: list[tuple[float, float]] = []
    for count in _MESSAGES:
        work, handed = _call(name, group, count, device)
        seconds = _seconds(work, device)
        points.append((float(ranks_here * wire_bytes(name, handed, group.size)), seconds))
        if seconds > _LONGEST:
            break
    return Curve(ranks=group.size, seconds=points)


def _call(name: Collective, group: Group, count: int, device: torch.device) -> tuple[Callable[[], object], int]:
    """(a call of about `count` bytes, what a rank hands in)."""
    rows = max(1, count // 4 // group.size)
    whole: Tensor = torch.ones(rows * group.size, 1, device=device)
    part, equal = whole[:rows].clone(), (rows,) * group.size
    handed = 4 * rows * group.size
    match name:
        case "all_to_all":
            return lambda: exchange_rows(whole, equal, equal, group), handed
        case "all_gather":
            return lambda: all_gather(part, group), 4 * rows
        case "reduce_scatter":
            return lambda: reduce_scatter(whole, group), handed
    return lambda: all_reduce(whole.zero_(), group), handed
