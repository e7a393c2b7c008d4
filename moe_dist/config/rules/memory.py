"""An absurd size is refused before anything is imported or built for it, and the number that is to blame is named.

A lower bound, not a plan: weights, gradients and both moments in fp32, 16 bytes an element, and the input of the first
block; ZeRO is taken to cut all but that. What a rank needs is counted in `plan/memory.py`, which the training loop asks
next; nothing that fits by that count is refused here (tests/unit/plan/test_memory.py).

    8 experts of 3 matrices of 4096 x 14336 in 32 layers on one rank: 45e9 elements, 672 GiB
    too much for 64 GiB; the largest factor is d_ff=14336
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

from moe_dist.config.rules.batch import BatchShape
from moe_dist.config.schema import Config

_EACH = 16  # bytes of an element: weight, gradient, two moments
_LARGEST_GPU = 288 * 2**30
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True)
class Part:
    """Something that a rank holds: bytes are the product of `factors`, keys of the configuration, times `each`."""

    what: str
    factors: dict[str, int]
    each: float

    @property
    def size(self) -> float:
        return prod(self.factors.values()) * self.each


def host_memory() -> int:
    """Bytes of this machine or its control group."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no control group, or `max`: no limit
        memory = min(memory, int(_CGROUP.read_text(encoding="utf-8")))
    return memory


def machine_memory() -> int:
    """Bytes that a rank could have at most here: of the host or its control group, or of a large GPU if one is here."""
    memory = host_memory()
    return max(memory, _LARGEST_GPU) if Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists() else memory


def memory_rules(config: Config, shape: BatchShape, memory: int) -> Iterator[str]:
    """memory: bytes of a rank, such as machine_memory()."""
    parts = parts_of(config, shape)
    total = sum(part.size for part in parts)
    if total <= memory:
        return
    largest = max(parts, key=lambda part: part.size)
    name = max(largest.factors, key=lambda key: largest.factors[key])
    product = " x ".join(f"{key.rpartition('.')[2]}={value}" for key, value in largest.factors.items())
    yield (
        f"{name.rpartition('.')[2]}={largest.factors[name]} is too much for {in_units(memory)} of memory: "
        f"{largest.what} of {product} take {in_units(largest.size)} or more on each rank; "
        f"lower {name}, or spread them over more ranks"
    )


def parts_of(config: Config, shape: BatchShape) -> list[Part]:
    """Of a rank, before anything is built; sizes at least 1, and a tp that divides the world, have been checked."""
    model, moe, parallel = config.model, config.model.moe, config.parallel
    sharded = config.engine.name == "deepspeed" and config.engine.zero_stage > 0
    dense = _EACH / parallel.tp / (shape.dp if sharded else 1)
    expert = _EACH / parallel.expert_ranks
    expert /= shape.dp * parallel.tp / parallel.expert_ranks if sharded else 1  # copies of a rank's experts
    head = model.head_dim or model.d_model // model.num_heads
    matrices = 3 if model.activation in ("swiglu", "geglu", "clamped_swiglu") else 2
    moe_layers = moe.layer_count(model.num_layers)
    width = {"model.d_model": model.d_model}
    parts = [
        Part("embeddings", {"model.vocab_size": model.vocab_size} | width, dense),
        Part(
            "query and output projections",
            {"model.num_layers": model.num_layers, "model.num_heads": model.num_heads, "model.head_dim": head} | width,
            2 * dense,
        ),
        Part(
            "dense feed-forwards",
            {"model.d_ff": model.d_ff} | width,
            matrices * dense * (model.num_layers - moe_layers),
        ),
        Part(
            "activations",
            _tokens(config, shape) | width,
            4 / (parallel.tp if parallel.sequence_parallel else 1),
        ),
    ]
    if moe_layers:
        key, d_ff = ("model.d_ff", model.d_ff) if moe.d_ff is None else ("model.moe.d_ff", moe.d_ff)
        hidden = sum(d_ff) / moe.num_experts if isinstance(d_ff, list) else d_ff
        factors = {"model.moe.num_experts": moe.num_experts, key: int(hidden), "model.num_layers": model.num_layers}
        parts.append(Part("experts", factors | width, matrices * expert * moe_layers / model.num_layers))
    return parts


def _tokens(config: Config, shape: BatchShape) -> dict[str, int]:
    """Of a forward pass on a rank, by the key that sets the number of sequences."""
    key = "train.global_batch" if config.train.micro_batch is None else "train.micro_batch"
    return {key: shape.micro_batch, "train.seq_len": shape.seq_len}


def in_units(count: float) -> str:
    """Bytes for people: 1.5 GiB."""
    unit = next((unit for unit in ("PiB", "TiB", "GiB") if count >= _UNITS[unit]), "MiB")
    return f"{count / _UNITS[unit]:.1f} {unit}"


_UNITS = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}
