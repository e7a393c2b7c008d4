"""The rules of the attention section: `validate` asks for all of them."""

from collections.abc import Iterator

from moe_dist.config.rules import at_least
from moe_dist.config.schema import Config


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
