"""Rules of the model's sizes."""

from collections.abc import Iterator

from moe_dist.config.model import ModelConfig
from moe_dist.config.rules.parts import above_zero, at_least, at_most, between, multiple

MOST_LAYERS = 10_000
_LARGEST: dict[str, float] = dict(
    vocab_size=2**24,
    d_model=2**20,
    num_layers=MOST_LAYERS,
    num_heads=2**16,
    num_kv_heads=2**16,
    head_dim=2**16,
    d_ff=2**24,
    num_classes=2**24,
    norm_eps=0.1,  # the mean square of what is normalised is about 1
    embedding_multiplier=1e6,
    residual_multiplier=1e6,
    logits_scaling=1e6,
    max_positions=2**24,
)


def model_rules(model: ModelConfig) -> Iterator[str]:
    yield from at_least(1, model, "model", "vocab_size d_model num_layers num_heads num_kv_heads head_dim d_ff")
    yield from at_least(1, model, "model", "max_positions")
    yield from above_zero(model, "model", "norm_eps embedding_multiplier residual_multiplier logits_scaling")
    yield from between(model, "model", "rope_theta", 1.0, 1e12)
    yield from at_most(model, "model", **_LARGEST)
    if model.rope_theta != ModelConfig().rope_theta and model.attention.position != "rotary":
        yield (
            f"rope_theta={model.rope_theta} is of attention.position=rotary, not {model.attention.position}; "
            f"set model.rope_theta to {ModelConfig().rope_theta}"
        )
    yield from _parts(model)
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


def _parts(model: ModelConfig) -> Iterator[str]:
    """Norms and feed-forwards."""
    if model.norm == "layer" and model.norm_kernels not in ("same", "torch"):
        yield (
            f"norm_kernels={model.norm_kernels} has RMSNorm alone, but norm=layer; set model.norm_kernels to same or "
            "model.norm to rms"
        )
    if model.ff_bias and model.moe.layer_count(model.num_layers) >= model.num_layers:
        yield (
            "ff_bias=true is of dense feed-forwards, and every layer has experts; set model.ff_bias to false (biases "
            "of experts are model.moe.expert_bias)"
        )


def position_rules(model: ModelConfig, seq_len: int) -> Iterator[str]:
    """Of learned positions; seq_len: of the sequences that it is trained on."""
    position, count = model.attention.position, model.max_positions
    if position != "learned" and count is not None:
        yield f"max_positions={count} is of attention.position=learned, not {position}; set model.max_positions to null"
    if position == "learned" and count is None:
        yield (
            "max_positions=null, but attention.position=learned has a vector for each of them; set model.max_positions "
            "to train.seq_len or more"
        )
    if position == "learned" and count is not None and seq_len > count:
        yield (
            f"seq_len={seq_len} is above max_positions={count}, and places past that have no vector; lower "
            "train.seq_len or raise model.max_positions"
        )


def _partly_rotary(head_dim: int, share: float) -> Iterator[str]:
    turned = head_dim * share
    if abs(turned - round(turned)) > 1e-6 or round(turned) % 2 or turned < 2:
        yield (
            f"rotary_share={share} of head_dim={head_dim} is {turned:g}, but rotary embedding turns pairs of numbers: "
            "change model.attention.rotary_share so that it is even"
        )
