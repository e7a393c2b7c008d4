"""What is compared: settings (what is trained) times layouts (how it is cut), on a model small enough for a laptop."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from moe_dist.config import Config
from moe_dist.config.parse import parse_dict

Axes = dict[str, tuple[str, ...]]

LAYOUT_AXES: Axes = {
    "ep": ("1", "2", "4"),
    "tp": ("1", "2"),
    "sp": ("off", "on"),
    "zero": ("native", "0", "1", "2", "3"),
    "etp": ("1", "2"),
    "dispatch": ("ragged", "padded", "hierarchical", "all_gather", "overlap"),
}
SETTING_AXES: Axes = {
    "top_k": ("1", "2"),
    "drops": ("position", "choice", "score", "random", "dropless"),
    "accumulation": ("1", "4"),
    "router": ("softmax", "jitter", "groups", "sigmoid", "noisy", "expert_choice", "sinkhorn", "hash"),
    "overflow": ("drop", "reroute"),
    "pool": ("1", "2", "floor"),
    "balance": ("auto", "none", "loss", "sign", "quantile", "loss+quantile"),
    "balance_scope": ("global", "local", "sequence"),
    "experts": ("grouped_mm", "bmm", "loop"),
    "recompute": ("none", "activation", "block"),
    "attention": ("multi_query", "options", "dropout", "switch", "routed"),
    "freeze": ("none", "first", "experts"),
    "family": (
        *("none", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "glm4_moe", "granitemoe", "jetmoe"),
        *("gpt_bigcode", "falcon"),
    ),
}
_CORE = ("top_k", "drops", "accumulation")  # decides who is dropped
QUICK_LAYOUTS: Axes = {"ep": ("1", "2", "4"), "tp": ("1", "2"), "sp": ("off", "on"), "zero": ("native", "0", "1", "2")}
QUICK_SETTINGS: Axes = {"top_k": ("2",), "drops": ("position",), "accumulation": ("1",)}


@dataclass(frozen=True)
class Setting:
    """What is trained. One single-process reference serves all layouts of a setting."""

    top_k: str = "2"
    drops: str = "position"
    accumulation: str = "1"
    router: str = "softmax"
    overflow: str = "drop"
    pool: str = "1"
    balance: str = "auto"
    balance_scope: str = "global"
    experts: str = "grouped_mm"
    recompute: str = "none"
    attention: str = "multi_query"
    freeze: str = "none"
    family: str = "none"

    def __str__(self) -> str:
        plain = Setting()
        extra = [
            f"{name} {getattr(self, name)}"
            for name in SETTING_AXES
            if name not in _CORE and getattr(self, name) != getattr(plain, name)
        ]
        return ", ".join([f"top-{self.top_k}", self.drops, f"accumulation {self.accumulation}", *extra])

    @property
    def wide(self) -> bool:
        """Compared in float64, on the native engine: which tokens routed attention chooses is settled by no witness,
        and its sharp scores multiply what fp32 rounds."""
        return self.attention == "routed"


@dataclass(frozen=True)
class LayoutCase:
    """How it is cut."""

    ep: str = "1"
    tp: str = "1"
    sp: str = "off"
    zero: str = "native"
    etp: str = "1"
    dispatch: str = "ragged"

    def __str__(self) -> str:
        engine = "native" if self.zero == "native" else f"ZeRO-{self.zero}"
        extra = ("" if self.etp == "1" else f" etp={self.etp}") + (" sp" if self.sp == "on" else "")
        return f"ep={self.ep} tp={self.tp}{extra} {engine}" + ("" if self.dispatch == "ragged" else f" {self.dispatch}")


@dataclass(frozen=True)
class Options:
    """A whole verification; tolerances are absolute for losses, relative for gradients and norms."""

    settings: tuple[Setting, ...]
    layouts: tuple[LayoutCase, ...]
    steps: int = 50
    loss_tolerance: float = 1e-5
    grad_tolerance: float = 1e-5
    norm_tolerance: float = 1e-6
    tie_tolerance: float = 1e-5


_ROUTERS: dict[str, dict[str, object]] = {
    "softmax": {},
    "jitter": {"jitter": 0.1},
    "groups": {"num_groups": 2, "top_k_groups": 1},
    "sigmoid": {"router": "sigmoid"},
}


_POOLS: dict[str, dict[str, object]] = {
    "1": {},
    "2": {"capacity_pool": 2},
    "floor": {"capacity_pool": 2, "pool_floor": 0.5},
}
_SWITCH_EXPERTS: dict[str, object] = {"num_experts": 4, "capacity_factor": 1.0}
_ATTENTIONS: dict[str, dict[str, object]] = {
    "multi_query": {},
    "options": {"position": "alibi", "clip_qkv": 1.0, "qk_ln": True, "window": 9, "sinks": True},
    "dropout": {"dropout": 0.1, "backend": "torch"},
    "routed": {"kind": "routed", "routed": {"num_routed_queries": 2, "num_routed_key_values": 3, "local_window": 4}},
    "switch": {"kind": "switch"},
}
_FREEZES = {
    "none": [],
    "first": ["embedding.*", "blocks.0.attention*", "blocks.0.*norm.*"],  # all before the first experts
    "experts": ["blocks.*.experts.*", "blocks.1.feed_forward.router.*"],
}
_NO_FAMILY: dict[str, dict[str, object]] = {"model": {}, "attention": {}, "moe": {}}
_FAMILIES: dict[str, dict[str, dict[str, object]]] = {
    "none": {},
    "qwen2_moe": {"attention": {"qkv_bias": True}, "moe": {"shared_d_ff": 40, "shared_gate": True}},
    "qwen3_moe": {"attention": {"qk_norm": "head"}},
    "olmoe": {"attention": {"qk_norm": "width"}, "model": {"num_kv_heads": 4}},
    "gpt_oss": {
        "model": {"num_kv_heads": 2, "activation": "clamped_swiglu"},
        "attention": {
            "qkv_bias": True,
            "out_bias": True,
            "sinks": True,
            "window": [5, None],
            "rope_scaling": "yarn",
            "rope_factor": 4.0,
            "rope_original_len": 8,
            "rope_truncate": False,
        },
        "moe": {"expert_bias": True, "router_bias": True},
    },
    "glm4_moe": {
        "attention": {"qkv_bias": True, "qk_norm": "head", "rotary_share": 0.5},
        "moe": {"first": 1, "routed_scale": 2.5},
    },
    "granitemoe": {
        "model": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
        "attention": {"score_multiplier": 0.2},
    },
    "jetmoe": {"model": {"num_kv_heads": 4}, "attention": {"out_bias": True}, "moe": {"out_bias": True}},
    "gpt_bigcode": {
        "model": {"norm": "layer", "activation": "gelu_tanh", "ff_bias": True, "max_positions": 16},
        "attention": {"position": "learned", "qkv_bias": True, "out_bias": True},
        "moe": {"first": 1, "expert_bias": True},
    },
    "falcon": {"model": {"norm": "layer", "block": "parallel", "activation": "gelu"}, "moe": {"first": 1}},
}
"""What families of models have beside the plain layers. Their routers and attention experts are settings of their own:
router=sigmoid family=glm4_moe, attention=switch family=jetmoe."""


def parse_axes(given: Sequence[str], axes: Axes, default: Axes) -> Axes:
    """`ep=1,2 tp=1` -> {"ep": ("1", "2"), "tp": ("1",)}; axes not given take their default."""
    chosen = dict(default)
    for text in given:
        name, _, values = text.partition("=")
        if name not in axes:
            raise ValueError(f"{text!r}: unknown axis {name!r}; choose from {', '.join(axes)}")
        wanted = tuple(dict.fromkeys(value for value in values.split(",") if value))
        for value in wanted or ("",):
            number = name in ("ep", "tp", "etp", "top_k", "accumulation") and value.isdigit() and int(value) > 0
            if value not in axes[name] and not number:
                raise ValueError(f"{text!r}: {value!r} is no value of {name}; choose from {', '.join(axes[name])}")
        chosen[name] = wanted
    return chosen


def settings_of(axes: Axes) -> tuple[Setting, ...]:
    return tuple(Setting(**dict(zip(axes, values, strict=True))) for values in product(*axes.values()))


def every_setting() -> tuple[Setting, ...]:
    """All combinations of what decides who is dropped; each other axis varied on its own, its product takes days, but
    for the ways to balance, with either router that they are for."""
    combined = settings_of({name: SETTING_AXES[name] for name in _CORE})
    others = {name: values[1:] for name, values in SETTING_AXES.items() if name not in _CORE}
    alone = tuple(Setting(**{name: value}) for name, values in others.items() for value in values)
    return combined + alone + settings_of({"router": ("sigmoid",), "balance": others["balance"]})


def layouts_of(axes: Axes) -> tuple[LayoutCase, ...]:
    """All combinations but those that say the same twice: sp without tp, ways to travel where nothing does."""
    cases = (LayoutCase(**dict(zip(axes, values, strict=True))) for values in product(*axes.values()))
    both_sp, ways = len(axes.get("sp", ())) > 1, len(axes.get("dispatch", ())) > 1
    return tuple(
        case
        for case in cases
        if not (both_sp and case.sp == "on" and case.tp == "1")
        and not (ways and case.dispatch != "ragged" and case.ep == case.etp == "1")
    )


def every_layout() -> tuple[LayoutCase, ...]:
    """All sizes under all engines; each other axis varied on its own."""
    core = ("ep", "tp", "sp", "zero")
    combined = layouts_of({name: LAYOUT_AXES[name] for name in core})
    ways = layouts_of({"ep": ("2", "4"), "tp": ("1", "2"), "dispatch": LAYOUT_AXES["dispatch"][1:]})
    etp = layouts_of({"ep": ("1", "2"), "tp": ("1", "2"), "zero": ("native", "1", "3"), "etp": LAYOUT_AXES["etp"][1:]})
    return combined + ways + etp


def case_config(setting: Setting, layout: LayoutCase | None, steps: int) -> Config:
    """The tiny run of one case; `layout` None is the single-process reference."""
    layout = layout or LayoutCase()
    dropless, native = setting.drops == "dropless", layout.zero == "native"
    overlap = layout.dispatch == "overlap"
    kind = layout.dispatch if layout.dispatch in ("hierarchical", "all_gather") else "auto"
    moe = _ROUTERS.get(setting.router, {"router": setting.router}) | {
        "num_experts": 8,
        "top_k": int(setting.top_k),
        "d_ff": 48,
        "num_shared_experts": 1,
        "capacity_factor": None if dropless else 1.0,
        "drop_policy": setting.drops if setting.drops in ("score", "random") else "position",
        "drop_order": "choice" if setting.drops == "choice" else "token",
        "overflow": setting.overflow,
        "balance": setting.balance,
        "balance_scope": setting.balance_scope,
        "dispatch": kind,
        "wire": "padded" if layout.dispatch == "padded" else "ragged",
        "overlap_chunks": 2 if overlap else 1,
        "experts": setting.experts,
    }
    family = _NO_FAMILY | _FAMILIES[setting.family]
    moe |= _POOLS[setting.pool] | family["moe"]
    if setting.balance == "sign" or (setting.balance == "auto" and setting.router == "sigmoid"):
        moe |= {"bias_update_rate": 0.01}
    model = {"d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 1, "recompute": setting.recompute}
    attention = _ATTENTIONS[setting.attention] | family["attention"]
    if setting.attention == "switch":
        pool = _POOLS[setting.pool] | ({"num_experts": 8} if setting.pool != "1" else {})  # none is cut by ep = 4
        as_of_feed_forwards = {key: moe[key] for key in ("drop_order", "balance")}
        attention = attention | {"moe": _SWITCH_EXPERTS | as_of_feed_forwards | pool}
    model |= {"attention": attention} | family["model"]
    # Buckets so small that gradients leave one after the other while backward goes on.
    engine = (
        {"name": "native", "bucket_mib": 2**-7} if native else {"name": "deepspeed", "zero_stage": int(layout.zero)}
    )
    # A large eps: with 1e-8, an entry whose gradient is rounding noise moves by a full learning rate in a random
    # direction, and the comparison would measure how Adam amplifies noise.
    optim = {"lr": 1e-4, "eps": 1e-4, "warmup_steps": min(10, steps)}
    values = {
        "model": model | {"moe": moe},
        "parallel": {
            "ep": int(layout.ep),
            "etp": int(layout.etp),
            "tp": int(layout.tp),
            "sequence_parallel": layout.sp == "on",
            "node_size": 2 if kind == "hierarchical" else None,  # two nodes of two, so that there is something to cross
        },
        "engine": engine | {"grad_clip": 0.5},
        "optim": optim,
        "train": {
            "steps": steps,
            "seq_len": 16,
            "global_batch": 16,
            "accumulation": int(setting.accumulation),
            "freeze": _FREEZES[setting.freeze],
        },
    }
    return parse_dict(values, "verify")
