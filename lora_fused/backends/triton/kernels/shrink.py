"""The shrink: s = scale · (mask ⊙ x) aᵀ, reading the big operand once.

    x [M, K] · a [R, K] -> s [M, R]        forward:  a = lora_A          (element r, k)
    dy [M, N] · b [N, R] -> ds [M, R]      backward: K is N, a = lora_Bᵀ

Block (i, j, p) makes rows i and rank columns j of s from part p of the contraction. With one part
s is scaled, rounded and stored; with several, fp32 partial sums [parts, M, R] go to a workspace
and `sum_kernel` adds them in the order of the parts. Any strides; M, K, R need not divide.
"""

import triton
import triton.language as tl

from lora_fused.backends.triton.kernels.dropout import keep_tile


@triton.jit
def shrink_kernel(
    x, a, s, seed, threshold, scale,
    M, K, R, K_PER_PART,
    x_sm, x_sk, a_sr, a_sk, s_sm,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """seed is None without dropout. K_PER_PART is a multiple of BLOCK_K."""
    part = tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    x_sm, x_sk = tl.cast(x_sm, tl.int64), tl.cast(x_sk, tl.int64)
    a_sr, a_sk = tl.cast(a_sr, tl.int64), tl.cast(a_sk, tl.int64)
    x_tiles = x + m[:, None] * x_sm + k[None, :] * x_sk
    a_tiles = a + r[None, :] * a_sr + k[:, None] * a_sk
    m_inside, r_inside = (m < M)[:, None], (r < R)[None, :]

    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(part * K_PER_PART, min(K, (part + 1) * K_PER_PART), BLOCK_K):
        if EVEN_K:
            x_inside, a_inside = m_inside, r_inside
        else:
            x_inside = m_inside & (k0 + k < K)[None, :]
            a_inside = r_inside & (k0 + k < K)[:, None]
        x_tile = tl.load(x_tiles + k0 * x_sk, mask=x_inside, other=0.0)  # [BLOCK_M, BLOCK_K]
        a_tile = tl.load(a_tiles + k0 * a_sk, mask=a_inside, other=0.0)  # [BLOCK_K, BLOCK_R]
        if seed is not None:
            keep = keep_tile(seed, threshold, m, k0, K, BLOCK_M, BLOCK_K)
            x_tile = tl.where(keep, x_tile, 0.0)
        total = tl.dot(x_tile, a_tile.to(x_tile.dtype), total, input_precision=PRECISION)

    at = m.to(tl.int64)[:, None] * s_sm + r[None, :]
    inside = m_inside & r_inside
    if PARTIAL:
        tl.store(s + part.to(tl.int64) * M * R + at, total, mask=inside)
    else:
        tl.store(s + at, (total * scale).to(s.dtype.element_ty), mask=inside)


@triton.jit
def sum_kernel(
    first, first_out, second, second_out, scale,
    FIRST, SECOND, FIRST_BLOCKS,
    PARTS,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out = scale · Σ_p partial_p in the order of p, for one or two sets of fp32 partial sums.

    first [PARTS, FIRST] -> first_out [FIRST] by the first FIRST_BLOCKS blocks, the others likewise
    second; either may be None.
    """
    block = tl.program_id(0)
    if block < FIRST_BLOCKS:
        if first is not None:
            _sum(first, first_out, block, scale, FIRST, PARTS, BLOCK)
    else:
        if second is not None:
            _sum(second, second_out, block - FIRST_BLOCKS, scale, SECOND, PARTS, BLOCK)


@triton.jit
def _sum(partial, out, block, scale, COUNT, PARTS, BLOCK: tl.constexpr):
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < COUNT
    total = tl.zeros((BLOCK,), tl.float32)
    stride = tl.cast(COUNT, tl.int64)
    for part in range(PARTS):
        total += tl.load(partial + part * stride + at, mask=inside, other=0.0)
    tl.store(out + at, (total * scale).to(out.dtype.element_ty), mask=inside)
