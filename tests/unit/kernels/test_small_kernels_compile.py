"""Top-k, permutation and RMSNorm compile for sm_90 at the sizes of real models, without spilling registers."""

from typing import Any

import pytest

from moe_dist.kernels.norm.triton import norm_tile
from moe_dist.kernels.permute.triton import permute_tile
from moe_dist.kernels.permute.triton_sort import BLOCK, STEP, histogram_step
from tests.unit.kernels.compiling import SHARED_LIMIT, SPILL_LIMIT, Kernel, resources, table

TOP_K = "moe_dist.kernels.top_k.triton"
SORT = "moe_dist.kernels.permute.triton_sort"
PERMUTE = "moe_dist.kernels.permute.triton"
NORM = "moe_dist.kernels.norm.triton"
TILE = 2048
CUT = {"tokens": "i32:16", "chunk": "i32:16", "shift": "i32", "blocks": "i32:16"}


def pointers(**types: str) -> dict[str, str]:
    """Tensors begin at a multiple of 16 bytes, as torch allocates them."""
    return {f"{name}_ptr": f"*{kind}:16" for name, kind in types.items()}


def top_k_kernels(experts: int, top_k: int, score: str, chosen: bool = False) -> list[Kernel]:
    padded = 1 << (experts - 1).bit_length()
    sizes = {"SIGMOID": score == "sigmoid", "E": experts, "E_PAD": padded, "K": top_k}
    sizes["BLOCK"] = min(TILE // padded, 128)
    absent: dict[str, Any] = {} if chosen else {"chosen_ptr": None}
    given = pointers(chosen="i64") if chosen else {}
    inputs = pointers(logits="fp32") | given
    outputs = pointers(experts="i64", scores="fp32", counts="i32", prob_sums="fp32", z="fp32", entropy="fp32")
    label = f"E={experts} K={top_k} {score}" + " chosen" * chosen
    forward = sizes | absent | {"K_PAD": 1 << (top_k - 1).bit_length()}
    grads = pointers(grad_scores="fp32", grad_prob_sums="fp32", grad_z="fp32", grad_logits="fp32")
    inputs_backward = pointers(logits="fp32", experts="i64") | grads
    return [
        Kernel(f"{TOP_K}:_forward", inputs | outputs | CUT, forward, label=f"top_k forward {label}"),
        Kernel(f"{TOP_K}:_backward", inputs_backward | CUT, sizes, label=f"top_k backward {label}"),
    ]


def top_k_cases() -> list[Kernel]:
    return [
        *top_k_kernels(1, 1, "softmax"),
        *top_k_kernels(8, 2, "softmax"),
        *top_k_kernels(60, 4, "softmax", chosen=True),
        *top_k_kernels(128, 8, "softmax"),
        *top_k_kernels(256, 8, "sigmoid"),
        *top_k_kernels(1024, 8, "softmax"),
    ]


def sort_kernels(experts: int, kept: bool) -> list[Kernel]:
    padded, step = histogram_step(experts)
    absent = {} if kept else {"kept_ptr": None}
    inputs = pointers(experts="i64") | (pointers(kept="i1") if kept else {})
    lengths = {"total": "i32:16", "blocks": "i32"}
    histogram = {"E": experts, "E_PAD": padded, "BLOCK": BLOCK, "STEP": step} | absent
    sizes = {"BLOCK": BLOCK, "STEP": STEP}
    place = inputs | pointers(ends="i64", slots="i64", rows="i64") | lengths
    label = f"E={experts}" + " dropped" * kept
    return [
        Kernel(f"{SORT}:_histogram", inputs | pointers(counts="i32") | lengths, histogram, label=f"histogram {label}"),
        Kernel(f"{SORT}:_place", place, sizes | absent, label=f"place {label}"),
    ]


def permute_kernels(width: int, top_k: int, kind: str) -> list[Kernel]:
    block, columns = permute_tile(width)
    sizes = {"K": top_k, "D": width, "BLOCK": block, "COLUMNS": columns}
    length = {"length": "i32:16"}
    places = pointers(places="i64", kept="i1")
    gather = pointers(x=kind, slots="i64", rows=kind) | length
    combine = pointers(rows=kind, weights="fp32") | places | pointers(y=kind) | length
    unweighted = {name: type for name, type in combine.items() if name != "weights_ptr"}
    grads = pointers(grad=kind, grad_rows=kind, grad_weights="fp32")
    backward = pointers(rows=kind, weights="fp32") | places | grads | length
    padded = {"K_PAD": 1 << (top_k - 1).bit_length()}
    label = f"D={width} K={top_k} {kind}"
    return [
        Kernel(f"{PERMUTE}:_gather", gather, sizes, label=f"gather {label}"),
        Kernel(f"{PERMUTE}:_combine", combine, sizes, label=f"combine {label}"),
        Kernel(f"{PERMUTE}:_combine", unweighted, sizes | {"weights_ptr": None}, label=f"combine, no weights {label}"),
        Kernel(f"{PERMUTE}:_combine_backward", backward, sizes | padded, label=f"combine backward {label}"),
    ]


def norm_kernels(width: int, kind: str) -> list[Kernel]:
    rows, padded, warps = norm_tile(width)
    sizes = {"D": width, "D_PAD": padded, "BLOCK": rows}
    forward = pointers(x=kind, scale="fp32", y=kind, inverse="fp32") | {"tokens": "i32:16", "eps": "fp32"}
    inputs = pointers(x=kind, scale="fp32", inverse="fp32", grad=kind)
    backward = inputs | pointers(grad_x=kind, grad_scale="fp32") | {"tokens": "i32:16", "blocks": "i32:16"}
    label = f"D={width} {kind}"
    return [
        Kernel(f"{NORM}:_forward", forward, sizes, warps, label=f"norm forward {label}"),
        Kernel(f"{NORM}:_backward", backward, sizes | {"PROGRAMS": 256}, warps, label=f"norm backward {label}"),
    ]


def permute_cases() -> list[Kernel]:
    return [
        *sort_kernels(8, kept=False),
        *sort_kernels(128, kept=True),
        *sort_kernels(1024, kept=True)[:1],
        *permute_kernels(768, 1, "bf16"),
        *permute_kernels(2048, 8, "bf16"),
        *permute_kernels(4096, 2, "fp32"),
        *permute_kernels(100, 2, "bf16"),
    ]


def norm_cases() -> list[Kernel]:
    widths = ((100, "fp32"), (768, "bf16"), (2048, "bf16"), (4096, "bf16"), (7168, "fp32"), (8192, "bf16"))
    return [kernel for width, kind in widths for kernel in norm_kernels(width, kind)]


@pytest.mark.timeout(120)
def test_no_spills() -> None:
    found = resources([*top_k_cases(), *permute_cases(), *norm_cases()])
    print("\n" + table(found))
    assert [entry for entry in found if entry.spill_bytes > SPILL_LIMIT] == []
    assert max(entry.shared_bytes for entry in found) <= SHARED_LIMIT
