"""Rules of a section of MoE layers: model.moe, model.attention.moe, or the arguments of a layer that stands alone."""

from collections.abc import Iterator
from dataclasses import replace

from moe_dist.config.model import MoEConfig
from moe_dist.config.rules.parts import MANY, Uses, at_least, at_most, between, key, multiple, share, shown, unused
from moe_dist.config.schema import ParallelConfig

_LARGEST: dict[str, float] = dict(
    num_experts=2**20,
    num_shared_experts=1024,
    shared_d_ff=2**24,
    min_capacity=MANY,
    sinkhorn_iterations=1000,
    balance_bins=2**20,
    bias_update_rate=1.0,  # the scores that the bias is added to lie between 0 and 1
    balance_loss_coef=1000.0,
    z_loss_coef=1000.0,
    importance_loss_coef=1000.0,
    load_loss_coef=1000.0,
)
_WIDEST = 2**24  # an expert
_LARGEST_FACTOR = 1e6  # at num_experts / top_k already nothing is dropped
_USES: Uses = {
    "router_bias": ("router", "softmax sigmoid"),
    "jitter": ("router", "softmax"),
    "num_groups": ("router", "softmax sigmoid"),
    "top_k_groups": ("router", "softmax sigmoid"),
    "bias_update_rate": ("balance", "sign loss+sign"),
    "balance_bins": ("balance", "quantile loss+quantile"),
    "balance_ema": ("balance", "quantile loss+quantile"),
    "balance_loss_coef": ("balance", "loss loss+sign loss+quantile"),
    "balance_scope": ("balance", "loss loss+sign loss+quantile"),
    "importance_loss_coef": ("router", "noisy"),
    "load_loss_coef": ("router", "noisy"),
    "sinkhorn_iterations": ("router", "sinkhorn"),
    "renormalize": ("router", "softmax sigmoid sinkhorn"),
    "renormalize_top_1": ("router", "softmax sigmoid sinkhorn"),
    "drop_order": ("drop_policy", "position"),
    "wire": ("dispatch", "auto all_to_all"),
    "overlap_chunks": ("dispatch", "auto all_to_all"),
    "cpu_products": ("experts", "auto grouped_mm"),
}


def moe_rules(
    moe: MoEConfig, parallel: ParallelConfig, *, d_ff: int, num_layers: int, section: str = "model.moe"
) -> Iterator[str]:
    """d_ff: of the model, which experts have too where the section names none. num_layers: of the model."""
    yield from at_least(1, moe, section, "top_k every num_groups top_k_groups sinkhorn_iterations overlap_chunks")
    yield from at_least(1, moe, section, "capacity_pool shared_d_ff")
    yield from between(moe, section, "pool_floor", 0.0, 1.0)
    yield from at_least(10, moe, section, "balance_bins")
    yield from at_least(0, moe, section, "first num_experts num_shared_experts min_capacity jitter bias_update_rate")
    yield from at_least(0, moe, section, "balance_loss_coef z_loss_coef importance_loss_coef load_loss_coef")
    yield from between(moe, section, "routed_scale", 1e-4, 1e4)
    yield from at_most(moe, section, **_LARGEST)
    yield from share(moe, section, "balance_ema")
    yield from unused(replace(moe, balance=moe.balanced_by), section, _USES)  # type: ignore[arg-type]
    if moe.num_shared_experts == 0:
        for name in ("shared_d_ff", "shared_gate"):
            value, off = getattr(moe, name), getattr(MoEConfig(), name)
            if value != off:
                yield (
                    f"{name}={shown(value)} needs num_shared_experts > 0; set {key(section, name)} to {shown(off)}, "
                    f"or {key(section, 'num_shared_experts')}"
                )
    if moe.num_experts == 0:
        if moe.num_shared_experts > 0:
            yield (
                f"num_shared_experts={moe.num_shared_experts} needs num_experts > 0; "
                f"set {key(section, 'num_shared_experts')} to 0 for a dense model"
            )
        return
    yield from multiple(
        "num_experts",
        moe.num_experts,
        "ep",
        parallel.ep,
        f"every rank of an expert-parallel group holds as many; change parallel.ep or {key(section, 'num_experts')}",
    )
    if moe.top_k > moe.num_experts:
        yield f"top_k={moe.top_k} is larger than num_experts={moe.num_experts}; lower {key(section, 'top_k')}"
    if moe.first is not None and moe.first >= num_layers >= 1:
        yield (
            f"first={moe.first} is not below num_layers={num_layers}, so no layer is MoE; lower {key(section, 'first')}"
        )
    if moe.first is None and moe.every > num_layers >= 1:
        yield (
            f"every={moe.every} is larger than num_layers={num_layers}, so no layer is MoE; "
            f"lower {key(section, 'every')}"
        )
    yield from _width_rules(moe, parallel.etp, d_ff, section)
    yield from _capacity_rules(moe, num_layers, section)
    yield from _pool_rules(moe, parallel, section)
    yield from _router_rules(moe, section)
    yield from _balance_rules(moe, section)
    yield from _dispatch_rules(moe, parallel, section)


def _width_rules(moe: MoEConfig, etp: int, d_ff: int, section: str) -> Iterator[str]:
    """Hidden widths of experts, and cutting them."""
    widths = moe.d_ff if isinstance(moe.d_ff, list) else [d_ff if moe.d_ff is None else moe.d_ff]
    for width in widths:
        if width < 1 and moe.d_ff is not None:
            yield f"d_ff={width} is below 1; set {key(section, 'd_ff')} to 1 or more"
        if width > _WIDEST and moe.d_ff is not None:
            yield f"d_ff={width} is above {_WIDEST}; lower {key(section, 'd_ff')}"
        yield from multiple(
            "d_ff", width, "etp", etp, "each rank takes an equal part of an expert; change parallel.etp"
        )
    if moe.expert_bias and etp > 1:
        yield f"expert_bias with etp={etp} would add an expert's output bias on every rank of it; set parallel.etp to 1"
    if not isinstance(moe.d_ff, list):
        return
    if len(moe.d_ff) != moe.num_experts:
        yield f"d_ff has {len(moe.d_ff)} widths for num_experts={moe.num_experts}; give one for each expert"
    if len(set(moe.d_ff)) < 2:
        return
    if moe.experts in ("bmm", "triton"):
        yield f"experts={moe.experts} needs experts of one width; set {key(section, 'experts')} to auto"
    if etp > 1:
        yield f"etp={etp} needs experts of one width, got {sorted(set(moe.d_ff))}; set parallel.etp to 1"
    for name, plain in (("overlap_chunks", 1), ("num_shared_experts", 0)):
        if getattr(moe, name) > plain:
            yield f"{name}={getattr(moe, name)} needs experts of one width; set {key(section, name)} to {plain}"


def _capacity_rules(moe: MoEConfig, num_layers: int, section: str) -> Iterator[str]:
    moe_layers = moe.layer_count(num_layers)
    for name in ("capacity_factor", "eval_capacity_factor"):
        factor, where = getattr(moe, name), key(section, name)
        if isinstance(factor, list) and len(factor) != moe_layers:
            yield f"{name} has {len(factor)} values for {moe_layers} MoE layers; give one for each in {where}"
        for value in factor if isinstance(factor, list) else [factor]:
            if value is not None and not value > 0:
                yield f"{name}={value} is not above 0; raise {where} (null is dropless)"
            if value is not None and value > _LARGEST_FACTOR:
                yield f"{name}={value} is above {_LARGEST_FACTOR:g}; lower {where} (null is dropless)"
    schedule = key(section, "capacity_schedule")
    for step, value in moe.capacity_schedule.items():
        if not 0 <= step <= MANY:
            yield f"capacity_schedule has step {step}, outside 0 to {MANY}; steps count from 0: change {schedule}"
        if value is not None and not 0 < value <= _LARGEST_FACTOR:
            yield (
                f"capacity_schedule has factor {value} at step {step}, outside 0 < factor <= {_LARGEST_FACTOR:g}; "
                f"change it in {schedule} (null is dropless)"
            )
    if moe.capacity_schedule and isinstance(moe.capacity_factor, list):
        yield (
            f"capacity_schedule sets the factor of all layers; make {key(section, 'capacity_factor')} one number, "
            "or clear the schedule"
        )
    if moe.router == "expert_choice":
        factors = [moe.capacity_factor, *moe.capacity_schedule.values()]
        factors += moe.eval_capacity_factor if isinstance(moe.eval_capacity_factor, list) else []
        if any(None in factor if isinstance(factor, list) else factor is None for factor in factors):
            yield (
                "router=expert_choice needs a capacity_factor, how many tokens an expert takes; "
                f"set {key(section, 'capacity_factor')} to 1.0"
            )
        if moe.drop_order != "token":
            yield (
                f"drop_order={moe.drop_order} has no meaning for router=expert_choice, whose experts choose by score; "
                f"set {key(section, 'drop_order')} to token"
            )
        if moe.overflow == "reroute":
            yield (
                "overflow=reroute has no meaning for router=expert_choice, which refuses nobody; "
                f"set {key(section, 'overflow')} to drop"
            )


def _pool_rules(moe: MoEConfig, parallel: ParallelConfig, section: str) -> Iterator[str]:
    """Limits that several experts share, and what happens beyond a limit."""
    pool, ep, where = moe.capacity_pool, parallel.ep, key(section, "capacity_pool")
    if pool > 1 and ep >= 1 and moe.num_experts % ep == 0:
        held, name = moe.num_experts // ep, "num_experts" if ep == 1 else "num_experts/ep"
        fitting = ", ".join(str(size) for size in range(1, held + 1) if held % size == 0)
        advice = f"a pool lies on one rank as a whole: set {where} to one of {fitting}"
        yield from multiple(name, held, "capacity_pool", pool, advice)
    if pool > 1 and moe.router == "expert_choice":
        yield (
            f"capacity_pool={pool} has no meaning for router=expert_choice, whose experts take as many tokens each; "
            f"set {where} to 1"
        )
    if moe.pool_floor != 0 and pool == 1:
        yield (
            f"pool_floor={moe.pool_floor} needs capacity_pool > 1: an expert alone is sure of all its rows; "
            f"set {key(section, 'pool_floor')} to 0"
        )
    if moe.over_budget == "drop":
        return
    drop = f"set {key(section, 'over_budget')} to drop"
    factors = moe.capacity_factor if isinstance(moe.capacity_factor, list) else [moe.capacity_factor]
    if all(factor is None for factor in [*factors, *moe.capacity_schedule.values()]):
        yield f"over_budget=error needs a limit, but capacity_factor=null has none; {drop}"
    if moe.router == "expert_choice":
        yield f"over_budget=error has no meaning for router=expert_choice, which refuses nobody; {drop}"
    if moe.overflow == "reroute":
        yield (
            "over_budget=error leaves nothing to overflow=reroute; "
            f"set {key(section, 'overflow')} to drop, or {key(section, 'over_budget')}"
        )


def _router_rules(moe: MoEConfig, section: str) -> Iterator[str]:
    if not moe.renormalize and moe.top_k == 1:
        yield f"renormalize=false is of top_k > 1, not {moe.top_k}; set {key(section, 'renormalize')} to true"
    if moe.renormalize_top_1 and moe.top_k > 1:
        yield f"renormalize_top_1=true is of top_k=1, not {moe.top_k}; set {key(section, 'renormalize_top_1')} to false"
    if moe.jitter >= 1:
        yield (f"jitter={moe.jitter} is not below 1; Switch Transformers uses 0.01: lower {key(section, 'jitter')}")
    if moe.num_groups > 1:
        where = key(section, "num_groups")
        yield from multiple("num_experts", moe.num_experts, "num_groups", moe.num_groups, f"change {where}")
        if moe.top_k_groups * (moe.num_experts // moe.num_groups) < moe.top_k:
            yield (
                f"top_k={moe.top_k} experts do not fit into top_k_groups={moe.top_k_groups} of "
                f"num_experts/num_groups={moe.num_experts // moe.num_groups}; raise {key(section, 'top_k_groups')}"
            )
    if moe.top_k_groups > moe.num_groups:
        yield (
            f"top_k_groups={moe.top_k_groups} is larger than num_groups={moe.num_groups}; "
            f"lower {key(section, 'top_k_groups')}"
        )


def _balance_rules(moe: MoEConfig, section: str) -> Iterator[str]:
    where = key(section, "balance")
    ways = moe.balanced_by.split("+")
    if moe.router not in ("softmax", "sigmoid") and ("sign" in ways or "quantile" in ways):
        yield (
            f"balance={moe.balance} adds a bias to the scores of router=softmax or sigmoid, not {moe.router}; "
            f"set {where} to auto"
        )
    if moe.router == "hash" and "loss" in ways and moe.balance != "auto":
        yield f"balance={moe.balance} needs a router that learns, not hash; set {where} to none"
    if "quantile" not in ways:
        return
    if moe.top_k == moe.num_experts:
        yield (
            f"balance={moe.balance} has nothing to level where every token goes to all experts, "
            f"top_k=num_experts={moe.top_k}; set {where} to none"
        )
    if moe.num_groups > 1:
        yield (
            f"balance={moe.balance} asks what a token must beat, which is nothing outside the best of "
            f"num_groups={moe.num_groups} groups; set {key(section, 'num_groups')} to 1, or {where} to sign"
        )


def _dispatch_rules(moe: MoEConfig, parallel: ParallelConfig, section: str) -> Iterator[str]:
    ep, ranks = parallel.ep, parallel.expert_ranks
    name, size = ("ep", ep) if parallel.etp == 1 else ("ep*etp", ranks)
    if moe.dispatch == "local" and ranks > 1:
        yield (
            f"dispatch=local with {name}={size} cannot reach experts on other ranks; "
            f"set {key(section, 'dispatch')} to auto"
        )
    if ranks == 1:
        for field, plain in (("overlap_chunks", 1), ("wire_dtype", "same")):
            value = getattr(moe, field)
            if value != plain:
                yield f"{field}={value} needs rows that travel, but {name}=1; set {key(section, field)} to {plain}"
    if ep >= 1 and moe.num_experts % ep == 0:
        yield from multiple(
            "num_experts/ep",
            moe.num_experts // ep,
            "overlap_chunks",
            moe.overlap_chunks,
            f"lower {key(section, 'overlap_chunks')}",
        )
        if moe.wire == "padded" and moe.capacity_pool > 1:  # a pool's rows travel in one block
            yield from multiple(
                "num_experts/ep/capacity_pool",
                moe.num_experts // ep // moe.capacity_pool,
                "overlap_chunks",
                moe.overlap_chunks,
                f"lower {key(section, 'overlap_chunks')}, or set {key(section, 'wire')} to ragged",
            )
