"""Rules of the model's sizes."""

from collections.abc import Iterator

from moe_dist.config.model import ModelConfig
from moe_dist.config.rules.parts import above_zero, at_least, at_most, between, multiple

_LARGEST: dict[str, float] = dict(
    vocab_size=2**24,
    d_model=2**20,
    num_layers=10_000,
    num_heads=2**16,
    num_kv_heads=2**16,
    head_dim=2**16,
    d_ff=2**24,
    num_classes=2**24,
    norm_eps=0.1,  # the mean square of what is normalised is about 1
    embedding_multiplier=1e6,
    residual_multiplier=1e6,
    logits_scaling=1e6,
)


def model_rules(model: ModelConfig) -> Iterator[str]:
    yield from at_least(1, model, "model", "vocab_size d_model num_layers num_heads num_kv_heads head_dim d_ff")
    yield from above_zero(model, "model", "norm_eps embedding_multiplier residual_multiplier logits_scaling")
    yield from between(model, "model", "rope_theta", 1.0, 1e12)
    yield from at_most(model, "model", **_LARGEST)
    if model.rope_theta != ModelConfig().rope_theta and model.attention.position != "rotary":
        yield (
            f"rope_theta={model.rope_theta} is of attention.position=rotary, not {model.attention.position}; "
            f"set model.rope_theta to {ModelConfig().rope_theta}"
        )
    yield from multiple(
        "num_heads",
        model.num_heads,
        "num_kv_heads",
        model.num_kv_heads,
        "every key/value head serves the same number of query heads; change model.num_kv_heads (1 is always right)",
    )
    share = model.attention.rotary_share
    turns = model.attention.position == "rotary" and share == 1
    if 0 < share < 1 and model.num_heads >= 1:
        yield from _partly_rotary(model.head_width, share)
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


def _partly_rotary(head_dim: int, share: float) -> Iterator[str]:
    turned = head_dim * share
    if abs(turned - round(turned)) > 1e-6 or round(turned) % 2 or turned < 2:
        yield (
            f"rotary_share={share} of head_dim={head_dim} is {turned:g}, but rotary embedding turns pairs of numbers: "
            "change model.attention.rotary_share so that it is even"
        )
