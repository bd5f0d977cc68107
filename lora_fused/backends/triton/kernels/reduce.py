"""The reductions over the tokens, both gradients of the adapters in one launch.

    da [R, K] = dsᵀ (mask ⊙ x)        db [N, R] = dyᵀ s

Both are zᵀ t with a wide z (x or dy, [M, C]) that is read once and a rank-R t (ds or s, [M, R]).
Block (i, j, p): the first A_BLOCKS of i are columns of x, the others columns of dy; j is a block of
ranks, p a part of the tokens. With several parts fp32 partial sums [parts, …] go to a workspace
and `shrink.sum_kernel` adds them in the order of the parts, so that the same input gives the same
bits. Any strides; nothing needs to divide. Either gradient may be left out.
"""

import triton
import triton.language as tl

from lora_fused.backends.triton.kernels.dropout import keep_tile


@triton.jit
def reduce_kernel(
    x, ds, da, seed, threshold,
    dy, s, db,
    M, K, N, R, A_BLOCKS, M_PER_PART,
    x_sm, x_sk, ds_sm, dy_sm, dy_sn, s_sm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_N counts columns of x or dy. da or db is None where it is not asked for.

    Both are dense: da by rows of K, db by rows of R, the parts one after the other.
    """
    block, part = tl.program_id(0), tl.program_id(2).to(tl.int64)
    if block < A_BLOCKS:
        if da is not None:
            total = _column_sums(
                x, ds, seed, threshold, block, M, K, R, M_PER_PART, x_sm, x_sk, ds_sm,
                BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
            )  # fmt: skip
            _store(da + part * K * R, total, block, K, R, 1, K, BLOCK_N, BLOCK_R)
    else:
        if db is not None:
            total = _column_sums(
                dy, s, None, 0, block - A_BLOCKS, M, N, R, M_PER_PART, dy_sm, dy_sn, s_sm,
                BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
            )  # fmt: skip
            _store(db + part * N * R, total, block - A_BLOCKS, N, R, R, 1, BLOCK_N, BLOCK_R)


@triton.jit
def _column_sums(
    z, t, seed, threshold, block, M, C, R, M_PER_PART, z_sm, z_sc, t_sm,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(mask ⊙ z)ᵀ t of this block's columns, ranks and tokens: fp32 [BLOCK_C, BLOCK_R]."""
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    z_sm, z_sc, t_sm = tl.cast(z_sm, tl.int64), tl.cast(z_sc, tl.int64), tl.cast(t_sm, tl.int64)
    first = tl.program_id(2) * M_PER_PART
    rows = tl.arange(0, BLOCK_M)
    z_tiles = z + rows[:, None] * z_sm + c[None, :] * z_sc
    t_tiles = t + rows[:, None] * t_sm + r[None, :]
    total = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for m0 in range(first, min(M, first + M_PER_PART), BLOCK_M):
        inside = (m0 + rows < M)[:, None]
        z_tile = tl.load(z_tiles + m0 * z_sm, mask=inside & (c < C)[None, :], other=0.0)
        t_tile = tl.load(t_tiles + m0 * t_sm, mask=inside & (r < R)[None, :], other=0.0)
        if seed is not None:
            keep = keep_tile(seed, threshold, m0 + rows, block * BLOCK_C, C, BLOCK_M, BLOCK_C)
            z_tile = tl.where(keep, z_tile, 0.0)
        total = tl.dot(tl.trans(z_tile), t_tile, total, input_precision=PRECISION)
    return total


@triton.jit
def _store(
    out, total, block, C, R, out_sc, out_sr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr
):
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = c[:, None] * out_sc + r[None, :].to(tl.int64) * out_sr
    inside = (c < C)[:, None] & (r < R)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
