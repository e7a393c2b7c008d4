"""Rules of model.attention: which of its choices go together."""

from collections.abc import Iterator

from moe_dist.config.model import ModelConfig
from moe_dist.config.rules.parts import above_zero, at_least
from moe_dist.config.schema import Config

_SECTION = "model.attention"


def attention_rules(model: ModelConfig) -> Iterator[str]:
    """A line for each broken rule: the values, the rule, what to change."""
    attention = model.attention
    yield from at_least(1, attention, _SECTION, "window rope_original_len")
    yield from above_zero(attention, _SECTION, "clip_qkv", "null clamps nothing")
    yield from _rotary_rules(model)
    if not 0 <= attention.dropout < 1:
        yield f"dropout={attention.dropout} is outside 0 <= dropout < 1; change model.attention.dropout"
    elif attention.dropout > 0 and attention.backend not in ("torch", "triton"):
        yield (
            f"dropout={attention.dropout} with backend={attention.backend} would draw other numbers in every layout; "
            "set model.attention.backend to torch or triton, or model.attention.dropout to 0"
        )


def routed_rules(config: Config) -> Iterator[str]:
    attention, length = config.model.attention, config.train.seq_len
    if attention.kind != "routed":
        return
    routed = attention.routed
    path = "model.attention.routed"
    yield from at_least(1, routed, path, "num_experts num_routed_queries num_routed_key_values")
    yield from at_least(1, routed, path, "local_window routed_window")
    window = routed.local_window if routed.routed_window is None else routed.routed_window
    if 1 <= length <= window:
        yield (
            f"seq_len={length} is not above routed_window={window}, so nothing would be routed; lower {path}."
            "routed_window, or set model.attention.kind to multi_query"
        )
    if attention.position == "alibi":
        yield "kind=routed has no ALiBi; set model.attention.position to rotary or none"
    if attention.window is not None:
        yield f"kind=routed has a window of its own, {path}.local_window; set model.attention.window to null"
    for name, off in (("sinks", False), ("qk_ln", False), ("clip_qkv", None)):
        value = getattr(attention, name)
        if value != off:
            shown = "null" if off is None else "false"
            yield f"kind=routed does not know {name}={value}; set model.attention.{name} to {shown}"


def _rotary_rules(model: ModelConfig) -> Iterator[str]:
    attention = model.attention
    scaling, factor = attention.rope_scaling, attention.rope_factor
    if scaling != "none" and attention.position != "rotary":
        yield (
            f"rope_scaling={scaling} needs position=rotary, not {attention.position}; "
            "set model.attention.rope_scaling to none"
        )
    if factor < 1:
        yield f"rope_factor={factor} is below 1, but sequences become longer: raise model.attention.rope_factor"
    if scaling == "none" and factor != 1:
        yield f"rope_factor={factor} does nothing with rope_scaling=none; choose linear, ntk or yarn"
    if scaling == "yarn" and attention.rope_original_len is None:
        yield "rope_scaling=yarn needs the length first trained on; set model.attention.rope_original_len"
    if scaling != "yarn" and attention.rope_original_len is not None:
        yield f"rope_original_len={attention.rope_original_len} is of rope_scaling=yarn, not {scaling}; make it null"
