"""The grouped kernels compile for sm_90 at the block sizes that ship: nothing spills, shared memory fits."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_dist.kernels.grouped_mm.tiles import ExpertTiling, ProductBlock, choose_expert_tiling
from moe_dist.kernels.grouped_mm.triton_parts import GROUP
from tests.unit.kernels.compiling import SHARED_LIMIT, Kernel, resources, table

D_MODEL, D_FF, EXPERTS = 2048, 1024, 64
TILINGS = {  # widths that their blocks divide
    "bf16": choose_expert_tiling(torch.bfloat16, 64 * 1024, EXPERTS, D_MODEL, D_FF),
    "bf16 short": choose_expert_tiling(torch.bfloat16, 64 * 32, EXPERTS, D_MODEL, D_FF),
    "fp32": choose_expert_tiling(torch.float32, 64 * 1024, EXPERTS, D_MODEL, D_FF),
}
MODULE = "moe_dist.kernels.grouped_mm.triton"
INTEGERS = "num_tiles num_rows columns depth height width num_x N_BLOCKS M_BLOCKS".split()
DTYPES = dict.fromkeys("source slots target tiles counts ends rows_XK".split(), "i64")
DTYPES |= dict(weights="fp32", dots="fp32", kept="i1")


def unaligned(kernel: Kernel) -> Kernel:
    """The same for widths that are a multiple of nothing."""
    signature = {name: "i32" if kind == "i32:16" else kind for name, kind in kernel.signature.items()}
    return replace(kernel, signature=signature)


def kernel(
    name: str, label: str, arguments: str, kind: str, block: ProductBlock | None = None, **constexprs: Any
) -> Kernel:
    """`arguments`: names in order, pointers without their _ptr; one after a minus sign is None."""
    signature = {}
    for argument in arguments.split():
        if argument in INTEGERS:
            # Numbers of tiles and blocks are odd as often as not; widths are multiples of 16.
            signature[argument] = "i32:16" if argument in ("columns", "depth", "height", "width") else "i32"
        elif argument.startswith("-"):
            constexprs[f"{argument[1:]}_ptr"] = None
        else:
            signature[f"{argument}_ptr"] = f"*{DTYPES.get(argument, kind)}:16"
    options = {} if block is None else dict(num_warps=block.num_warps, num_stages=block.num_stages)
    return Kernel(name, signature, constexprs, **options, label=label)


def kernels(label: str, tiling: ExpertTiling, even: bool = True) -> list[Kernel]:
    kind = "fp32" if label.startswith("fp32") else "bf16"
    fixed = dict(GROUP=GROUP, PRECISION=tiling.precision)

    def rows(block: ProductBlock) -> dict[str, Any]:
        return dict(M=tiling.rows, N=block.n, K=block.k, EVEN=even, **fixed)

    def down(name: str, block: ProductBlock, arguments: str) -> Kernel:
        after = " tiles out num_tiles columns depth N_BLOCKS"
        return kernel(f"{MODULE}_forward:down_projection", f"{label} {name}", arguments + after, kind, block,
                      INSIDE=even, **rows(block))  # fmt: skip

    def weights(name: str, block: ProductBlock, two: bool) -> Kernel:
        sign = "" if two else "-"
        arguments = f"a {sign}a2 b source counts ends out {sign}out2 height columns M_BLOCKS N_BLOCKS"
        return kernel(f"{MODULE}_backward:weight_gradient", f"{label} {name}", arguments, kind, block,
                      M=tiling.grad_rows, N=block.n, K=block.k, INSIDE=even, **fixed)  # fmt: skip

    up = "x source tiles gate up {}gate_bias {}up_bias pre_gate pre_up act num_tiles columns depth N_BLOCKS"
    hidden = (
        "gy source tiles out pre_gate pre_up -act weights slots grad_gate grad_up weighted dots"
        " num_tiles num_rows columns depth N_BLOCKS"
    )
    gated = dict(GATED=True, FUNCTION="silu")
    return [
        kernel(f"{MODULE}_forward:up_projection", f"{label} up", up.format("-", "-"), kind, tiling.up,
               HALVES=tiling.up.halves, **gated, **rows(tiling.up)),
        kernel(f"{MODULE}_forward:up_projection", f"{label} up, biases, geglu", up.format("", ""), kind, tiling.up,
               HALVES=tiling.up.halves, **gated | dict(FUNCTION="gelu"), **rows(tiling.up)),
        down("down", tiling.down, "a -a2 b -b2 -bias weights slots -target"),
        down("down, top-1, bias", tiling.down, "a -a2 b -b2 bias weights slots target"),
        kernel(f"{MODULE}_backward:hidden_gradient", f"{label} hidden gradient", hidden, kind, tiling.hidden_grad,
               HALVES=tiling.hidden_grad.halves, **gated, **rows(tiling.hidden_grad)),
        kernel(f"{MODULE}_backward:hidden_gradient", f"{label} hidden gradient, clamped", hidden, kind,
               tiling.hidden_grad, HALVES=tiling.hidden_grad.halves, **gated | dict(FUNCTION="clamped"),
               **rows(tiling.hidden_grad)),
        kernel(f"{MODULE}_backward:hidden_gradient", f"{label} hidden gradient, geglu, kept",
               hidden.replace("-act", "act"), kind, tiling.hidden_grad,
               HALVES=tiling.hidden_grad.halves, **gated | dict(FUNCTION="gelu"), **rows(tiling.hidden_grad)),
        down("input gradient", tiling.input_grad, "a a2 b b2 -bias -weights slots -target"),
        weights("gate and up gradient", tiling.up_grad, two=True),
        weights("out gradient", tiling.out_grad, two=False),
    ]  # fmt: skip


def small_kernels(label: str, kind: str) -> list[Kernel]:
    """Those without a product."""
    sums = "a source weights slots counts ends out columns"
    return [
        kernel(f"{MODULE}_forward:sum_rows", f"{label} sum over K", "rows rows_XK kept out num_x width", kind,
               TOP_K=8, X=4, D=512),
        kernel(f"{MODULE}_backward:column_sums", f"{label} bias gradient", sums, kind, M=32, N=128),
        kernel(f"{MODULE}_backward:bias_dots", f"{label} bias . gy", "gy source bias tiles dots num_tiles columns",
               kind, M=128, N=64),
    ]  # fmt: skip


def check(todo: list[Kernel], capsys: pytest.CaptureFixture[str]) -> None:
    found = resources(todo)
    with capsys.disabled():
        print("\n" + table(found))
    for entry in found:
        assert entry.spill_bytes == 0, entry
        assert entry.shared_bytes <= SHARED_LIMIT, entry


def test_nothing_spills(capsys: pytest.CaptureFixture[str]) -> None:
    """The main shapes: training in bf16."""
    check([*kernels("bf16", TILINGS["bf16"]), *small_kernels("bf16", "bf16")], capsys)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_spills_at_other_widths(capsys: pytest.CaptureFixture[str]) -> None:
    todo = [kernel for label in ("bf16 short", "fp32") for kernel in kernels(label, TILINGS[label])]
    todo += kernels("bf16, widths in part of a block", TILINGS["bf16"], even=False)
    odd = choose_expert_tiling(torch.bfloat16, 64 * 1024, EXPERTS, D_MODEL + 1, D_FF)
    todo += [unaligned(kernel) for kernel in kernels("bf16, odd widths", odd, even=False)]
    todo += [unaligned(kernel) for kernel in kernels("fp32, odd widths", TILINGS["fp32"], even=False)]
    check([*todo, *small_kernels("fp32", "fp32")], capsys)
