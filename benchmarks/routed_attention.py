"""Routed autoregressive attention beside the colt5-attention package: `python benchmarks/routed_attention.py`.

One layer: local attention of every token and routed attention of 4 experts, 32 queries and 32 key-values a window. Its
peer is the package that the layer's design comes from (MIT; `pip install -e '.[bench]'`), with its own local attention,
as many experts as separate layers of its routed kind whose outputs are added, which is how its parts make this layer.
Its local attention sees up to twice the window, ours exactly window + 1 tokens.

Contestants take turns on new tokens every round. The router's share is timed on its own, on the same tokens.
"""

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from race import device_name, profile, race, restart_like_a_launch_script, versions
from torch import Tensor, nn

from moe_dist import MixtureOfAutoregressiveAttention


class Peer(nn.Module):
    """The package's layer with one expert has local attention; the others are that layer without it."""

    def __init__(self, dim: int, window: int, queries: int, key_values: int, experts: int) -> None:
        super().__init__()
        from colt5_attention import ConditionalRoutedAutoregressiveAttention

        def one() -> nn.Module:
            return ConditionalRoutedAutoregressiveAttention(
                dim,
                num_heavy_tokens_q=queries,
                num_heavy_tokens_kv=key_values,
                light_window_size=window,
                heavy_window_size=window,
                use_flash_attn=True,
                rotary_emb=False,
            )

        self.layers = nn.ModuleList(one() for _ in range(experts))
        for layer in self.layers[1:]:
            layer.light_attn = Nothing()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = sum(layer(x) for layer in self.layers)
        return y


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(dim=512, n=1024, window=128, routed=32, experts=4, batch=2, steps=15).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--profile", action="store_true", help="also print where our layer's time goes")
    args = parser.parse_args()
    restart_like_a_launch_script()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    print(", ".join(f"{k} {v}" for k, v in versions("torch", "CoLT5-attention", "local-attention").items()))
    print(f"{device_name()}, {torch.get_num_threads()} threads; median of {args.steps} rounds; {vars(args)}")

    def ours(**options: Any) -> MixtureOfAutoregressiveAttention:
        sizes = (args.dim, args.routed, args.routed, args.window)
        return MixtureOfAutoregressiveAttention(*sizes, num_experts=args.experts, **options).to(device)

    layers: dict[str, nn.Module] = {"moe_dist": ours(), "moe_dist, causal_routing=False": ours(causal_routing=False)}
    if find_spec("colt5_attention"):
        layers["colt5-attention"] = Peer(args.dim, args.window, args.routed, args.routed, args.experts).to(device)
    else:
        print("colt5-attention is not installed: pip install -e '.[bench]'")

    def draw() -> Tensor:
        return torch.randn(args.batch, args.n, args.dim, device=device)

    def forward(layer: nn.Module) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def step(x: Tensor) -> None:
            layer(x)

        return step

    def training(layer: nn.Module) -> Callable[[Tensor], None]:
        def step(x: Tensor) -> None:
            layer(x.requires_grad_()).sum().backward()
            layer.zero_grad(set_to_none=True)

        return step

    def router(x: Tensor) -> None:
        core = layers["moe_dist"].attention
        with torch.no_grad():
            core.routers(x.flatten(0, 1), x.shape[:2], args.routed, args.routed)

    steps = {name: forward(layer) for name, layer in layers.items()}
    show("forward", race(steps | {"the routers of moe_dist alone": router}, draw, args.steps, 4))
    show("forward + backward", race({name: training(layer) for name, layer in layers.items()}, draw, args.steps, 4))
    if args.profile:
        profile(steps["moe_dist"], draw)
        profile(training(layers["moe_dist"]), draw)


def show(title: str, seconds: dict[str, float]) -> None:
    print(f"\n{title:34}{'ms':>8}{'/ ours':>9}")
    for name, s in sorted(seconds.items(), key=lambda item: item[1]):
        print(f"{name:34}{s * 1e3:8.2f}{s / seconds['moe_dist']:9.2f}")


if __name__ == "__main__":
    main()
