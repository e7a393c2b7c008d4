"""What limits a step, and what to change, in words that name keys of the configuration."""

from collections.abc import Iterator
from dataclasses import dataclass

from moe_dist.config import Config
from moe_dist.parallel.mesh import Layout

_FEW_ROWS = 256
"""Of an expert: with fewer, reading its weights takes a GPU longer than its products (200 to 350 FLOP a byte)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """rows_per_expert: of one forward pass. across: exchanges, by part, that leave a node. micro_batch: sequences of a
    forward pass of a rank."""

    rows_per_expert: float
    across: set[str]
    micro_batch: int
    ranks_per_node: int


def advise(config: Config, layout: Layout, parts: dict[str, float], hidden: float, limits: Limits) -> tuple[str, str]:
    """(the part that takes most and its share of the step, what to change). parts: seconds; at least one."""
    total = sum(parts.values()) - hidden
    part = max(parts, key=lambda name: parts[name])
    place = " between nodes" if part in limits.across else ""
    changes = list(_changes(part, config, layout, limits))
    return f"{part}{place}, {parts[part] / total:.0%} of the step", "; ".join(changes)


def _changes(part: str, config: Config, layout: Layout, limits: Limits) -> Iterator[str]:
    moe, parallel, model = config.model.moe, config.parallel, config.model
    match part:
        case "experts" | "permutation" | "activation" if limits.rows_per_expert < _FEW_ROWS:
            yield (
                f"an expert gets {limits.rows_per_expert:.0f} rows at once, too few to read its weights for: raise "
                "train.micro_batch, or parallel.ep, so that it serves more ranks"
            )
        case "experts":
            yield "products of the experts limit the step, as they should; only less work or more ranks make it faster"
        case "dispatch":
            yield from _of_dispatch(config, layout, limits)
        case "tensor parallel":
            yield f"lower parallel.tp (it is {parallel.tp})"
            if part in limits.across:
                yield f"a tp group should lie in one node, of {limits.ranks_per_node} ranks"
            if not parallel.sequence_parallel:
                yield "parallel.sequence_parallel=true spares norms and residuals, and memory"
        case "gradient exchange" | "ZeRO weights":
            yield "gradients are exchanged once for each step: raise train.global_batch"
            if config.engine.zero_stage == 3:
                yield "engine.zero_stage=2 fetches no weights, if it fits"
        case "counts and losses":
            yield f"each is small and waits for the slowest rank: raise train.micro_batch (it is {limits.micro_batch})"
            if moe.capacity_scope == "global":
                yield "model.moe.capacity_scope=local needs no counts of others, but then drops depend on the layout"
        case "optimizer" | "gradient copies":
            if config.engine.name == "native" and layout.dp > 1:
                yield f"engine.name=deepspeed with zero_stage=1 spreads the update over {layout.dp} ranks"
            yield "raise train.global_batch: an update costs the same however many tokens it is of"
        case "host":
            yield f"launching takes longer than computing: raise train.micro_batch (it is {limits.micro_batch})"
            if not config.engine.cuda_graph and config.engine.name == "native":
                yield "engine.cuda_graph=true replays the launches, where shapes depend on no data"
        case "recomputation":
            yield f"model.recompute={model.recompute} costs this: set it to none or activation if memory allows"
        case "attention scores":
            yield "lower train.seq_len, or give model.attention.window: scores grow with its square"
        case _:
            yield "raise parallel.tp, or the ranks: this part grows with the tokens of a rank alone"


def _of_dispatch(config: Config, layout: Layout, limits: Limits) -> Iterator[str]:
    moe, ranks = config.model.moe, layout.expert_ranks
    if "dispatch" in limits.across:
        if moe.dispatch == "all_to_all" and ranks % limits.ranks_per_node == 0:
            yield "model.moe.dispatch=hierarchical sends fewer, larger messages between nodes"
        yield f"keep an ep group in one node: parallel.ep*etp is {ranks}, a node has {limits.ranks_per_node} ranks"
    held = moe.num_experts // layout.ep
    if moe.dispatch in ("auto", "all_to_all") and moe.overlap_chunks == 1 and held > 1:
        chunks = next(number for number in range(2, held + 1) if held % number == 0)
        yield f"model.moe.overlap_chunks={chunks} sends rows while others compute"
    if moe.dispatch == "all_gather":
        yield "model.moe.dispatch=all_to_all sends a row to its experts alone"
    if moe.wire_dtype == "same":
        yield "model.moe.wire_dtype=bf16 or fp8 sends fewer bytes, and rounds them"
    if moe.wire == "padded":
        yield "model.moe.wire=ragged sends no padding"
