"""The shrink: s = scale · (mask ⊙ x) aᵀ, reading the big operand once.

    x [M, K] · a [R, K] -> s [M, R]        forward:  a = lora_A          (element r, k)
    dy [M, N] · b [N, R] -> ds [M, R]      backward: K is N, a = lora_Bᵀ

Block (i, j, p) makes rows i and rank columns j % R_BLOCKS of member j // R_BLOCKS from part p of
the contraction: blocks that share rows of x are neighbours. With one part s is scaled, rounded and
stored; with several, fp32 partial sums go to a workspace and `sum_kernel` adds them in the order
of the parts. Any strides; M, K and R need not divide. Not handled: sizes beyond 2**31 - 1.
"""

import triton
import triton.language as tl

from lora_fused.backends.triton.kernels.dropout import keep_tile


@triton.jit(do_not_specialize=["M"])
def shrink_kernel(
    members,
    M,
    R_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """members: arguments.Shrink each. EVEN_K: BLOCK_K divides every K."""
    column = tl.program_id(0) % (len(members) * R_BLOCKS)
    m0 = tl.program_id(0) // (len(members) * R_BLOCKS) * BLOCK_M
    for i in tl.static_range(len(members)):
        if column // R_BLOCKS == i:
            _shrink(
                members[i], M, m0, column % R_BLOCKS * BLOCK_R,
                BLOCK_M, BLOCK_K, BLOCK_R, EVEN_K, PARTIAL, PRECISION,
            )  # fmt: skip


@triton.jit
def _shrink(
    p, M, m0, r0,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    m, r, k = m0 + tl.arange(0, BLOCK_M), r0 + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    x_sm, x_sk = tl.cast(p.x_sm, tl.int64), tl.cast(p.x_sk, tl.int64)
    a_sr, a_sk = tl.cast(p.a_sr, tl.int64), tl.cast(p.a_sk, tl.int64)
    x_tiles = p.x + m[:, None] * x_sm + k[None, :] * x_sk
    a_tiles = p.a + r[None, :] * a_sr + k[:, None] * a_sk
    m_inside, r_inside = (m < M)[:, None], (r < p.R)[None, :]

    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(part * p.k_per_part, min(p.K, (part + 1) * p.k_per_part), BLOCK_K):
        if EVEN_K:
            x_inside, a_inside = m_inside, r_inside
        else:
            x_inside = m_inside & (k0 + k < p.K)[None, :]
            a_inside = r_inside & (k0 + k < p.K)[:, None]
        x_tile = tl.load(x_tiles + k0 * x_sk, mask=x_inside, other=0.0)  # [BLOCK_M, BLOCK_K]
        a_tile = tl.load(a_tiles + k0 * a_sk, mask=a_inside, other=0.0)  # [BLOCK_K, BLOCK_R]
        if p.seed is not None:
            keep = keep_tile(p.seed, p.threshold, m, k0, p.K, BLOCK_M, BLOCK_K)
            x_tile = tl.where(keep, x_tile, 0.0)
        total = tl.dot(x_tile, a_tile.to(x_tile.dtype), total, input_precision=PRECISION)

    at = m.to(tl.int64)[:, None] * p.s_sm + r[None, :]
    inside = m_inside & r_inside
    if PARTIAL:
        tl.store(p.s + part.to(tl.int64) * p.s_sp + at, total, mask=inside)
    else:
        tl.store(p.s + at, (total * p.scale).to(p.s.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["PARTS"])
def sum_kernel(members, PARTS, BLOCK: tl.constexpr):
    """out = scale · Σ_p partial_p in the order of p. members: arguments.Sum each.

    The members' blocks of BLOCK elements follow each other in the grid.
    """
    block = tl.program_id(0)
    for i in tl.static_range(len(members)):
        blocks = tl.cdiv(members[i].rows * members[i].cols, BLOCK)
        if (block >= 0) & (block < blocks):
            _sum(members[i], block, PARTS, BLOCK)
        block -= blocks


@triton.jit
def _sum(p, block, PARTS, BLOCK: tl.constexpr):
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tl.cast(p.rows, tl.int64) * p.cols
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        total += tl.load(p.partial + part * count + at, mask=at < count, other=0.0)
    out = p.out + at // p.cols * p.out_stride + at % p.cols
    tl.store(out, (total * p.scale).to(p.out.dtype.element_ty), mask=at < count)
