"""Whole training steps beside Hugging Face Transformers: `python benchmarks/train_step.py --precision fp32 bf16`.

Contestants train the same shape on the same random tokens, new ones at every step, and take turns step by step, so a
slower moment of the machine meets all of them. A step is forward, backward, clipping and fused AdamW.

* `moe_dist EXPERTS`: our Decoder in NativeEngine. In bf16 the masters, the gradients and the moments are fp32.
* `transformers`: MixtralForCausalLM with its grouped_mm experts, SDPA and the load-balancing loss. In bf16 parameters,
  gradients and moments are all bfloat16: less traffic and less precision than ours.
* `dense bound`: our Decoder with one dense feed-forward of the width that a token's experts have together. It does the
  arithmetic of the MoE without routing, and reads each weight for all tokens.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import transformers
from race import cpu_name, profile, race, restart_like_a_launch_script
from torch import Tensor

from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.config.schema import EngineConfig, OptimConfig
from moe_dist.engine.native import NativeEngine
from moe_dist.kernels.random import RandomKey
from moe_dist.models.backends import describe_backends, resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.models.flops import train_flops_per_token
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.step import StepContext

OPTIM = OptimConfig(lr=3e-4)
Step = Callable[[Tensor], float]  # tokens [B, S + 1] -> loss


def model_config(experts: str, seq_len: int, precision: str) -> ModelConfig:
    """The MoE of the comparison, or its dense bound for experts = `dense`; backends resolved as in a run."""
    routed = experts != "dense"
    moe = MoEConfig(
        num_experts=8 if routed else 0, top_k=2, d_ff=1024, capacity_factor=None, experts=experts if routed else "auto"
    )
    model = ModelConfig(
        vocab_size=8192,
        d_model=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=1,
        d_ff=moe.top_k * 1024,
        tie_embeddings=False,
        moe=moe,
    )
    return resolve_backends(model, ep=1, device_type="cpu", seq_len=seq_len)


def ours(model: ModelConfig, precision: str) -> Step:
    mesh = single_process_mesh()
    engine = NativeEngine(Decoder(model, mesh), mesh, EngineConfig(precision=precision), OPTIM, accumulation=1)
    context = StepContext(RandomKey.of(0))

    def step(tokens: Tensor) -> float:
        output = engine.micro_step(tokens[:, :-1], tokens[:, 1:], context)
        engine.update(OPTIM.lr)
        return float(output.nll)

    return step


def theirs(model: ModelConfig, precision: str) -> Step:
    config = transformers.MixtralConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=model.moe.d_ff,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        num_local_experts=model.moe.num_experts,
        num_experts_per_tok=model.moe.top_k,
        output_router_logits=True,
        use_cache=False,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )
    net = transformers.MixtralForCausalLM(config).train()
    chosen = (net.config._attn_implementation, net.config._experts_implementation)
    assert chosen == ("sdpa", "grouped_mm"), chosen
    if precision == "bf16":
        net.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(
        net.parameters(), OPTIM.lr, (OPTIM.beta1, OPTIM.beta2), OPTIM.eps, OPTIM.weight_decay, fused=True
    )

    def step(tokens: Tensor) -> float:
        loss = net(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--experts", nargs="+", choices=["loop", "bmm", "grouped_mm"], default=["grouped_mm"])
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each contestant")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before them")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--profile", action="store_true", help="then print where our first contestant's time goes")
    args = parser.parse_args()
    restart_like_a_launch_script()

    shape = (args.batch, args.seq_len)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {cpu_name()}")
    print(f"{torch.get_num_threads()} threads; {shape[0]} x {shape[1]} tokens a step; median of {args.steps} steps")
    for precision in args.precision:
        torch.manual_seed(0)
        routed = [model_config(experts, args.seq_len, precision) for experts in args.experts]
        model, dense = routed[0], model_config("dense", args.seq_len, precision)
        contestants = {f"moe_dist {m.moe.experts}": ours(m, precision) for m in routed}
        first = next(iter(contestants.values()))
        contestants |= {"transformers": theirs(model, precision), "dense bound": ours(dense, precision)}
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randint, model.vocab_size, (shape[0], shape[1] + 1), generator=generator)
        seconds = race(contestants, draw, args.steps, args.warm_up)

        note = "; transformers keeps parameters and moments in bf16, moe_dist in fp32" if precision == "bf16" else ""
        backends = ", ".join(f"{k}: {v}" for k, v in describe_backends(model, "cpu").items())
        print(f"\n{precision}{note}\nmoe_dist with {backends}")
        print(f"{'':24}{'ms':>8}{'tokens/s':>10}{'/ transformers':>16}{'/ dense':>9}{'GFLOP/s':>9}")
        for name, median in seconds.items():
            flops = train_flops_per_token(dense if name == "dense bound" else model, shape[1])
            tokens = shape[0] * shape[1] / median
            ratios = seconds["transformers"] / median, seconds["dense bound"] / median
            rates = f"{tokens:10.0f}{ratios[0]:16.2f}{ratios[1]:9.2f}{tokens * flops / 1e9:9.0f}"
            print(f"{name:24}{median * 1e3:8.0f}{rates}")
        if args.profile:
            profile(first, draw)


if __name__ == "__main__":
    main()
