"""Rules of model.attention: which of its choices go together."""

from collections.abc import Iterator

from moe_dist.config.model import AttentionConfig, RoutedAttentionConfig
from moe_dist.config.rules.parts import MANY, Uses, above_zero, at_least, at_most, between, key, share, shown, unused
from moe_dist.config.schema import Config

_USES: Uses = {
    "rope_scaling": ("position", "rotary"),
    "rotary_share": ("position", "rotary"),
    "rope_factor": ("rope_scaling", "linear ntk dynamic yarn llama3"),
    "rope_original_len": ("rope_scaling", "dynamic yarn llama3"),
    "rope_fast_turns": ("rope_scaling", "yarn llama3"),
    "rope_slow_turns": ("rope_scaling", "yarn llama3"),
    "rope_truncate": ("rope_scaling", "yarn"),
}


def attention_rules(attention: AttentionConfig, num_layers: int, section: str = "model.attention") -> Iterator[str]:
    """A line for each broken rule: the values, the rule, what to change. num_layers: of the model."""
    yield from at_least(1, attention, section, "rope_original_len")
    yield from at_most(attention, section, rope_original_len=MANY, rope_factor=1e6)
    yield from _window_rules(attention, num_layers, key(section, "window"))
    yield from at_most(attention, section, rope_fast_turns=1e6, rotary_share=1.0)
    yield from above_zero(attention, section, "rope_slow_turns rotary_share")
    yield from between(attention, section, "clip_qkv", 1e-3, 1e6)  # null clamps nothing
    yield from between(attention, section, "score_multiplier", 1e-6, 1e3)
    yield from unused(attention, section, _USES)
    if attention.kind != "routed" and attention.routed != RoutedAttentionConfig():
        routed = key(section, "routed")
        yield f"{routed} is of kind=routed, not {attention.kind}; set {key(section, 'kind')} or clear {routed}"
    yield from share(attention, section, "dropout")
    yield from _rotary_rules(attention, section)
    if attention.qk_ln and attention.qk_norm != "none":
        yield (
            f"qk_ln=true and qk_norm={attention.qk_norm} are two norms of the same queries and keys; "
            f"set {key(section, 'qk_ln')} to false or {key(section, 'qk_norm')} to none"
        )
    if 0 < attention.dropout < 1 and attention.backend not in ("torch", "triton"):
        yield (
            f"dropout={attention.dropout} with backend={attention.backend} would draw other numbers in every layout; "
            f"set {key(section, 'backend')} to torch or triton, or {key(section, 'dropout')} to 0"
        )


def routed_rules(attention: AttentionConfig, seq_len: int, section: str = "model.attention") -> Iterator[str]:
    """Of kind = routed; seq_len: of the sequences that it is trained on."""
    if attention.kind != "routed":
        return
    routed, inner = attention.routed, key(section, "routed")
    yield from at_least(1, routed, inner, "num_experts num_routed_queries num_routed_key_values")
    yield from at_least(1, routed, inner, "local_window routed_window")
    yield from at_most(routed, inner, num_experts=1024, num_routed_queries=MANY, num_routed_key_values=MANY)
    yield from at_most(routed, inner, local_window=MANY, routed_window=MANY)
    name = "local_window" if routed.routed_window is None else "routed_window"
    window = getattr(routed, name)
    if 1 <= seq_len <= window:
        yield (
            f"seq_len={seq_len} is not above {name}={window}, so nothing would be routed; "
            f"lower {key(inner, name)}, or set {key(section, 'kind')} to multi_query"
        )
    if attention.position == "alibi":
        yield f"kind=routed has no ALiBi; set {key(section, 'position')} to rotary or none"
    if attention.window is not None:
        yield (
            f"kind=routed has a window of its own, {key(inner, 'local_window')}; set {key(section, 'window')} to null"
        )
    for name in "rotary_share qkv_bias out_bias sinks qk_ln qk_norm clip_qkv score_multiplier".split():
        value, off = getattr(attention, name), getattr(AttentionConfig(), name)
        if value != off:
            yield f"kind=routed does not know {name}={shown(value)}; set {key(section, name)} to {shown(off)}"


def flash_attn_rules(config: Config) -> Iterator[str]:
    """Of backend = flash_attn: what the package of that name cannot do (kernels/attention/flash_attn.py)."""
    model, attention = config.model, config.model.attention
    if attention.backend != "flash_attn":
        return
    cannot = {
        "model.attention.kind=routed": attention.kind == "routed",
        "model.attention.sinks=true": attention.sinks,
        "task=classification": config.task == "classification",
        "data.mask_documents=true": config.data.mask_documents,
    }
    for setting, wanted in cannot.items():
        if wanted:
            yield f"backend=flash_attn has no masks or sinks, but {setting}; set model.attention.backend to flash"
    if config.engine.precision == "fp32":
        yield (
            "backend=flash_attn computes in bf16, not in precision=fp32; "
            "set engine.precision to bf16 or model.attention.backend to flash"
        )
    width = model.head_dim or model.d_model // max(model.num_heads, 1)
    if width > 256:
        yield f"backend=flash_attn takes heads up to 256 wide, not {width}; set model.attention.backend to flash"


def _window_rules(attention: AttentionConfig, num_layers: int, where: str) -> Iterator[str]:
    windows = attention.window if isinstance(attention.window, list) else [attention.window]
    if not windows:
        yield f"window=[] has none for any layer; set {where} to null"
    if len(windows) > max(num_layers, 1):
        yield f"window has {len(windows)} values for num_layers={num_layers}; shorten {where}"
    for window in windows:
        if window is not None and not 1 <= window <= MANY:
            yield f"window={window} is outside 1 to {MANY}; change {where} (null: all tokens before)"


def _rotary_rules(attention: AttentionConfig, section: str) -> Iterator[str]:
    if attention.rope_factor < 1:
        yield (
            f"rope_factor={attention.rope_factor} is below 1, but sequences become longer: "
            f"raise {key(section, 'rope_factor')}"
        )
    if attention.rope_scaling in ("dynamic", "yarn", "llama3") and attention.rope_original_len is None:
        yield (
            f"rope_scaling={attention.rope_scaling} needs the length first trained on; "
            f"set {key(section, 'rope_original_len')}"
        )
    if attention.fast_turns <= attention.rope_slow_turns:
        yield (
            f"rope_slow_turns={attention.rope_slow_turns} is not below rope_fast_turns={attention.fast_turns}; "
            f"lower {key(section, 'rope_slow_turns')} or raise {key(section, 'rope_fast_turns')}"
        )
