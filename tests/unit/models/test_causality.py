"""In evaluation, no token changes what comes before it, and no sequence another one: every kind of attention, block and
model, in float64, over 50 random seeds."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import moe_dist
from moe_dist.config.model import AttentionConfig
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import single_process_mesh
from tests.unit.helpers import context, tiny_model

B, S, D, V = 3, 14, 16, 32
Case = tuple[nn.Module, Callable[[Tensor], Tensor]]

DECODERS = {
    "multi_query": {},
    "alibi": dict(position="alibi"),
    "options": dict(window=5, sinks=True, qk_ln=True, clip_qkv=0.8),
    "of other families": dict(
        window=[5, None], sinks=True, qk_norm="width", rotary_share=0.5, qkv_bias=True, out_bias=True
    ),
    "switch": dict(kind="switch"),
    "routed": dict(kind="routed"),
}


def decoder(name: str, seed: int) -> Case:
    options = dict(DECODERS[name])
    attention = AttentionConfig(backend="flash", **options)
    model = Decoder(tiny_model(attention=attention, num_kv_heads=1), single_process_mesh(), seed=seed)
    return model, lambda ids: model(ids, None, context(phase="dropless"), "logits")


def first(call: Callable[..., object]) -> Callable[[Tensor], Tensor]:
    def found(x: Tensor) -> Tensor:
        result = call(x)
        return result[0] if isinstance(result, tuple) else result

    return found


def layer(name: str, seed: int) -> Case:
    torch.manual_seed(seed)
    made = {
        "MultiQueryAttention": lambda: moe_dist.MultiQueryAttention(D, 4, attn_impl="flash", alibi=True),
        "SwitchMultiQueryAttention": lambda: moe_dist.SwitchMultiQueryAttention(D, 4, 4),
        "Block": lambda: moe_dist.Block(D, 4, 4),
        "TransformerBlock": lambda: moe_dist.TransformerBlock(D, 4, 24, use_moe=True, num_experts=4, position="rotary"),
        "MixtureOfAutoregressiveAttention": lambda: moe_dist.MixtureOfAutoregressiveAttention(
            D, 2, 3, 3, dim_head=4, heads=2
        ),
    }[name]()
    return made, first(made)


def transformer(seed: int) -> Case:
    torch.manual_seed(seed)
    model = moe_dist.Transformer(D, 4, 4, 2, V)
    return model, first(model)


LAYERS = (
    "MultiQueryAttention SwitchMultiQueryAttention Block TransformerBlock MixtureOfAutoregressiveAttention"
).split()


def cases() -> Iterator[tuple[str, Callable[[int], Case], bool]]:
    for name in DECODERS:
        yield f"decoder {name}", lambda seed, name=name: decoder(name, seed), True
    yield "Transformer", transformer, True
    for name in LAYERS:
        yield name, lambda seed, name=name: layer(name, seed), False


@pytest.mark.parametrize(("name", "make", "takes_ids"), [pytest.param(*case, id=case[0]) for case in cases()])
def test_is_causal_and_keeps_sequences_apart(name: str, make: Callable[[int], Case], takes_ids: bool) -> None:
    changed_later = 0
    for seed in range(50):
        model, call = make(seed)
        model.double().eval()
        generator = torch.Generator().manual_seed(seed)
        if takes_ids:
            x = torch.randint(V, (B, S), generator=generator)
        else:
            x = torch.randn(B, S, D, generator=generator, dtype=torch.float64)
        at = seed % S
        other = x.clone()
        other[0, at] = (other[0, at] + 1) % V if takes_ids else other[0, at] + 1
        with torch.no_grad():
            before, after = call(x), call(other)
        difference_S = (before - after).abs().flatten(2).amax(-1)[0]
        assert (difference_S[:at] <= 1e-12).all(), f"seed {seed}: token {at} changed {difference_S[:at].max():.1e}"
        assert difference_S[at] > 0
        changed_later += int((difference_S[at + 1 :] > 0).any())
        assert before[1:].equal(after[1:]), f"seed {seed}: another sequence changed"
    assert changed_later > 25  # it does look back
