"""Planned step times beside published ones, as a Markdown table: `python benchmarks/published.py`.

Nothing is run: each setting is planned on the H100 of configs/hardware, whose reached shares are assumed. The systems
measured are not ours. They cut some models over pipeline stages, which we do not: then one stage is planned on its own
ranks, the last, with the logits, and its micro-steps are stretched by the bubble of 1F1B, 1 + (stages - 1) / (chunks *
micro-batches) (Narayanan et al., arXiv 2104.04473, section 2.2). They reduce gradients and gather weights behind
compute, so a second column leaves those exchanges out.

Where a publication gives TFLOP/s alone, its step time follows from Megatron's count, which has attention as a full
square; ours has what a causal mask leaves of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moe_dist.config import Config, EngineConfig, ModelConfig, MoEConfig, ParallelConfig, TrainConfig
from moe_dist.config.model import AttentionConfig
from moe_dist.models.flops import forward_products, train_flops_per_token
from moe_dist.plan.hardware import load_hardware
from moe_dist.plan.plan import Plan, make_plan

MIXTRAL_8X22B = ModelConfig(
    vocab_size=32000,
    d_model=6144,
    num_layers=56,
    num_heads=48,
    num_kv_heads=8,
    d_ff=16384,
    tie_embeddings=False,
    moe=MoEConfig(num_experts=8, top_k=2, capacity_factor=None),
)
QWEN3_30B = ModelConfig(
    vocab_size=151936,
    d_model=2048,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    d_ff=768,
    tie_embeddings=False,
    attention=AttentionConfig(qk_norm="head"),
    moe=MoEConfig(num_experts=128, top_k=8, capacity_factor=None),
)
QWEN3_235B = replace(
    QWEN3_30B, d_model=4096, num_layers=94, num_heads=64, d_ff=1536, moe=replace(QWEN3_30B.moe, d_ff=1536)
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A published run. stages, chunks: of the pipeline, and of the model on each stage. seconds: of its step, published
    or from `tflops`, model TFLOP/s of a GPU as Megatron counts them."""

    name: str
    model: ModelConfig
    gpus: int
    global_batch: int
    micro_batch: int
    ep: int
    tp: int = 1
    zero_stage: int = 1
    recompute: str = "none"
    stages: int = 1
    chunks: int = 1
    seconds: float | None = None
    tflops: float | None = None
    source: str


AUTOMODEL = Setting(
    name="Qwen3-30B-A3B, NeMo Automodel",
    model=QWEN3_30B,
    gpus=8,
    global_batch=512,
    micro_batch=4,
    ep=8,
    zero_stage=3,
    seconds=21.773,
    source="277 TFLOP/s, 21.773 s: NeMo Automodel, performance-summary.md",
)
SETTINGS = [
    Setting(
        name="Mixtral 8x22B, Megatron-core, dropless",
        model=MIXTRAL_8X22B,
        gpus=128,
        global_batch=256,
        micro_batch=1,
        ep=8,
        tp=2,
        stages=8,
        tflops=0.493 * 989.4,
        source="49.3% MFU: arXiv 2504.14960; sizes: Megatron-MoE-ModelZoo, runtime.conf",
    ),
    AUTOMODEL,
    replace(
        AUTOMODEL,
        name="the same, planned with recomputation",
        recompute="block",
        source="as above; whether blocks were computed again is not published",
    ),
    Setting(
        name="Qwen3-30B-A3B, Megatron Bridge, capacity 1",
        model=replace(QWEN3_30B, moe=replace(QWEN3_30B.moe, capacity_factor=1.0)),
        gpus=16,
        global_batch=512,
        micro_batch=2,
        ep=8,
        stages=2,
        chunks=24,
        seconds=512 * 4096 / (16 * 10494),
        source="241 TFLOP/s, 10,494 tokens/s a GPU: Megatron Bridge 25.09, performance-summary.md",
    ),
    Setting(
        name="Qwen3-235B-A22B, Megatron-core, FSDP",
        model=QWEN3_235B,
        gpus=256,
        global_batch=2048,
        micro_batch=4,
        ep=8,
        tp=2,
        zero_stage=3,
        recompute="block",
        seconds=17.6,
        source="276 TFLOP/s, 17.6 s: Megatron-MoE-ModelZoo, best_practice/Qwen3",
    ),
]


def planned(setting: Setting) -> tuple[Plan, float, float]:
    """(the plan of a stage, seconds of a step, the same without gradients and weights that are exchanged)."""
    model = replace(
        setting.model,
        num_layers=setting.model.num_layers // setting.stages,
        recompute=setting.recompute,  # type: ignore[arg-type]
    )
    config = Config(
        model=model,
        engine=EngineConfig(name="deepspeed", zero_stage=setting.zero_stage, precision="bf16"),
        parallel=ParallelConfig(ep=setting.ep, tp=setting.tp, sequence_parallel=setting.tp > 1),
        train=TrainConfig(seq_len=4096, global_batch=setting.global_batch, micro_batch=setting.micro_batch),
    )
    plan = make_plan(config, setting.gpus // setting.stages, load_hardware("h100"))
    once = ("gradient exchange", "ZeRO weights", "optimizer", "gradient copies")
    parts = plan.time.parts
    micro_steps = sum(seconds for part, seconds in parts.items() if part not in once)
    bubble = (setting.stages - 1) / (setting.chunks * plan.shape.accumulation)
    own = sum(parts.get(part, 0.0) for part in once[2:])
    exchanged = sum(parts.get(part, 0.0) for part in once[:2]) - plan.time.hidden
    hidden = micro_steps * (1 + bubble) + own
    return plan, hidden + exchanged, hidden


def published_seconds(setting: Setting) -> float:
    if setting.seconds is not None:
        return setting.seconds
    assert setting.tflops is not None
    return megatron_flops(setting) / (setting.tflops * 1e12 * setting.gpus)


def megatron_flops(setting: Setting) -> float:
    """Of a step: ours, and the half of the scores that a causal mask leaves out."""
    scores = sum(each.flops for each in forward_products(setting.model, 4096) if each.part == "attention scores")
    hidden = scores * (4096 / ((4096 + 1) / 2) - 1)
    return setting.global_batch * 4096 * (train_flops_per_token(setting.model, 4096) + 3 * hidden)


def rows() -> Iterator[str]:
    yield "| run | GPUs | layout | published | planned | error | gradients hidden | error | memory planned |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for setting in SETTINGS:
        plan, whole, hidden = planned(setting)
        told = published_seconds(setting)
        layout = f"tp {setting.tp}, ep {setting.ep}, pp {setting.stages}, ZeRO-{setting.zero_stage}"
        layout += f", micro-batch {setting.micro_batch} of {setting.global_batch}, recompute {setting.recompute}"
        memory = f"{plan.memory.expected / 2**30:.0f} GiB"
        times = f"{told:.2f} s | {whole:.2f} s | {whole / told - 1:+.0%} | {hidden:.2f} s | {hidden / told - 1:+.0%}"
        yield f"| {setting.name} | {setting.gpus} | {layout} | {times} | {memory} |"
    yield ""
    yield from (f"- {setting.name}: {setting.source}" for setting in SETTINGS)


if __name__ == "__main__":
    print("\n".join(rows()))
