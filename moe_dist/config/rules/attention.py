"""Rules of model.attention: which of its choices go together."""

from collections.abc import Iterator

from moe_dist.config.model import AttentionConfig
from moe_dist.config.rules.parts import above_zero, at_least, key, share


def attention_rules(attention: AttentionConfig, section: str = "model.attention") -> Iterator[str]:
    """A line for each broken rule: the values, the rule, what to change."""
    yield from at_least(1, attention, section, "window rope_original_len")
    yield from above_zero(attention, section, "clip_qkv", "null clamps nothing")
    yield from share(attention, section, "dropout")
    yield from _rotary_rules(attention, section)
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
    window = routed.local_window if routed.routed_window is None else routed.routed_window
    if 1 <= seq_len <= window:
        yield (
            f"seq_len={seq_len} is not above routed_window={window}, so nothing would be routed; "
            f"lower {key(inner, 'routed_window')}, or set {key(section, 'kind')} to multi_query"
        )
    if attention.position == "alibi":
        yield f"kind=routed has no ALiBi; set {key(section, 'position')} to rotary or none"
    if attention.window is not None:
        yield (
            f"kind=routed has a window of its own, {key(inner, 'local_window')}; set {key(section, 'window')} to null"
        )
    for name, off in (("sinks", False), ("qk_ln", False), ("clip_qkv", None)):
        value = getattr(attention, name)
        if value != off:
            shown = "null" if off is None else "false"
            yield f"kind=routed does not know {name}={value}; set {key(section, name)} to {shown}"


def _rotary_rules(attention: AttentionConfig, section: str) -> Iterator[str]:
    scaling, factor, length = attention.rope_scaling, attention.rope_factor, attention.rope_original_len
    if scaling != "none" and attention.position != "rotary":
        yield (
            f"rope_scaling={scaling} needs position=rotary, not {attention.position}; "
            f"set {key(section, 'rope_scaling')} to none"
        )
    if factor < 1:
        yield f"rope_factor={factor} is below 1, but sequences become longer: raise {key(section, 'rope_factor')}"
    if scaling == "none" and factor != 1:
        yield (
            f"rope_factor={factor} does nothing with rope_scaling=none; "
            f"set {key(section, 'rope_scaling')} to linear, ntk or yarn"
        )
    if scaling == "yarn" and length is None:
        yield f"rope_scaling=yarn needs the length first trained on; set {key(section, 'rope_original_len')}"
    if scaling != "yarn" and length is not None:
        yield (
            f"rope_original_len={length} is of rope_scaling=yarn, not {scaling}; "
            f"set {key(section, 'rope_original_len')} to null"
        )
