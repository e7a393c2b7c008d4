"""Rules of model.attention: which of its choices go together."""

from collections.abc import Iterator

from moe_dist.config.rules import above_zero, at_least
from moe_dist.config.schema import ModelConfig

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
