"""The reductions over the tokens, all gradients of the adapters in one launch.

    da [R, K] = dsᵀ (mask ⊙ x)        db [N, R] = dyᵀ s

Both are out = (mask ⊙ z)ᵀ t with a wide z (x or dy, [M, C]) that is read once and a rank-R t (ds
or s, [M, R]). Block (i, j, p): i counts the column blocks of all members in turn, j blocks of
ranks, p parts of the tokens. With several parts fp32 partial sums go to a workspace and
`shrink.sum_kernel` adds them in the order of the parts, so that the same input gives the same bits.
Any strides; nothing needs to divide. Not handled: sizes beyond 2**31 - 1.
"""

import triton
import triton.language as tl

from lora_fused.backends.triton.kernels.dropout import keep_tile


@triton.jit(do_not_specialize=["M", "M_PER_PART"])
def reduce_kernel(
    members,
    M,
    M_PER_PART,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """members: arguments.Reduce each. BLOCK_N counts columns of z."""
    block = tl.program_id(0)
    for i in tl.static_range(len(members)):
        blocks = tl.cdiv(members[i].C, BLOCK_N)
        if (block >= 0) & (block < blocks):
            _reduce(
                members[i], block * BLOCK_N, M, M_PER_PART, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION
            )
        block -= blocks


@triton.jit
def _reduce(
    p, c0, M, M_PER_PART,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out of the columns c0 …, this block's ranks and its part of the tokens."""
    c, r = c0 + tl.arange(0, BLOCK_C), tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows, part = tl.arange(0, BLOCK_M), tl.program_id(2)
    z_sm, t_sm = tl.cast(p.z_sm, tl.int64), tl.cast(p.t_sm, tl.int64)
    z_tiles = p.z + c[:, None] * tl.cast(p.z_sc, tl.int64) + rows[None, :] * z_sm
    t_tiles = p.t + rows[:, None] * t_sm + r[None, :]
    c_inside, r_inside = (c < p.C)[:, None], (r < p.R)[None, :]

    total = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for m0 in range(part * M_PER_PART, min(M, (part + 1) * M_PER_PART), BLOCK_M):
        m_inside = m0 + rows < M
        z_tile = tl.load(z_tiles + m0 * z_sm, mask=c_inside & m_inside[None, :], other=0.0)
        t_tile = tl.load(t_tiles + m0 * t_sm, mask=m_inside[:, None] & r_inside, other=0.0)
        if p.seed is not None:
            keep = keep_tile(p.seed, p.threshold, m0 + rows, c0, p.C, BLOCK_M, BLOCK_C)
            z_tile = tl.where(tl.trans(keep), z_tile, 0.0)
        # z is loaded transposed, [BLOCK_C, BLOCK_M]: the compiler pipelines no load that a
        # transposition follows.
        total = tl.dot(z_tile, t_tile, total, input_precision=PRECISION)

    at = c.to(tl.int64)[:, None] * p.out_sc + r.to(tl.int64)[None, :] * p.out_sr
    inside = c_inside & r_inside
    out = p.out + part.to(tl.int64) * p.out_sp + at
    tl.store(out, total.to(p.out.dtype.element_ty), mask=inside)
