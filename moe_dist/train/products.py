"""Which library computes the experts' fp32 products on CPU, measured when a run starts anew.

What is measured once is kept: a run that goes on takes what its config.yaml names, so that no bit of it hangs on how
busy the machine was when it was started again.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from moe_dist.config import BatchShape, Config
from moe_dist.config.load import load_config
from moe_dist.config.model import ModelConfig
from moe_dist.kernels.grouped_mm.measure import seconds_of_products
from moe_dist.kernels.grouped_mm.onednn import CHOICES, Products, named
from moe_dist.moe.experts import expert_widths
from moe_dist.parallel.mesh import Layout
from moe_dist.parallel.objects import broadcast_json, gather_json
from moe_dist.train.record.run_folder import RunFolder

Say = Callable[[str], None]


def products_chosen(
    model: ModelConfig, config: Config, shape: BatchShape, layout: Layout, device: torch.device, say: Say
) -> ModelConfig:
    """model, whose `measured` is now a choice; every rank must call. say: is told what was measured."""
    if model.moe.cpu_products != "measured" or model.moe.num_experts == 0:
        return model
    if device.type != "cpu":
        raise ValueError("model.moe.cpu_products=measured is of the CPU, which does not train here: leave it at auto")
    kept = broadcast_json(_kept(config))
    products = _measured(model, shape, layout, say) if kept is None else named(kept)
    return replace(model, moe=replace(model.moe, cpu_products=products))


def _kept(config: Config) -> str | None:
    path = RunFolder(config.run.folder).path / "config.yaml"
    before = load_config(path).model.moe.cpu_products if path.exists() else "measured"
    return None if before in ("auto", "measured") else before


def _measured(model: ModelConfig, shape: BatchShape, layout: Layout, say: Say) -> Products:
    """All ranks measure at the same time, as they will train, and add up what they saw."""
    moe = model.moe
    tokens = shape.micro_batch * shape.seq_len * layout.ep // layout.tp
    rows = max(1, tokens * moe.top_k // moe.num_experts)
    widths = expert_widths(moe, model.d_ff)
    width = max(1, sum(widths) // len(widths) // layout.etp)
    found = gather_json(seconds_of_products(rows, model.d_model, width, model.activation))
    seconds = {choice: sum(each[choice] for each in found) / len(found) for choice in CHOICES}
    best = min(CHOICES, key=lambda choice: seconds[choice])
    shown = ", ".join(f"{choice} {each * 1e3:.2f}" for choice, each in seconds.items())
    say(f"products  {best}: ms of {rows} rows of an expert, forward and backward: {shown}")
    return best
