"""Products that Triton does not offer: four 8-bit integers at a time, and float32 times signs on 16-bit tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot_bytes(a, b, c, ARCH: tl.constexpr):
    """c + Σ over the four bytes of a·b: a unsigned (below 128 on ROCm), b signed, c int32; words as int32.

    ARCH names the instruction: "cuda", "hip", or "plain" for arithmetic that every target and the interpreter has.
    """
    if ARCH == "cuda":
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    elif ARCH == "hip":
        return tl.inline_asm_elementwise(
            "v_dot4_i32_i8 $0, $1, $2, $3", "=v,v,v,v", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        unsigned = a.to(tl.uint32, bitcast=True)
        for byte in tl.static_range(4):
            c += ((unsigned >> (8 * byte)) & 0xFF).to(tl.int32, bitcast=True) * ((b << (24 - 8 * byte)) >> 24)
        return c


@triton.jit
def dot_signs(x, signs, TERMS: tl.constexpr):
    """x · signs in float32, for entries 0 and ±1 of a 16-bit dtype.

    x is float32 and is split into TERMS numbers of that dtype: x rounded, then the remainder rounded, and so on:
    with bfloat16, 2 terms keep 16 bits of x and 3 all 24, over its whole range. TERMS = 0 is one product in float32, of
    any entries. x is on the left because Triton spreads the left side over the warps and repeats the right one in each.
    """
    if TERMS == 0:
        total = tl.dot(x, signs, input_precision="ieee")
    else:
        rest = x
        term = rest.to(signs.dtype)
        total = tl.dot(term, signs)
        for _ in tl.static_range(TERMS - 1):
            rest -= term.to(tl.float32)
            term = rest.to(signs.dtype)
            total = tl.dot(term, signs, total)
    return total
