"""Whole models on the GPU, with the backends that a GPU gets, against plain torch in float64 on the CPU.

Without a GPU the same goes through Triton's interpreter.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moe_dist import (
    MixtureOfAutoregressiveAttention,
    MixtureOfExperts,
    MultiQueryAttention,
    SwitchMultiQueryAttention,
    TransformerBlock,
)
from moe_dist.config.model import AttentionConfig, ModelConfig, MoEConfig
from moe_dist.generate.decode import CachedDecoder, generate
from moe_dist.generate.sampling import Sampling
from moe_dist.models.backends import resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import single_process_mesh
from tests.unit.helpers import context, random_ids

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
D, LENGTH = 32, 24
ATTENTION = {
    "multi_query": AttentionConfig(),
    "triton": AttentionConfig(backend="triton"),
    "window, sinks, norms": AttentionConfig(backend="triton", position="alibi", window=7, sinks=True, qk_ln=True),
    "of other families": AttentionConfig(
        backend="triton", qkv_bias=True, out_bias=True, qk_norm="head", rotary_share=0.5, window=[7, None], sinks=True
    ),
    "width norm": AttentionConfig(qk_norm="width", rope_scaling="llama3", rope_factor=4.0, rope_original_len=8),
    "dropout": AttentionConfig(backend="triton", dropout=0.2),
    "switch": AttentionConfig(kind="switch", moe=MoEConfig(num_experts=4, top_k=2, capacity_factor=1.0)),
}
ROUTING = {
    "top-2": {},
    "position": {"capacity_factor": 0.75},
    "score": {"capacity_factor": 0.75, "drop_policy": "score"},
    "random": {"capacity_factor": 0.75, "drop_policy": "random"},
    "reroute": {"capacity_factor": 0.75, "overflow": "reroute"},
    "sequence": {"capacity_factor": 1.0, "balance_scope": "sequence", "num_shared_experts": 1, "expert_bias": True},
    "sigmoid": {"router": "sigmoid"},
    "jitter": {"jitter": 0.1},
    "noisy": {"router": "noisy"},
    "expert_choice": {"router": "expert_choice", "capacity_factor": 1.0},
    "sinkhorn": {"router": "sinkhorn"},
    "hash": {"router": "hash"},
}


def a_model(attention: AttentionConfig, moe: MoEConfig, device_type: str, **settings: object) -> ModelConfig:
    sizes = dict(vocab_size=32, d_model=D, num_layers=2, num_heads=4, num_kv_heads=1, d_ff=48)
    model = ModelConfig(**sizes, attention=attention, moe=moe, **settings)
    return resolve_backends(model, 1, device_type, LENGTH)


def plain(model: ModelConfig) -> ModelConfig:
    """Nothing fused."""
    attention = replace(model.attention, backend="torch", moe=replace(model.attention.moe, experts="loop"))
    return replace(model, attention=attention, moe=replace(model.moe, experts="loop"), kernels="torch")


def outcome(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    decoder, ids = Decoder(model, single_process_mesh()).to(device, dtype), random_ids(2, LENGTH + 1).to(device)
    step = replace(context(), seq_len=LENGTH, token_ids_T=ids[:, :-1].reshape(-1))
    output = decoder(ids[:, :-1], ids[:, 1:], step)
    output.loss.backward()
    named = {"loss": output.loss.detach(), "load": torch.stack([stats.load_E for stats in output.stats])}
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        named[name] = parameter.grad
    return {name: value.detach().double().cpu() for name, value in named.items()}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        size = max(float(value.norm()), 1e-4)
        assert float((found[name] - value).norm()) / size <= tolerance, f"{name} differs"


def on_both(attention: AttentionConfig, moe: MoEConfig, tolerance: float = 2e-4, **settings: object) -> None:
    model = a_model(attention, moe, DEVICE.type, **settings)
    found = outcome(model, DEVICE, torch.float32)
    compare(found, outcome(plain(model), torch.device("cpu"), torch.float64), tolerance)


@pytest.mark.parametrize("name", list(ATTENTION))
def test_attention(name: str) -> None:
    on_both(ATTENTION[name], MoEConfig(num_experts=4, top_k=2, capacity_factor=None))


def test_routed_attention() -> None:
    """Its sharp scores multiply what fp32 rounds, so both are in float64."""
    attention = AttentionConfig(kind="routed")
    attention.routed.num_routed_queries, attention.routed.num_routed_key_values, attention.routed.local_window = 2, 3, 8
    model = plain(a_model(attention, MoEConfig(num_experts=4, top_k=2, capacity_factor=None), DEVICE.type))
    found, expected = (outcome(model, device, torch.float64) for device in (DEVICE, torch.device("cpu")))
    compare(found, expected, 1e-6)


@pytest.mark.parametrize("name", list(ROUTING))
def test_routing(name: str) -> None:
    options = {"num_experts": 4, "top_k": 2, "capacity_factor": None} | ROUTING[name]
    on_both(AttentionConfig(), MoEConfig(**options))


@pytest.mark.parametrize("experts", ["grouped_mm", "bmm", "loop", "triton"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_experts(experts: str, activation: str) -> None:
    moe = MoEConfig(num_experts=4, top_k=2, capacity_factor=0.75, experts=experts)
    on_both(AttentionConfig(), moe, activation=activation)


@pytest.mark.parametrize("experts", ["grouped_mm", "triton"])
@pytest.mark.parametrize("width", [48, 42])  # 42 is no multiple of what tensor cores like
def test_bf16(experts: str, width: int) -> None:
    """Close to float64 as far as bf16 goes; a wrong kernel is off by much more."""
    if experts == "triton" and not CUDA:
        pytest.skip("bfloat16 through the interpreter is tests/unit/kernels' business")
    moe = MoEConfig(num_experts=4, top_k=2, capacity_factor=None, experts=experts, d_ff=width)
    model = a_model(AttentionConfig(), moe, DEVICE.type)
    found = outcome(model, DEVICE, torch.bfloat16)
    expected = outcome(plain(model), torch.device("cpu"), torch.float64)
    assert abs(float(found["loss"] - expected["loss"])) < 0.05
    router_like = [name for name in expected if "router" in name or name == "load"]  # ties fall otherwise
    compare(found, {name: value for name, value in expected.items() if name not in router_like}, 0.3)


@pytest.mark.parametrize("recompute", ["none", "activation", "block"])
def test_recompute(recompute: str) -> None:
    moe = MoEConfig(num_experts=4, top_k=2, capacity_factor=0.75)
    on_both(AttentionConfig(dropout=0.2, backend="triton"), moe, recompute=recompute)


@pytest.mark.parametrize("kind", ["multi_query", "switch"])
def test_cached_decoding(kind: str) -> None:
    """Greedy text with a cache is that of the CPU."""
    model = a_model(ATTENTION[kind], MoEConfig(num_experts=4, top_k=2, capacity_factor=1.0), DEVICE.type)
    texts = []
    for chosen, device in ((model, DEVICE), (plain(model), torch.device("cpu"))):
        decoder = Decoder(chosen, single_process_mesh()).to(device).eval()
        steps = generate(CachedDecoder(decoder, device), [[1, 2, 3], [4]], 8, 16, 0, Sampling(temperature=0))
        texts.append([list(step) for step in steps])
    assert texts[0] == texts[1]


LAYERS = {
    "MixtureOfExperts": lambda: MixtureOfExperts(D, 48, 4, 2, dropout=0.0),
    "MultiQueryAttention": lambda: MultiQueryAttention(D, 4, attn_impl="torch", device="cpu"),
    "SwitchMultiQueryAttention": lambda: SwitchMultiQueryAttention(D, 4, num_experts=4),
    "TransformerBlock": lambda: TransformerBlock(D, 4, 48, dropout=0.0),
    "MixtureOfAutoregressiveAttention": lambda: MixtureOfAutoregressiveAttention(
        D, num_routed_queries=2, num_routed_key_values=3, local_attn_window_size=8, dim_head=8, heads=4
    ),
}


def layer_outcome(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    weight = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view_as(y)
    (y * weight).sum().backward()
    assert x.grad is not None
    return [y.detach().cpu(), x.grad.cpu()]


@pytest.mark.parametrize("name", list(LAYERS))
def test_layers_alone(name: str) -> None:
    """fp32 on both; what differs is the device."""
    layer = LAYERS[name]()
    state, x = layer.state_dict(), torch.randn(2, LENGTH, D)
    expected = layer_outcome(layer, x)
    other = LAYERS[name]().to(DEVICE)
    other.load_state_dict(state)
    for found, wanted in zip(layer_outcome(other, x.to(DEVICE)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
