"""Attention beside torch's own: `python benchmarks/attention.py`. Contestants take turns on new inputs every round.

layer    our multi-query layer, forward and backward, beside the same projections around torch's SDPA with enable_gqa
core     attention alone, forward and backward: our backends, SDPA, and plain matmul, softmax, matmul
decode   one token of a decoder with its cache, after 128 and after 1,024 tokens: ms, and how much it grew

On a GPU: long sequences of 32 heads with 1 and 8 key/value heads in bf16, and decoding against 32k keys, beside SDPA's
flash and cuDNN backends; `--json FILE` keeps the numbers.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from race import device_name, race, restart_like_a_launch_script, versions
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe_dist.attention.multi_query import CausalSelfAttention
from moe_dist.attention.positions import Positions
from moe_dist.config.model import AttentionConfig, ModelConfig, MoEConfig
from moe_dist.kernels.attention.backend import attention
from moe_dist.kernels.random import RandomKey
from moe_dist.models.backends import resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.parallel.sharding import initialize
from moe_dist.step import StepContext

STEP = StepContext(RandomKey.of("benchmark"), "dropless")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Projections(nn.Module):
    """What anyone would write around scaled_dot_product_attention."""

    def __init__(self, d_model: int, heads: int, groups: int, width: int) -> None:
        super().__init__()
        self.heads, self.groups, self.width = heads, groups, width
        self.query = nn.Linear(d_model, heads * width, bias=False)
        self.key_value = nn.Linear(d_model, 2 * groups * width, bias=False)
        self.out = nn.Linear(heads * width, d_model, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q = self.query(x_BSD).unflatten(-1, (self.heads, self.width)).transpose(1, 2)
        kv = self.key_value(x_BSD).unflatten(-1, (self.groups, 2, self.width))
        k, v = kv[..., 0, :].transpose(1, 2), kv[..., 1, :].transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


def ours(model: ModelConfig) -> tuple[CausalSelfAttention, Callable[[Tensor], Tensor]]:
    layer = CausalSelfAttention(model.head_sizes, model.attention, single_process_mesh())
    initialize(layer, 0)
    return layer, lambda x: layer(x.flatten(0, 1), (x.shape[0], x.shape[1]), Positions(), STEP)[0].view_as(x)


def forward_backward(call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    *leaves, grad = inputs
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    call(*leaves).backward(grad)


def layers(precision: str, steps: int, device: torch.device) -> dict[str, float]:
    """B 2, S 1024, D 512, H 8, P 64, one key/value head."""
    dtype = DTYPES[precision]
    attention_config = AttentionConfig(position="none")
    model = ModelConfig(d_model=512, num_heads=8, num_kv_heads=1, attention=attention_config)
    model = resolve_backends(model, 1, device.type, 1024)
    layer, call = ours(model)
    peer = Projections(512, 8, 1, 64)
    with torch.no_grad():
        peer.query.weight.copy_(layer.query.weight)
        peer.key_value.weight.copy_(layer.key_value.weight)
        peer.out.weight.copy_(layer.out.weight.t())
    layer.to(device, dtype), peer.to(device, dtype)
    draw = partial(_draw, [(2, 1024, 512)] * 2, dtype, device)
    x = draw()[0]
    assert torch.allclose(call(x), peer(x), atol=2e-2 if precision == "bf16" else 1e-5)
    contestants = {"projections + SDPA": peer, "moe_dist": call}
    return race({name: partial(_step, one) for name, one in contestants.items()}, draw, steps, 3)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


def cores(shape: tuple[int, ...], precision: str, steps: int, device: torch.device) -> dict[str, float]:
    """shape: B, S, H, G, P."""
    (batch, length, heads, groups, width), dtype = shape, DTYPES[precision]
    draw = partial(
        _draw,
        [(batch, heads, length, width)] + [(batch, groups, length, width)] * 2 + [(batch, heads, length, width)],
        dtype,
        device,
    )
    sdpa = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=heads != groups)
    found: dict[str, Callable[..., Tensor]] = {}
    if device.type == "cuda":
        for name, backend in (("SDPA flash", SDPBackend.FLASH_ATTENTION), ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION)):
            found[name] = partial(_under, backend, sdpa)
        found |= {"moe_dist flash": _backend("flash"), "triton": _backend("triton")}
    else:
        found = {"plain maths": plain, "SDPA": sdpa, "flash": _backend("flash"), "packed": _backend("packed")}
    return race({name: partial(_step, one) for name, one in found.items()}, draw, steps, 2)


def decoding(length: int, groups: int, steps: int, device: torch.device) -> dict[str, float]:
    """One query against `length` keys on a GPU: B 1, H 32, P 128, bf16."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    draw = partial(_draw, [(1, 32, 1, 128), *[(1, groups, length, 128)] * 2], dtype, device)
    sdpa = partial(F.scaled_dot_product_attention, enable_gqa=True)
    contestants = {"SDPA": sdpa, "triton": _backend("triton")}
    with torch.no_grad():
        return race({name: partial(_call, one) for name, one in contestants.items()}, draw, steps, 10)


def on_gpu(steps: int, device: torch.device, rehearse: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """(title, seconds) of the cells that want a GPU; a rehearsal goes through smaller ones on CPU."""
    batch, heads, lengths, width = (1, 8, (16, 20), 16) if rehearse else (4, 32, (4096, 16384), 128)
    precision = "fp32" if rehearse else "bf16"
    for length in lengths:
        for groups in (1, 8):
            title = f"core B {batch}, S {length}, H {heads}, G {groups}, P {width}, {precision}, forward + backward"
            yield title, cores((batch, length, heads, groups, width), precision, steps, device)
    for groups in (1, 8):
        keys = 64 if rehearse else 32768
        yield f"decode, {keys} keys, G {groups}", decoding(keys, groups, steps, device)


def growth(position: str, steps: int) -> tuple[float, float]:
    """ms of a token after 128 and after 1,024 tokens: 4 layers, width 256, MoE, one key/value head."""
    attention_config, moe = AttentionConfig(position=position), MoEConfig(num_experts=8, top_k=2)
    model = ModelConfig(d_model=256, num_layers=4, num_heads=8, d_ff=1024, attention=attention_config, moe=moe)
    decoder = Decoder(resolve_backends(model, 1, "cpu", 256), single_process_mesh()).eval()
    caches, seconds = decoder.new_caches(1, 1100), {128: [], 1024: []}
    ids = torch.randint(256, (1, 1100))
    with torch.no_grad():
        decoder(ids[:, :1024], None, STEP, "logits", caches, torch.tensor([1023]))
        for index in range(steps):
            for length, times in seconds.items():  # in turns
                for cache in caches:
                    cache.lengths = [length]  # what was written there is still there
                began = time.perf_counter()
                decoder(ids[:, length : length + 1], None, STEP, "logits", caches, torch.tensor([0]))
                if index >= 3:
                    times.append(time.perf_counter() - began)
    return tuple(1e3 * sorted(times)[len(times) // 2] for times in seconds.values())


def _backend(name: str) -> Callable[..., Tensor]:
    attend = attention(name)
    return lambda q, k, v: attend(q, k, v, None, None)


def _under(backend: SDPBackend, call: Callable[..., Tensor], *args: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return call(*args)


def _draw(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, device=device).to(dtype) for shape in shapes)


def _step(call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    forward_backward(call, inputs)


def _call(call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    call(*inputs)


def report(title: str, seconds: dict[str, float]) -> Iterator[str]:
    best = min(seconds.values())
    yield title
    for name, value in seconds.items():
        yield f"  {name:20} {1e3 * value:9.2f} ms   {value / best:5.2f} x the best"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rehearse", action="store_true", help="what a GPU would do, tiny, also on CPU")
    parser.add_argument("--json", type=Path, help="where the numbers of a GPU go")
    own = parser.parse_args()
    restart_like_a_launch_script()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = ", ".join(f"{name} {version}" for name, version in versions("torch", "triton", "flash-attn").items())
    print(f"{device_name()}, {torch.get_num_threads()} threads, {found}")
    if device.type == "cuda" or own.rehearse:
        found = {}
        for title, seconds in on_gpu(2 if own.rehearse else own.steps, device, own.rehearse):
            found[title] = seconds
            print(*report(title, seconds), sep="\n", flush=True)
            if own.json:
                own.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        return
    for precision in DTYPES:
        title = f"layer B 2, S 1024, D 512, H 8, G 1, P 64, {precision}, forward + backward"
        print(*report(title, layers(precision, own.steps, device)), sep="\n")
    for precision in DTYPES:
        for shape in ((2, 1024, 8, 1, 64), (1, 4096, 8, 1, 64)):
            title = "core B {}, S {}, H {}, G {}, P {}, ".format(*shape) + f"{precision}, forward + backward"
            steps = own.steps if shape[1] < 4096 else 3
            print(*report(title, cores(shape, precision, steps, device)), sep="\n")
    for position in ("rotary", "alibi"):
        early, late = growth(position, 40)
        print(f"decode, {position}: {early:.2f} ms after 128 tokens, {late:.2f} after 1,024: {late / early:.2f} times")


if __name__ == "__main__":
    main()
