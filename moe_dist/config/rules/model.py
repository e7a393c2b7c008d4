"""Rules of the model's sizes."""

from collections.abc import Iterator

from moe_dist.config.model import ModelConfig
from moe_dist.config.rules.parts import above_zero, at_least, multiple


def model_rules(model: ModelConfig) -> Iterator[str]:
    yield from at_least(1, model, "model", "vocab_size d_model num_layers num_heads num_kv_heads head_dim d_ff")
    yield from above_zero(model, "model", "rope_theta norm_eps")
    yield from multiple(
        "num_heads",
        model.num_heads,
        "num_kv_heads",
        model.num_kv_heads,
        "every key/value head serves the same number of query heads; change model.num_kv_heads (1 is always right)",
    )
    turns = model.attention.position == "rotary"
    if model.head_dim is not None:
        if turns and model.head_dim % 2:
            yield f"head_dim={model.head_dim} is odd; rotary embedding turns pairs of numbers: make model.head_dim even"
        return
    d_model, num_heads = model.d_model, model.num_heads
    yield from multiple("d_model", d_model, "num_heads", num_heads, "change one of them, or set model.head_dim")
    if turns and num_heads >= 1 and d_model % num_heads == 0 and d_model // num_heads % 2:
        yield (
            f"head_dim=d_model/num_heads={d_model}/{num_heads}={d_model // num_heads} is odd; "
            "rotary embedding turns pairs of numbers: change model.num_heads or set an even model.head_dim"
        )
