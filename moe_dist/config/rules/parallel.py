"""Rules of the layout: sizes that ranks must divide."""

from collections.abc import Iterator

from moe_dist.config.rules.parts import at_least, multiple
from moe_dist.config.schema import Config


def parallel_rules(config: Config, world_size: int) -> Iterator[str]:
    model, moe, tp, ep = config.model, config.model.moe, config.parallel.tp, config.parallel.ep
    yield from at_least(1, config.parallel, "parallel", "ep tp etp node_size")
    if world_size < 1:
        yield f"world size {world_size} is below 1; start at least one rank"
    else:
        both = config.parallel.etp > 1
        for name, size in (("tp", tp), ("ep*etp", config.parallel.expert_ranks) if both else ("ep", ep)):
            if size >= 1 and world_size % size:
                yield f"{name}={size} does not divide world size {world_size}; change parallel.{name} or the ranks"
    node, ranks = config.parallel.node_size, config.parallel.expert_ranks
    across = node is not None and world_size > node >= 1 and ranks >= 1
    if moe.dispatch == "hierarchical" and across and node and ranks % node and node % ranks:
        yield (
            f"dispatch=hierarchical needs ep groups that lie evenly on nodes, but neither of ep*etp={ranks} and "
            f"node_size={node} divides the other; change parallel.node_size, or set dispatch to all_to_all"
        )
    if config.parallel.sequence_parallel and tp == 1:
        yield "sequence_parallel=true needs tp > 1; set parallel.sequence_parallel to false or raise parallel.tp"
    split = {
        "num_heads": (model.num_heads, "model.num_heads"),
        "vocab_size": (model.vocab_size, "model.vocab_size"),
        "seq_len": (config.train.seq_len, "train.seq_len"),
    }
    if moe.num_experts == 0 or moe.every > 1:
        split["d_ff"] = (model.d_ff, "model.d_ff")
    if moe.num_experts > 0 and moe.num_shared_experts > 0:
        width = max(moe.d_ff) if isinstance(moe.d_ff, list) else moe.d_ff or model.d_ff
        split["num_shared_experts*d_ff"] = (moe.num_shared_experts * width, "the width of the shared experts")
    for name, (size, key) in split.items():
        yield from multiple(name, size, "tp", tp, f"each tensor-parallel rank takes an equal part; change {key}")
