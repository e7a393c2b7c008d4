"""What every Triton kernel's tile needs: rounding and products that mean the same on a GPU and in the interpreter."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


@triton.jit
def rounded(x, kind: tl.constexpr):
    """x, fp32, in another dtype: to nearest, ties to even."""
    if INTERPRETED and kind == tl.bfloat16:
        # The interpreter cuts the lower bits off; so that it cuts at the right number, round in them first.
        bits = x.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(kind)


# Whether TRITON_INTERPRET was set when this module was imported: then the kernels take CPU tensors.
INTERPRETED = tl.constexpr(isinstance(rounded, InterpretedFunction))


@triton.jit
def add_product(acc_MN, a_MK, b_KN, PRECISION: tl.constexpr):
    """acc + a @ b, summed in fp32."""
    if INTERPRETED and a_MK.dtype == tl.bfloat16:
        # The interpreter holds bfloat16 as uint16 and would multiply the bits (triton-lang/triton issue 11584).
        a_MK, b_KN = a_MK.to(tl.float32), b_KN.to(tl.float32)
    return tl.dot(a_MK, b_KN, acc_MN, input_precision=PRECISION)
