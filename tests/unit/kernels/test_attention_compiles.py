"""The attention kernels compile for sm_90 at the block sizes that ship: main shapes do not spill, memory suffices."""

from typing import Any

import pytest
import torch

from moe_dist.kernels.attention.pattern import Pattern
from moe_dist.kernels.attention.triton_call import Tile, choose_attention_tiling
from tests.unit.kernels.compiling import SHARED_LIMIT, SPILL_LIMIT, Kernel, resources, table

MODULE = "moe_dist.kernels.attention.triton"
KINDS = {"bf16": torch.bfloat16, "fp32": torch.float32}
PLAIN, RICH = Pattern(), Pattern(window=1)  # what else RICH asks for makes no difference to blocks
ALWAYS = "k_b k_g k_k v_b v_g v_k"
ROWS = "q_b q_h q_q"
NUMBERS = dict(tiles="i32", queries="i32", keys="i32", groups="i32", scale="fp32")
ABSENT = "cu_q_ptr cu_k_ptr starts_ptr seen_ptr slopes_ptr bias_ptr bias_b bias_h bias_q bias_k window seed threshold"
ABSENT += " first_pair pairs"
EXTRAS: dict[str, dict[str, str]] = {
    "": {},
    "window": dict(window="i32"),
    "packed": dict(cu_q_ptr="*i32:16", cu_k_ptr="*i32:16"),
    "bias": dict(bias_ptr="*fp32:16", bias_b="i32:16", bias_h="i32:16", bias_q="i32:16", bias_k="i32"),
    "dropout": dict(seed="i64", threshold="i64", first_pair="i32", pairs="i32"),
    "alibi, padding": dict(slopes_ptr="*fp32:16", seen_ptr="*i1:16", starts_ptr="*i64:16"),
}


def kernel(name: str, tile: Tile, kind: str, width: int, extra: str, more: dict[str, str], heads: int) -> Kernel:
    """more: pointers and strides of its own; a stride is a multiple of 16."""
    strides = dict.fromkeys(f"{ALWAYS} {ROWS}".split(), "i32:16")
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{kind}:16") | more | strides | NUMBERS | EXTRAS[extra]
    absent: dict[str, Any] = {argument: None for argument in ABSENT.split() if argument not in signature}
    absent |= dict(sinks_ptr=None) if name.endswith("forward") else {}
    absent |= dict(grad_bias_ptr=None) if name.endswith("query_gradient") else {}
    sizes = dict(
        CAUSAL=True, R=heads, WIDTH=width, P=max(16, 1 << (width - 1).bit_length()), PRECISION="ieee", WIDE=False
    )
    label = f"{name.split(':')[1]} P={width} {kind} {extra}".strip()
    constexprs = absent | sizes | dict(M=tile.rows, N=tile.keys)
    return Kernel(f"{MODULE}_{name}", signature, constexprs, tile.num_warps, tile.num_stages, label)


def kernels(kind: str, width: int, extra: str = "", rows: int = 1 << 16, heads: int = 8) -> list[Kernel]:
    tiling = choose_attention_tiling(KINDS[kind], width, rows, PLAIN if extra in ("", "packed") else RICH)
    decoding, of_kind, full = rows < 64, f"*{kind}:16", "*fp32:16"
    forward = dict(out_ptr=full if decoding else of_kind, lse_ptr=full, splits="i32", out_s="i32:16", lse_s="i32")
    forward |= dict(out_b="i32:16", out_h="i32:16", out_q="i32:16")
    found = [kernel("forward:forward", tiling.forward, kind, width, extra, forward, heads)]
    if decoding:
        return found
    grad = dict(grad_ptr=of_kind, lse_ptr=full, delta_ptr=full) | strides_of("grad", "bhq")
    grad_q = grad | dict(out_ptr=of_kind, grad_q_ptr=of_kind) | strides_of("out", "bhq") | strides_of("dq", "bhq")
    grad_kv = grad | dict(grad_k_ptr=of_kind, grad_v_ptr=of_kind, splits="i32")
    grad_kv |= strides_of("dk", "sbgk") | strides_of("dv", "sbgk")
    return [
        *found,
        kernel("backward:query_gradient", tiling.grad_q, kind, width, extra, grad_q, heads),
        kernel("backward:key_value_gradient", tiling.grad_kv, kind, width, extra, grad_kv, heads),
    ]


def strides_of(name: str, dims: str) -> dict[str, str]:
    return {f"{name}_{dim}": "i32:16" for dim in dims}


def combine(width: int) -> Kernel:
    signature = dict(parts_ptr="*fp32:16", lse_ptr="*fp32:16", sinks_ptr="*fp32:16", out_ptr="*bf16:16")
    signature |= strides_of("out", "bhq") | dict.fromkeys(("rows", "heads", "queries", "splits"), "i32")
    return Kernel(f"{MODULE}_decode:combine", signature, dict(S=32, WIDTH=width, P=width), label=f"combine P={width}")


def check(todo: list[Kernel], capsys: pytest.CaptureFixture[str], spill_bytes: int = SPILL_LIMIT) -> None:
    found = resources(todo)
    with capsys.disabled():
        print("\n" + table(found))
    for entry in found:
        assert entry.spill_bytes <= spill_bytes, entry
        assert entry.shared_bytes <= SHARED_LIMIT, entry


def test_nothing_spills(capsys: pytest.CaptureFixture[str]) -> None:
    """The main shapes: multi-query training, and decoding."""
    todo = [kernel for width in (64, 128, 256) for kernel in kernels("bf16", width)]
    check([*todo, *kernels("bf16", 128, rows=16, heads=16), combine(128)], capsys)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_other_patterns_hardly_spill(capsys: pytest.CaptureFixture[str]) -> None:
    widths = (64, 128, 256)
    todo = [kernel for extra in list(EXTRAS)[1:] for width in widths for kernel in kernels("bf16", width, extra)]
    check([*todo, *kernels("bf16", 80, heads=6), combine(256)], capsys, spill_bytes=32)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fp32_spills_in_wide_heads_only(capsys: pytest.CaptureFixture[str]) -> None:
    """It has no tensor cores, and products hold whole heads in registers."""
    check(kernels("fp32", 64), capsys)
    check([kernel for width in (128, 256) for kernel in kernels("fp32", width)], capsys, spill_bytes=320)
