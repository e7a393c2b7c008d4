"""What a rank needs in memory at the fullest moment of an optimizer step, by part, from sizes alone.

A step is walked through as it runs: a stage of the model (activations.py) keeps tensors in the forward pass and gives
them back in the backward pass, in which gradients take their place; then gradients are exchanged, and the optimizer
updates (states.py). What is there is counted at every one of these moments, and the fullest is the plan:

    moment                      gradients                 activations                 workspace
    the loss                    of earlier micro-steps    of all layers               logits of a chunk
    backward of a stage         and of later layers       of this and earlier layers  the stage's own, buckets
    exchange after backward     all                       none                        buffers that are exchanged
    update                      those that are left       none                        copies that Adam makes

So `gradients` are those of that moment: where activations are many, it comes before most gradients are there.
`MemoryPlan.sure` has all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import lcm
from operator import itemgetter
from typing import Any, NamedTuple

from moe_dist.config import BatchShape, Config
from moe_dist.config.model import ModelConfig
from moe_dist.models.backends import resolve_backends
from moe_dist.moe.experts import expert_widths
from moe_dist.parallel.heads import HeadAssignment
from moe_dist.parallel.mesh import Group, Layout
from moe_dist.plan.activations import blocks_of
from moe_dist.plan.held import Held
from moe_dist.plan.rows import Rows
from moe_dist.plan.stages import Block, Sizes, Stage
from moe_dist.plan.states import States, states

_PACKAGES = ("triton", "flash_attn")
"""Backends that are there where a package is."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one rank at the fullest moment of an optimizer step, by part; no part is counted in another.

    parameters: weights that are computed with, and fp32 masters where they lie apart. gradients: accumulated ones, and
    those of the backward pass, as far as they are there at that moment. optimizer: both moments, and what fills up
    ZeRO's partitions. activations: what autograd keeps, without what the next two count. dispatch: rows that came to
    the experts, and results that came back, as far as they are kept. logits: those of the loss. workspace: what is
    there for that moment: buffers of gradients that are exchanged, weights that ZeRO-3 gathers, what the backward pass
    of a layer makes. margin: what the fullest rank needs besides when routing is skewed (rows.py); where capacity
    bounds its rows, up to that bound.

    moment: which one it is. sure: what is there before the update whatever the estimates say: all parameters,
    gradients and optimizer state, exactly.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    dispatch: int
    logits: int
    workspace: int
    margin: int
    moment: str = ""
    sure: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by the name of the part, in this order."""
        names = "parameters gradients optimizer activations dispatch logits workspace margin"
        return {name: getattr(self, name) for name in names.split()}

    @property
    def total(self) -> int:
        """Of all parts, the margin too."""
        return sum(self.parts.values())

    @property
    def expected(self) -> int:
        """Without the margin: when every rank is sent an even share of the rows."""
        return self.total - self.margin


def memory(
    config: Config,
    shape: BatchShape,
    layout: Layout,
    rank: int = 0,
    *,
    device_type: str = "cuda",
    came: Rows | None = None,
) -> MemoryPlan:
    """The plan of `rank`. device_type: `cuda` or `cpu`, which have other kernels where the configuration says auto.
    came: rows of a routed layer where they are known, the mean over layers; then there is no margin.

    Raises ValueError where the model cannot be cut so.
    """
    held = Held.of(config, layout, rank)
    kept = states(config, layout, held, rank, device_type=device_type)
    even = blocks(config, shape, layout, held, rank, device_type=device_type, came=came)
    if came is not None:
        return at_fullest(kept, even)
    return at_fullest(kept, even, blocks(config, shape, layout, held, rank, device_type=device_type, skewed=True))


def blocks(
    config: Config,
    shape: BatchShape,
    layout: Layout,
    held: Held,
    rank: int = 0,
    *,
    device_type: str = "cuda",
    skewed: bool = False,
    came: Rows | None = None,
) -> list[Block]:
    """The stages of a micro-step of `rank`; the engine does not change them. skewed: as routing can be. came: as for
    `memory`."""
    model = backends(config, layout, device_type)
    sizes = Sizes.of(config, shape, layout, rank, model, device_type != "cpu", skewed=skewed, came=came)
    return blocks_of(sizes, held, config.task != "classification")


def at_fullest(kept: States, even: list[Block], skewed: list[Block] | None = None) -> MemoryPlan:
    """even, skewed: the stages where routing is even, and where it is as skewed as it can be; None: no margin."""
    plan, margin = max(_moments(kept, even), key=itemgetter(0)), 0
    if skewed is not None:
        margin = max(0, max(moment.total for moment in _moments(kept, skewed)) - plan.total)
    return MemoryPlan(
        parameters=kept.parameters,
        gradients=plan.gradients,
        optimizer=kept.optimizer,
        activations=plan.activations,
        dispatch=plan.dispatch,
        logits=plan.logits,
        workspace=plan.workspace,
        margin=margin,
        moment=plan.name,
        sure=kept.total,
    )


def fullest(config: Config, shape: BatchShape, layout: Layout, *, device_type: str = "cuda") -> tuple[int, MemoryPlan]:
    """The rank that needs most, the first of them, and its plan."""
    ranks = unlike(config.model, layout)
    plans = [(rank, memory(config, shape, layout, rank, device_type=device_type)) for rank in ranks]
    return max(plans, key=lambda each: each[1].total)


def unlike(model: ModelConfig, layout: Layout) -> list[int]:
    """One rank of each kind. Ranks differ by the heads that they read where tp does not divide the key/value heads, and
    by their experts where these differ in width; all others are alike."""
    if model.moe.num_experts and len(set(expert_widths(model.moe, model.d_ff))) > 1:
        return list(range(min(layout.world, lcm(layout.tp, layout.expert_ranks))))
    kinds: dict[int, int] = {}
    for rank in range(layout.tp):
        heads = HeadAssignment.of(model.query_heads, model.num_kv_heads, Group(tuple(range(layout.tp)), rank))
        kinds.setdefault(heads.kv_read, rank)
    return list(kinds.values())


def backends(config: Config, layout: Layout, device_type: str) -> ModelConfig:
    """The model with what `auto` means there. Packages that it names are taken to be installed where there are GPUs."""
    model = config.model
    if device_type == "cpu":
        return resolve_backends(model, layout.expert_ranks, "cpu", config.train.seq_len)
    given = _words(model)
    plain = _with(model, *("auto" if word in _PACKAGES else word for word in given))
    named = resolve_backends(plain, layout.expert_ranks, device_type, config.train.seq_len)
    found = zip(given, _words(named), strict=True)
    return _with(named, *(word if word in _PACKAGES else other for word, other in found))


def _words(model: ModelConfig) -> tuple[Any, Any, Any]:
    """What a package may be the word for, and memory hangs on."""
    return model.attention.backend, model.moe.experts, model.attention.moe.experts


def _with(model: ModelConfig, backend: Any, experts: Any, of_attention: Any) -> ModelConfig:
    attention = replace(model.attention, backend=backend, moe=replace(model.attention.moe, experts=of_attention))
    moe = replace(model.moe, experts=experts)
    return replace(model, kernels="torch", norm_kernels="same", attention=attention, moe=moe)


class _Moment(NamedTuple):
    """Bytes of a moment, but for those that are always there. total: of the five behind it."""

    total: int
    gradients: int
    activations: int
    dispatch: int
    logits: int
    workspace: int
    block: Block | None
    stage: Stage | None
    words: str = ""

    @property
    def name(self) -> str:
        """For people."""
        if self.block is None or self.stage is None:
            return self.words
        return self.words + self.block.name_of(self.stage)


def _moments(kept: States, blocks: list[Block]) -> Iterator[_Moment]:
    """Every moment of the last micro-step at which there could be most."""
    done, bucket, standing = 0, kept.bucket_elements, kept.standing + kept.bucket
    for block, stage, activations, dispatch in _forward(blocks):
        parts = (kept.accumulated, activations, dispatch, 0, standing + stage.forward)
        yield _Moment(sum(parts), *parts, block, stage, "forward pass of ")
    for block, stage, activations, dispatch in _backward(blocks):
        shared = kept.shared if bucket is not None and done >= bucket else 0
        gradients = kept.staying(done) + kept.made * stage.elements + shared
        total = gradients + activations + dispatch + standing + stage.spike
        workspace = standing + stage.spike - stage.logits
        yield _Moment(total, gradients, activations, dispatch, stage.logits, workspace, block, stage)
        done += stage.elements
        if bucket is not None and done >= bucket:
            left = (kept.accumulated + kept.shared, activations - stage.kept, dispatch - stage.dispatch, 0)
            workspace = standing + kept.exchanged * bucket
            yield _Moment(sum(left) + workspace, *left, workspace, block, stage, "exchange after ")
    exchange, update = kept.standing + kept.exchange, kept.standing + kept.update
    yield _Moment(kept.joined + exchange, kept.joined, 0, 0, 0, exchange, None, None, "exchange of gradients")
    yield _Moment(kept.gradients + update, kept.gradients, 0, 0, 0, update, None, None, "update")


def _forward(blocks: list[Block]) -> Iterator[tuple[Block, Stage, int, int]]:
    """Stages that need much in the forward pass, with the activations and the rows that are kept when it ends theirs:
    in the last block they meet most. Where blocks are recomputed, that is when backward comes to it."""
    waiting = [_until_then(block) for block in blocks]
    for place, block in enumerate(blocks):
        for count, stage in enumerate(block.stages if place == len(blocks) - 2 else (), 1):
            if stage.forward:
                before, there = waiting[:place], block.stages[:count]
                activations = sum(kept for kept, _ in before) + (block.again or 0) + sum(each.kept for each in there)
                yield block, stage, activations, sum(rows for _, rows in before) + sum(each.dispatch for each in there)


def _backward(blocks: list[Block]) -> Iterator[tuple[Block, Stage, int, int]]:
    """Stages in the order of the backward pass, with the activations and the rows that are kept when it begins theirs.
    The loss comes first, whose forward pass is the end of that of the model."""
    waiting = [_until_then(block) for block in blocks]
    activations, dispatch = (sum(values) for values in zip(*waiting, strict=True))
    for block, (of_block, rows_of_block) in zip(reversed(blocks), reversed(waiting), strict=True):
        activations, dispatch = activations - of_block, dispatch - rows_of_block
        there = activations + (block.again or 0) + sum(stage.kept for stage in block.stages)
        rows = dispatch + sum(stage.dispatch for stage in block.stages)
        for stage in reversed(block.stages):
            yield block, stage, there, rows
            there, rows = there - stage.kept, rows - stage.dispatch


def _until_then(block: Block) -> tuple[int, int]:
    """(activations, rows) that are kept of a block until the backward pass comes to it."""
    if block.again is not None:
        return block.again, 0
    return sum(stage.kept for stage in block.stages), sum(stage.dispatch for stage in block.stages)
