"""Rules of the layout: sizes that ranks must divide."""

from collections.abc import Iterator

from moe_dist.config.model import ModelConfig
from moe_dist.config.rules.parts import at_least, at_most, multiple
from moe_dist.config.schema import ParallelConfig


def parallel_rules(parallel: ParallelConfig, model: ModelConfig, seq_len: int, world_size: int) -> Iterator[str]:
    moe, ep, tp = model.moe, parallel.ep, parallel.tp
    yield from at_least(1, parallel, "parallel", "ep tp etp node_size")
    if world_size < 1:
        yield f"world size {world_size} is below 1; start at least one rank"
    else:
        experts = ("ep*etp", parallel.expert_ranks) if parallel.etp > 1 else ("ep", ep)
        for name, size in (("tp", tp), experts):
            if size >= 1 and world_size % size:
                yield f"{name}={size} does not divide world size {world_size}; change parallel.{name} or the ranks"
    if moe.num_experts == 0 and ep > 1 and model.attention.kind != "switch":  # attention experts are cut over ep too
        yield f"ep={ep} needs num_experts > 0; set parallel.ep to 1, or model.moe.num_experts to a multiple of {ep}"
    yield from at_most(parallel, "parallel", node_size=2**20)
    if parallel.node_size is not None and moe.dispatch != "hierarchical":
        hierarchical = model.attention.kind == "switch" and model.attention.moe.dispatch == "hierarchical"
        if not hierarchical:
            yield (
                f"node_size={parallel.node_size} is of model.moe.dispatch=hierarchical, not {moe.dispatch}; "
                "set parallel.node_size to null"
            )
    node, ranks = parallel.node_size, parallel.expert_ranks
    across = node is not None and world_size > node >= 1 and ranks >= 1
    if moe.dispatch == "hierarchical" and across and node and ranks % node and node % ranks:
        yield (
            f"dispatch=hierarchical needs ep groups that lie evenly on nodes, but neither of ep*etp={ranks} and "
            f"node_size={node} divides the other; change parallel.node_size, or set model.moe.dispatch to all_to_all"
        )
    if parallel.sequence_parallel and tp == 1:
        yield "sequence_parallel=true needs tp > 1; set parallel.sequence_parallel to false or raise parallel.tp"
    split = {
        "num_heads": (model.num_heads, "model.num_heads"),
        "vocab_size": (model.vocab_size, "model.vocab_size"),
        "seq_len": (seq_len, "train.seq_len"),
    }
    if moe.layer_count(model.num_layers) < model.num_layers:
        split["d_ff"] = (model.d_ff, "model.d_ff")
    if moe.num_experts > 0 and moe.num_shared_experts > 0:
        width = max(moe.d_ff, default=0) if isinstance(moe.d_ff, list) else moe.d_ff or model.d_ff
        name = "d_ff" if moe.shared_d_ff is None else "shared_d_ff"
        total = moe.num_shared_experts * (moe.shared_d_ff or width)
        split[f"num_shared_experts*{name}"] = (total, "the width of the shared experts")
    for name, (size, where) in split.items():
        yield from multiple(name, size, "tp", tp, f"each tensor-parallel rank takes an equal part; change {where}")
