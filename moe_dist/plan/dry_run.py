"""A training step of a few ranks of a large world on one machine: real code, real groups, shapes without numbers.

Ranks of every kind run, one after another: the first and the last, and those at the ends of the first rank's groups. A
collective is entered by all members of its group, so any two of them must show the same ones in the same order, of the
same size; in an all-to-all, what i sends to j is what j expects of i. A rank that fails says what it was doing. Every
rank's calls are compared with those that traffic.py computes.

What is run is model and engine, DeepSpeed's too, forward to update; ZeRO-3 is seen in its third step, when it has
learned in which order it needs what. What the loop exchanges beside them (statistics, agreement on stopping) is in the
plan alone. Kernels are torch's on a CPU: bytes that are exchanged are those of any device, a GPU's own kernels may keep
more or fewer activations than are counted here. Ranks are given even shares of the work.
"""

import gc
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_dist.config import BatchShape, Config, validate
from moe_dist.engine.make import make_engine
from moe_dist.kernels.random import RandomKey
from moe_dist.models.backends import resolve_backends
from moe_dist.models.classifier import Classifier
from moe_dist.models.decoder import Decoder
from moe_dist.models.freezing import freeze
from moe_dist.models.trainable import Trainable
from moe_dist.parallel.mesh import Layout, Mesh, create_mesh
from moe_dist.parallel.trail import Trail
from moe_dist.plan.fake_world import Balanced, FakeWorld
from moe_dist.plan.live_memory import Memory
from moe_dist.plan.recorder import Call, Recorder
from moe_dist.plan.traffic import traffic
from moe_dist.plan.transfer import Transfer
from moe_dist.step import StepContext

_LEARNING = 2  # steps in which ZeRO-3 notes what it needs when


@dataclass
class RankRun:
    """What one rank did. held: bytes of parameters and optimizer state before the step; peak: the most during it, in
    `peak_at`. planned: calls and bytes by collective and group, (counted, planned), where these differ."""

    rank: int
    calls: list[Call] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    held: int = 0
    peak: int = 0
    peak_at: str = ""
    seconds: float = 0.0
    differences: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = field(default_factory=dict)


@dataclass
class DryRun:
    """problems: a line each; empty when the step fits. compared: pairs of ranks whose common calls were compared."""

    config: Config
    layout: Layout
    shape: BatchShape
    ranks: list[RankRun]
    problems: list[str]
    compared: int

    @property
    def seconds(self) -> float:
        return sum(run.seconds for run in self.ranks)


def dry_run(
    config: Config,
    world: int,
    ranks_per_node: int | None = None,
    ranks: Sequence[int] | None = None,
    memory_limit: int | None = None,
) -> DryRun:
    """One optimizer step of `ranks` (None: one of every kind) in a world of `world`.

    ranks_per_node: None is one node. memory_limit: bytes that a rank has; beyond it is a problem, as are calls that do
    not meet, and whatever a rank raises.

    Raises ValueError for what `validate`, model or engine refuse, for ranks that are not in the world, and where a
    process group has been joined already: this makes its own.
    """
    if dist.is_initialized():
        raise ValueError("a dry run makes a world of its own, but this process has joined one: run it in another")
    shape = validate(config, world)
    parallel = config.parallel
    config = runnable(config)
    hierarchical = "hierarchical" in (config.model.moe.dispatch, config.model.attention.moe.dispatch)
    node = (parallel.node_size or ranks_per_node or world) if hierarchical else world  # nodes matter nowhere else
    layout = Layout(world, parallel.ep, parallel.tp, node, parallel.etp)
    chosen = kinds(layout) if ranks is None else list(dict.fromkeys(ranks))
    outside = [rank for rank in chosen if not 0 <= rank < world]
    if outside:
        raise ValueError(f"rank {outside[0]} is not in a world of {world}: ranks are 0 to {world - 1}")
    runs, problems = [], []
    said: dict[tuple[int, ...], list[list[torch.Tensor]]] = {}
    for rank in chosen:
        run, problem = _run(config, shape, layout, rank, memory_limit, said)
        runs.append(run)
        problems += problem
    pairs = list(combinations(runs, 2))
    for first, second in pairs:
        problems += mismatches(first, second)
    return DryRun(config, layout, shape, runs, problems, len(pairs))


def kinds(layout: Layout) -> list[int]:
    """The first and the last rank, and the last of the first tp and ep groups, and of the ep group's first node: every
    group of the layout is like one that has two of them."""
    ends = {0, layout.tp - 1, layout.expert_ranks - 1, layout.world - 1}
    return sorted(ends | ({layout.ep_local - 1} if layout.even_nodes else set()))


def runnable(config: Config) -> Config:
    """With backends that run on tensors without numbers, torch's own; and no token is left out by chance, of which each
    rank would have others."""
    model, engine = replace(config.model, token_dropout=0.0), config.engine
    on_gpus = model.attention.backend in ("triton", "flash_attn")
    attention = replace(model.attention, backend="auto" if on_gpus else model.attention.backend)
    moe = replace(model.moe, cpu_products="mkl", experts="auto" if model.moe.experts == "triton" else model.moe.experts)
    model = resolve_backends(
        replace(model, kernels="torch", norm_kernels="same", attention=attention, moe=moe), config.parallel.expert_ranks
    )
    if config.task == "classification" and model.num_classes is None:
        raise ValueError("num_classes=null is read from the data, which a dry run does not: set model.num_classes")
    optim = replace(config.optim, implementation="torch")
    return replace(config, model=model, engine=replace(engine, cuda_graph=False), optim=optim)


def _run(
    config: Config,
    shape: BatchShape,
    layout: Layout,
    rank: int,
    limit: int | None,
    said: dict[tuple[int, ...], list[list[torch.Tensor]]],
) -> tuple[RankRun, list[str]]:
    run, trail, began = RankRun(rank), Trail(), time.process_time()
    recorder, problems = Recorder(trail), list[str]()
    memory = Memory(limit, trail.describe)
    balanced = Balanced(config.model, layout, rank, shape.micro_batch * shape.seq_len // layout.tp)
    try:
        with _group(layout, rank), FakeWorld(rank, recorder, memory, balanced.others, said):
            _step(config, shape, layout, trail, balanced, run, recorder, memory)
    except Exception as error:
        if isinstance(error, ValueError) and not run.held:  # so no rank could start
            raise
        last = recorder.calls[-1].describe() if recorder.calls else "none"
        message = str(error).strip().partition("\n")[0]
        problems.append(
            f"rank {rank} fails in {trail.describe()}: {type(error).__name__}: {message} (last collective: {last})"
        )
    gc.collect()
    run.calls, run.transfers = recorder.calls, recorder.transfers(layout, rank)
    run.peak, run.peak_at, run.seconds = memory.peak, memory.peak_at, time.process_time() - began
    if memory.over and limit is not None:
        problems.append(
            f"rank {rank} needs {run.peak / 2**30:.1f} GiB, but has {limit / 2**30:.1f}: first, {memory.over}; lower "
            "train.micro_batch, set model.recompute to block, or spread parameters over more ranks"
        )
    if not problems:
        run.differences = _differences(run.transfers, traffic(config, shape, layout, rank))
    return run, problems


def _step(
    config: Config,
    shape: BatchShape,
    layout: Layout,
    trail: Trail,
    balanced: Balanced,
    run: RankRun,
    recorder: Recorder,
    memory: Memory,
) -> None:
    """Model and engine are made, and one step is taken, as train/loop.py does."""
    parallel = config.parallel
    mesh = create_mesh(
        parallel.ep, parallel.tp, parallel.etp, layout.node_size, None, trail, parallel.sequence_parallel
    )
    if config.engine.name == "deepspeed":
        from moe_dist.engine.deepspeed import number_anew

        number_anew()
    engine = make_engine(
        _model(config, shape, mesh), mesh, config.engine, config.optim, shape.micro_batch, shape.accumulation
    )
    engine.restore(0)  # as after a checkpoint: the optimizer's state is there
    run.held = memory.live
    key = RandomKey.of("dry run")
    tokens_BS = _tokens(config, shape)
    targets = tokens_BS if config.task == "language_modelling" else torch.zeros_like(tokens_BS[:, 0])
    for step in range(_LEARNING + 1 if config.engine.zero_stage == 3 else 1):
        recorder.calls.clear()  # those of the start
        trail.enter("data", step + 1)
        for micro in range(shape.accumulation):
            engine.micro_step(tokens_BS, targets, StepContext(key.fold(step, micro), witness=balanced))
        trail.enter("update")
        engine.update(config.optim.lr)


def _tokens(config: Config, shape: BatchShape) -> torch.Tensor:
    """One after the other, so that hash routing spreads them: the same on every rank."""
    index_N = torch.arange(shape.micro_batch * shape.seq_len)
    return (1 + index_N % max(config.model.vocab_size - 1, 1)).view(shape.micro_batch, shape.seq_len)


def _model(config: Config, shape: BatchShape, mesh: Mesh) -> Trainable:
    built: Trainable
    if config.task == "classification":
        built = Classifier(config.model, mesh, shape.seq_len, config.train.seed)
    else:
        built = Decoder(config.model, mesh, config.train.seed)
    freeze(built, config.train.freeze)
    return built


@contextmanager
def _group(layout: Layout, rank: int) -> Iterator[None]:
    """The world as `rank` joins it. DeepSpeed asks for a variable that launchers set."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("fake", rank=rank, world_size=layout.world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


def mismatches(first: RankRun, second: RankRun) -> list[str]:
    """The first call at which two ranks that share groups part; nothing where they meet in all."""
    both = [[call for call in run.calls if {first.rank, second.rank} <= set(call.ranks)] for run in (first, second)]
    for number, (one, other) in enumerate(zip(*both, strict=False), 1):
        reason = _mismatch(first.rank, one, second.rank, other)
        if reason:
            return [
                f"ranks {first.rank} and {second.rank} part at their common call {number}, {reason}: rank {first.rank} "
                f"enters {one.describe()}, rank {second.rank} {other.describe()}"
            ]
    if len(both[0]) == len(both[1]):
        return []
    more, fewer = (first, second) if len(both[0]) > len(both[1]) else (second, first)
    left = max(both, key=len)[min(map(len, both))]
    return [f"rank {more.rank} waits in {left.describe()}, which rank {fewer.rank} never enters"]


def _mismatch(first: int, one: Call, second: int, other: Call) -> str:
    if (one.collective, one.ranks) != (other.collective, other.ranks):
        return "another collective or group"
    if one.dtype != other.dtype:
        return "another element type"
    if one.collective != "all_to_all":
        return "" if one.bytes == other.bytes else "another size"
    here, there = one.ranks.index(first), one.ranks.index(second)
    meets = (one.sent[there], one.received[there]) == (other.received[here], other.sent[here])
    return "" if meets else f"where {one.sent[there]} rows are sent and {other.received[here]} expected, or back"


def _differences(
    counted: Sequence[Transfer], planned: Sequence[Transfer]
) -> dict[tuple[str, tuple[int, ...]], tuple[int, int]]:
    """Bytes by collective and group, (counted, planned), where they differ."""
    size: list[Counter[tuple[str, tuple[int, ...]]]] = [Counter(), Counter()]
    for found, transfers in zip(size, (counted, planned), strict=True):
        for transfer in transfers:
            if transfer.phase != "statistics":
                found[transfer.collective, transfer.ranks] += transfer.bytes
    keys = size[0].keys() | size[1].keys()
    return {key: (size[0][key], size[1][key]) for key in keys if size[0][key] != size[1][key]}


def text(found: DryRun) -> str:
    """For a person: what ran, what each rank exchanged and held, and what is wrong."""
    layout = found.layout
    lines = [
        f"dry run of {layout.world} ranks: dp {layout.dp} x tp {layout.tp}, ep {layout.ep} x etp {layout.etp}, edp "
        f"{layout.edp}; {len(found.ranks)} ranks run, {found.compared} pairs compared, {found.seconds:.0f} s"
    ]
    for run in found.ranks:
        sent = sum(transfer.bytes for transfer in run.transfers)
        lines.append(
            f"  rank {run.rank}: {len(run.calls)} collectives, {_size(sent)} handed in; {_size(run.held)} held, "
            f"{_size(run.peak)} at the peak ({run.peak_at})"
        )
        lines += (
            [
                f"    {_size(transfer.bytes):>10} in {transfer.calls:5} calls of {transfer.collective} over "
                f"{len(transfer.ranks)} ranks ({transfer.axis}), {transfer.phase}, {transfer.what}"
                for transfer in sorted(run.transfers, key=lambda transfer: -transfer.bytes)
            ]
            if run is found.ranks[0]
            else []
        )
        lines += [
            f"    {collective} over {len(ranks)} ranks: {_size(counted)} counted, {_size(planned)} planned"
            for (collective, ranks), (counted, planned) in run.differences.items()
        ]
    lines += [f"problem: {problem}" for problem in found.problems] or ["every call meets its partners"]
    return "\n".join(lines)


def _size(count: int) -> str:
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
