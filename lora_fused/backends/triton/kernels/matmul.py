"""The matmul with extended K, both directions: y [M, N] = x w + mask ⊙ (s l) + bias.

    forward   y  = x Wᵀ + s Bᵀ + bias        x [M, K], w = Wᵀ [K, N], l = Bᵀ [R, N]
    dx        dx = dy W + mask ⊙ (ds A)      x is dy, w = W, l = A; N is in_features here

`split`: s [M, R] comes from `shrink_kernel`, and the contraction over K goes on for R steps.
`one_pass` (and `decode`, the same with 16-row tiles): each tile of x feeds w and a, so that
s = scale · x aᵀ is born in registers, meets l there and is stored once, by the first column of tiles.

A program makes one tile of y, or (PERSISTENT) every num_programs-th of them. x, w and y are reached
by pointers with any strides, or by tensor descriptors (TMA), which need a unit stride and 16-byte
rows. With dropout (`split` only) the rank-R term comes first, is masked and begins the sum.
Not handled: M, N or K of 0 or beyond 2**31 - 1; dropout in `one_pass`; R > BLOCK_R in `one_pass`.
"""

import triton
import triton.language as tl

from lora_fused.backends.triton.kernels.tiles import (
    contract,
    contract_and_shrink,
    expand_tile,
    finish,
    masked,
    rank_term,
    tile_at,
    tile_pointers,
)


@triton.jit
def matmul_kernel(
    x, w, a, s, l, bias, y, seed, threshold, scale,
    M, N, K, R,
    x_sm, x_sk, w_sn, w_sk, a_sr, a_sk, s_sm, l_sr, l_sn, y_sm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    W_BY_ROWS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """a is None for `split`; s is written then, not read. s and l are None for rank 0.

    RANK_STEPS = ceil(R / BLOCK_R), EVEN_K = (K % BLOCK_K == 0). bias and seed may be None.
    """
    if PERSISTENT:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            _tile(
                index, x, w, a, s, l, bias, y, seed, threshold, scale, M, N, K, R,
                x_sm, x_sk, w_sn, w_sk, a_sr, a_sk, s_sm, l_sr, l_sn, y_sm,
                BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, RANK_STEPS, GROUP_M,
                EVEN_K, ACCUMULATE, DESCRIPTORS, W_BY_ROWS, PRECISION,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), x, w, a, s, l, bias, y, seed, threshold, scale, M, N, K, R,
            x_sm, x_sk, w_sn, w_sk, a_sr, a_sk, s_sm, l_sr, l_sn, y_sm,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, RANK_STEPS, GROUP_M,
            EVEN_K, ACCUMULATE, DESCRIPTORS, W_BY_ROWS, PRECISION,
        )  # fmt: skip


@triton.jit
def _tile(
    index, x, w, a, s, l, bias, y, seed, threshold, scale, M, N, K, R,
    x_sm, x_sk, w_sn, w_sk, a_sr, a_sk, s_sm, l_sr, l_sn, y_sm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    W_BY_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_at(index, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m0, n0 = pid_m * BLOCK_M, pid_n * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if a is not None:
        total, small = contract_and_shrink(
            total, x, w, a, m0, n0, M, N, K, R, x_sm, x_sk, w_sn, w_sk, a_sr, a_sk,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, EVEN_K, DESCRIPTORS, W_BY_ROWS, PRECISION,
        )  # fmt: skip
        s_tile = (small * scale).to(s.dtype.element_ty)
        _store_s(s, s_tile, m0, n0, M, R, s_sm, BLOCK_M, BLOCK_R)
        l_tile = expand_tile(l, n0, 0, N, R, l_sr, l_sn, BLOCK_N, BLOCK_R)
        total = tl.dot(s_tile, l_tile.to(s_tile.dtype), total, input_precision=PRECISION)
    else:
        if seed is not None:
            total = rank_term(
                total, s, l, m0, n0, M, N, R, s_sm, l_sr, l_sn,
                BLOCK_M, BLOCK_N, BLOCK_R, RANK_STEPS, PRECISION,
            )  # fmt: skip
            total = masked(total, seed, threshold, m0, n0, N, BLOCK_M, BLOCK_N)
        total = contract(
            total, x, w, m0, n0, M, N, K, x_sm, x_sk, w_sn, w_sk,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS, W_BY_ROWS, PRECISION,
        )  # fmt: skip
        if seed is None and s is not None:
            total = rank_term(
                total, s, l, m0, n0, M, N, R, s_sm, l_sr, l_sn,
                BLOCK_M, BLOCK_N, BLOCK_R, RANK_STEPS, PRECISION,
            )  # fmt: skip
    finish(
        total, bias, y, m0, n0, M, N, y_sm, BLOCK_M, BLOCK_N, ACCUMULATE, DESCRIPTORS
    )  # fmt: skip


@triton.jit
def _store_s(s, s_tile, m0, n0, M, R, s_sm, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """Every column of tiles has s; the first one stores it."""
    m, r = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    inside = (m < M)[:, None] & (r < R)[None, :] & (n0 == 0)
    tl.store(tile_pointers(s, m0, 0, s_sm, 1, BLOCK_M, BLOCK_R), s_tile, mask=inside)
