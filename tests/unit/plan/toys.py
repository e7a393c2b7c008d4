"""A machine and a model whose numbers can be worked out by hand."""

from dataclasses import replace

from moe_dist.config import BatchShape, Config, DataConfig, ModelConfig, MoEConfig, TrainConfig
from moe_dist.plan.hardware import Hardware, Link, Memory, Products

NEVER = 1e30
"""A rate at which something takes no time."""


def toy_hardware(peak: float = 1e9, bandwidth: float = NEVER, **changes: object) -> Hardware:
    """peak: FLOP/s. bandwidth: of memory, bytes a second. Links: 1 MB/s inside after 1 ms, a tenth between after 10."""
    plain = Hardware(
        name="toy",
        device="cpu",
        source="datasheet",
        origin=["made up"],
        ranks_per_node=2,
        memory=Memory(bytes=2**30, bandwidth=bandwidth),
        products={"fp32": Products(peak=peak)},
        inside=Link(bandwidth=1e6, latency=1e-3),
        between=Link(bandwidth=1e5, latency=1e-2),
    )
    return replace(plain, **changes)


def toy_config(**moe: object) -> Config:
    """Two layers, the second one MoE: experts of width 5, 2 of 4 for each token, one shared; D=4, H=2, P=2, G=1, V=10.

    Matrix parameters: attention q 16, kv 16, out 16 a layer; dense 3*4*6 = 72; an expert 3*4*5 = 60; router 4*4 = 16.
    """
    settings = dict(num_experts=4, top_k=2, d_ff=5, every=2, num_shared_experts=1, capacity_factor=None)
    model = ModelConfig(
        vocab_size=10,
        d_model=4,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        d_ff=6,
        moe=MoEConfig(**(settings | moe)),
    )
    data = DataConfig(kind="indexed", paths=["tokens"])  # bytes would need a larger vocabulary
    return Config(model=model, data=data, train=TrainConfig(seq_len=3, global_batch=4, micro_batch=2))


TOY_SHAPE = BatchShape(micro_batch=2, accumulation=2, dp=1, global_batch=4, seq_len=3)
"""6 tokens in each of two micro-steps."""
