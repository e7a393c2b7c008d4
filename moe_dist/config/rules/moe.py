"""The rules of the MoE section: `validate` asks for all of them."""

from collections.abc import Iterator

from moe_dist.config.model import MoEConfig
from moe_dist.config.rules.parts import above_zero, at_least, multiple
from moe_dist.config.schema import Config


def moe_rules(config: Config) -> Iterator[str]:
    moe, ep, num_layers = config.model.moe, config.parallel.ep, config.model.num_layers
    yield from at_least(1, moe, "model.moe", "top_k every num_groups top_k_groups sinkhorn_iterations overlap_chunks")
    yield from at_least(0, moe, "model.moe", "num_experts num_shared_experts min_capacity jitter bias_update_rate")
    yield from at_least(0, moe, "model.moe", "balance_loss_coef z_loss_coef importance_loss_coef load_loss_coef")
    yield from above_zero(moe, "model.moe", "routed_scale")
    if moe.num_experts == 0:
        if ep > 1 and config.model.attention.kind != "switch":  # attention experts are cut over ep too
            yield f"ep={ep} needs num_experts > 0; set parallel.ep to 1, or model.moe.num_experts to a multiple of {ep}"
        if moe.num_shared_experts > 0:
            yield f"num_shared_experts={moe.num_shared_experts} needs num_experts > 0; set it to 0 for a dense model"
        return
    yield from multiple(
        "num_experts",
        moe.num_experts,
        "ep",
        ep,
        "every rank of an expert-parallel group holds as many experts; change parallel.ep",
    )
    if moe.top_k > moe.num_experts:
        yield f"top_k={moe.top_k} is larger than num_experts={moe.num_experts}; lower model.moe.top_k"
    yield from _width_rules(config)
    yield from _capacity_rules(config)
    yield from _router_rules(moe)
    if moe.every > num_layers >= 1:
        yield f"every={moe.every} is larger than num_layers={num_layers}, so no layer is MoE; lower model.moe.every"
    yield from _dispatch_rules(config)


def _width_rules(config: Config) -> Iterator[str]:
    """Hidden widths of experts, and cutting them."""
    moe, etp = config.model.moe, config.parallel.etp
    widths = moe.d_ff if isinstance(moe.d_ff, list) else [config.model.d_ff if moe.d_ff is None else moe.d_ff]
    for width in widths:
        if width < 1 and moe.d_ff is not None:
            yield f"d_ff={width} is below 1; set model.moe.d_ff to 1 or more"
        yield from multiple(
            "d_ff", width, "etp", etp, "each rank takes an equal part of an expert; change parallel.etp"
        )
    if isinstance(moe.d_ff, list):
        if len(moe.d_ff) != moe.num_experts:
            yield f"d_ff has {len(moe.d_ff)} widths for num_experts={moe.num_experts}; give one for each expert"
        if len(set(moe.d_ff)) > 1 and moe.experts in ("bmm", "triton"):
            yield f"experts={moe.experts} needs experts of one width; set model.moe.experts to auto"
        if len(set(moe.d_ff)) > 1 and etp > 1:
            yield f"etp={etp} needs experts of one width, got {sorted(set(moe.d_ff))}; set parallel.etp to 1"
        if len(set(moe.d_ff)) > 1 and moe.overlap_chunks > 1:
            yield f"overlap_chunks={moe.overlap_chunks} needs experts of one width; set model.moe.overlap_chunks to 1"
        if moe.num_shared_experts > 0 and len(set(moe.d_ff)) > 1:
            yield "num_shared_experts has no width when experts differ in d_ff; set it to 0"
    if moe.expert_bias and etp > 1:
        yield f"expert_bias with etp={etp} would add an expert's output bias on every rank of it; set parallel.etp to 1"


def _capacity_rules(config: Config) -> Iterator[str]:
    model, moe = config.model, config.model.moe
    moe_layers = model.num_layers // max(moe.every, 1)
    for name in ("capacity_factor", "eval_capacity_factor"):
        factor = getattr(moe, name)
        if isinstance(factor, list) and len(factor) != moe_layers:
            yield f"{name} has {len(factor)} values for {moe_layers} MoE layers; give one for each in model.moe.{name}"
        for value in factor if isinstance(factor, list) else [factor]:
            if value is not None and not value > 0:
                yield f"{name}={value} is not above 0; raise model.moe.{name} (null is dropless)"
    for step, value in moe.capacity_schedule.items():
        if step < 0:
            yield f"capacity_schedule has step {step}; steps count from 0"
        if value is not None and not value > 0:
            yield f"capacity_schedule has factor {value} at step {step}, not above 0; raise it (null is dropless)"
    if moe.capacity_schedule and isinstance(moe.capacity_factor, list):
        yield "capacity_schedule sets the factor of all layers; make capacity_factor one number, or clear the schedule"
    if moe.router == "expert_choice":
        factors = [moe.capacity_factor, *moe.capacity_schedule.values()]
        factors += moe.eval_capacity_factor if isinstance(moe.eval_capacity_factor, list) else []
        if any(None in factor if isinstance(factor, list) else factor is None for factor in factors):
            yield "router=expert_choice needs a capacity_factor, how many tokens an expert takes; set it to 1.0"
        if moe.overflow == "reroute":
            yield "overflow=reroute has no meaning for router=expert_choice, which refuses nobody; set it to drop"


def _router_rules(moe: MoEConfig) -> Iterator[str]:
    if moe.jitter >= 1:
        yield f"jitter={moe.jitter} is not below 1; Switch Transformers uses 0.01: lower model.moe.jitter"
    if moe.jitter > 0 and moe.router != "softmax":
        yield f"jitter={moe.jitter} is of router=softmax, not {moe.router}; set model.moe.jitter to 0"
    if moe.num_groups > 1:
        if moe.router not in ("softmax", "sigmoid"):
            yield f"num_groups={moe.num_groups} is of router softmax or sigmoid, not {moe.router}; set it to 1"
        yield from multiple("num_experts", moe.num_experts, "num_groups", moe.num_groups, "change model.moe.num_groups")
        if moe.top_k_groups * (moe.num_experts // moe.num_groups) < moe.top_k:
            yield (
                f"top_k={moe.top_k} experts do not fit into top_k_groups={moe.top_k_groups} of "
                f"num_experts/num_groups={moe.num_experts // moe.num_groups}; raise model.moe.top_k_groups"
            )
    if moe.top_k_groups > moe.num_groups:
        yield f"top_k_groups={moe.top_k_groups} is larger than num_groups={moe.num_groups}; lower it"


def _dispatch_rules(config: Config) -> Iterator[str]:
    moe, ep, ranks = config.model.moe, config.parallel.ep, config.parallel.expert_ranks
    name, size = ("ep", ep) if config.parallel.etp == 1 else ("ep*etp", ranks)
    if moe.dispatch == "local" and ranks > 1:
        yield f"dispatch=local with {name}={size} cannot reach experts on other ranks; set model.moe.dispatch to auto"
    if ranks == 1:
        for field, plain in (("overlap_chunks", 1), ("wire_dtype", "same")):
            value = getattr(moe, field)
            if value != plain:
                yield f"{field}={value} needs rows that travel, but {name}=1; set model.moe.{field} to {plain}"
    if ep >= 1 and moe.num_experts % ep == 0:
        yield from multiple(
            "num_experts/ep",
            moe.num_experts // ep,
            "overlap_chunks",
            moe.overlap_chunks,
            "lower model.moe.overlap_chunks",
        )
    if moe.wire != "ragged" and moe.dispatch not in ("auto", "all_to_all"):
        yield f"wire={moe.wire} is of dispatch=all_to_all, not {moe.dispatch}; set model.moe.wire to ragged"
    if moe.overlap_chunks > 1 and moe.dispatch not in ("auto", "all_to_all"):
        yield f"overlap_chunks={moe.overlap_chunks} is of dispatch=all_to_all, not {moe.dispatch}; set it to 1"
