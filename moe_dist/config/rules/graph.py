"""What a step recorded as a CUDA graph may not have in it: new numbers from the host, or shapes that depend on data."""

from collections.abc import Iterator

from moe_dist.config.model import MoEConfig
from moe_dist.config.rules.parts import key
from moe_dist.config.schema import Config

_OFF = "or set engine.cuda_graph to false"


def graph_rules(config: Config) -> Iterator[str]:
    """Of engine.cuda_graph (engine/graphs.py)."""
    if not config.engine.cuda_graph:
        return
    model = config.model
    if config.engine.name != "native":
        yield f"cuda_graph=true is of engine.name=native, not {config.engine.name}; set engine.cuda_graph to false"
    if config.task == "classification":
        yield "cuda_graph=true cannot record padded sequences (task=classification); set engine.cuda_graph to false"
    if model.attention.dropout > 0:
        yield (
            f"cuda_graph=true would draw the same dropout={model.attention.dropout} in every step; "
            f"set model.attention.dropout to 0, {_OFF}"
        )
    parallel = config.parallel
    if model.moe.num_experts > 0:
        yield from _expert_rules(model.moe, "model.moe", parallel.ep * parallel.etp)
    if model.attention.kind == "switch":
        yield from _expert_rules(model.attention.moe, "model.attention.moe", parallel.ep)


def _expert_rules(moe: MoEConfig, section: str, expert_ranks: int) -> Iterator[str]:
    drawn = {"jitter": moe.jitter > 0, "router": moe.router == "noisy", "drop_policy": moe.drop_policy == "random"}
    for name, random in drawn.items():
        if random:
            yield (
                f"cuda_graph=true would draw the same {name}={getattr(moe, name)} in every step; "
                f"change {key(section, name)}, {_OFF}"
            )
    loop = moe.experts == "loop" or (moe.experts == "auto" and isinstance(moe.d_ff, list))
    asks_host = {"experts": loop, "over_budget": moe.over_budget == "error", "router": moe.router == "sinkhorn"}
    for name, asks in asks_host.items():
        if asks:
            yield (
                f"{name}={getattr(moe, name)} asks the host in every step, which cuda_graph=true cannot; "
                f"change {key(section, name)}, {_OFF}"
            )
    factors = moe.capacity_factor if isinstance(moe.capacity_factor, list) else [moe.capacity_factor]
    dropless = None in [*factors, *moe.capacity_schedule.values()]
    if dropless and (expert_ranks > 1 or moe.experts == "bmm"):
        yield (
            f"cuda_graph=true needs sizes that no data changes, and capacity_factor=null has none; "
            f"set {key(section, 'capacity_factor')} (and the schedule) to numbers, {_OFF}"
        )
    plain = moe.dispatch in ("auto", "all_to_all") and moe.wire == "padded" and moe.overlap_chunks == 1
    if expert_ranks > 1 and not dropless and not plain:
        yield (
            f"cuda_graph=true over {expert_ranks} expert ranks needs dispatch all_to_all, wire padded and "
            f"overlap_chunks 1, not {moe.dispatch}, {moe.wire} and {moe.overlap_chunks}; change {section}, {_OFF}"
        )
