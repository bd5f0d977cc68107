"""Parts of the matmul kernels: the order of tiles, the loop over the contraction, the rank-R term.

Written for y [M, N] = x [M, K] · w [K, N] + mask ⊙ (s [M, R] · l [R, N]), which is both directions:
forward, w = weightᵀ and l = lora_Bᵀ; for dx, x is dy, w is the weight as it is, l is lora_A, and N
and K change places. Only strides tell them apart.
"""

import triton
import triton.language as tl

from lora_fused.backends.triton.kernels.dropout import keep_tile


@triton.jit
def tile_at(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of a tile; GROUP_M rows of tiles go together, so that L2 serves them."""
    rows, cols = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group, inside = index // (GROUP_M * cols), index % (GROUP_M * cols)
    height = min(rows - group * GROUP_M, GROUP_M)
    return group * GROUP_M + inside % height, inside // height


@triton.jit
def contract(
    total, x, w, m0, n0,
    M, N, K, x_sm, x_sk, w_sn, w_sk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    W_BY_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """total + x[m0 …] · w[n0 …], fp32 [BLOCK_M, BLOCK_N]."""
    x_tiles, w_tiles = x, w
    if not DESCRIPTORS:
        x_tiles = tile_pointers(x, m0, 0, x_sm, x_sk, BLOCK_M, BLOCK_K)
        w_tiles = tile_pointers(w, 0, n0, w_sk, w_sn, BLOCK_K, BLOCK_N)
    for k0 in range(0, K, BLOCK_K):
        x_tile, w_tile = operand_tiles(
            x_tiles, w_tiles, m0, n0, k0, M, N, K, x_sk, w_sk,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS, W_BY_ROWS,
        )  # fmt: skip
        total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
    return total


@triton.jit
def contract_and_shrink(
    total, x, w, a, m0, n0,
    M, N, K, R, x_sm, x_sk, w_sn, w_sk, a_sr, a_sk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    W_BY_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`contract`, and x · aᵀ [BLOCK_M, BLOCK_R] in fp32 from the same tiles of x."""
    tl.static_assert(BLOCK_R >= 16, "tensor cores need 16 columns")
    x_tiles, w_tiles = x, w
    if not DESCRIPTORS:
        x_tiles = tile_pointers(x, m0, 0, x_sm, x_sk, BLOCK_M, BLOCK_K)
        w_tiles = tile_pointers(w, 0, n0, w_sk, w_sn, BLOCK_K, BLOCK_N)
    a_tiles = tile_pointers(a, 0, 0, a_sk, a_sr, BLOCK_K, BLOCK_R)
    k, r_inside = tl.arange(0, BLOCK_K), (tl.arange(0, BLOCK_R) < R)[None, :]
    a_sk = tl.cast(a_sk, tl.int64)
    small = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x_tile, w_tile = operand_tiles(
            x_tiles, w_tiles, m0, n0, k0, M, N, K, x_sk, w_sk,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS, W_BY_ROWS,
        )  # fmt: skip
        a_inside = r_inside if EVEN_K else r_inside & (k0 + k < K)[:, None]
        a_tile = tl.load(a_tiles + k0 * a_sk, mask=a_inside, other=0.0)  # [BLOCK_K, BLOCK_R]
        total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
        small = tl.dot(x_tile, a_tile.to(x_tile.dtype), small, input_precision=PRECISION)
    return total, small


@triton.jit
def tile_pointers(
    t, row, col, row_stride, col_stride, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Pointers to the tile of t that starts at (row, col): [ROWS, COLS], 64-bit offsets."""
    rows = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols = (col + tl.arange(0, COLS)).to(tl.int64)[None, :]
    return t + rows * row_stride + cols * col_stride


@triton.jit
def operand_tiles(
    x_tiles, w_tiles, m0, n0, k0,
    M, N, K, x_sk, w_sk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    W_BY_ROWS: tl.constexpr,
):  # fmt: skip
    """x [BLOCK_M, BLOCK_K] and w [BLOCK_K, BLOCK_N] at k0, zero outside.

    W_BY_ROWS: the descriptor's tiles of w are [BLOCK_N, BLOCK_K].
    """
    if DESCRIPTORS:
        x_tile = x_tiles.load([m0, k0])
        w_tile = w_tiles.load([n0, k0]).T if W_BY_ROWS else w_tiles.load([k0, n0])
    else:
        k = k0 + tl.arange(0, BLOCK_K)
        x_inside = (m0 + tl.arange(0, BLOCK_M) < M)[:, None]
        w_inside = (n0 + tl.arange(0, BLOCK_N) < N)[None, :]
        if not EVEN_K:
            x_inside = x_inside & (k < K)[None, :]
            w_inside = w_inside & (k < K)[:, None]
        x_tile = tl.load(x_tiles + k0 * tl.cast(x_sk, tl.int64), mask=x_inside, other=0.0)
        w_tile = tl.load(w_tiles + k0 * tl.cast(w_sk, tl.int64), mask=w_inside, other=0.0)
    return x_tile, w_tile


@triton.jit
def rank_term(
    total, s, l, m0, n0,
    M, N, R, s_sm, l_sr, l_sn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """total + s · l: the contraction goes on for RANK_STEPS steps of BLOCK_R."""
    m_inside = (m0 + tl.arange(0, BLOCK_M) < M)[:, None]
    for step in tl.static_range(RANK_STEPS):
        r = step * BLOCK_R + tl.arange(0, BLOCK_R)
        s_tiles = tile_pointers(s, m0, step * BLOCK_R, s_sm, 1, BLOCK_M, BLOCK_R)
        s_tile = tl.load(s_tiles, mask=m_inside & (r < R)[None, :], other=0.0)
        l_tile = expand_tile(l, n0, step * BLOCK_R, N, R, l_sr, l_sn, BLOCK_N, BLOCK_R)
        total = tl.dot(s_tile, l_tile.to(s_tile.dtype), total, input_precision=PRECISION)
    return total


@triton.jit
def expand_tile(l, n0, r0, N, R, l_sr, l_sn, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """The tile of l at (r0, n0): [BLOCK_R, BLOCK_N], zero outside."""
    r_inside = (r0 + tl.arange(0, BLOCK_R) < R)[:, None]
    n_inside = (n0 + tl.arange(0, BLOCK_N) < N)[None, :]
    l_tiles = tile_pointers(l, r0, n0, l_sr, l_sn, BLOCK_R, BLOCK_N)
    return tl.load(l_tiles, mask=r_inside & n_inside, other=0.0)


@triton.jit
def masked(
    total, seed, threshold, m0, n0, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """mask ⊙ total for the tile at (m0, n0) of a mask with rows of N."""
    keep = keep_tile(seed, threshold, m0 + tl.arange(0, BLOCK_M), n0, N, BLOCK_M, BLOCK_N)
    return tl.where(keep, total, 0.0)


@triton.jit
def finish(
    total, bias, y, m0, n0,
    M, N, y_sm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """y (+)= total + bias: everything joins in fp32, before the one rounding."""
    n = n0 + tl.arange(0, BLOCK_N)
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if DESCRIPTORS:
        if ACCUMULATE:
            total += y.load([m0, n0]).to(tl.float32)
        y.store([m0, n0], total.to(y.dtype))
    else:
        inside = (m0 + tl.arange(0, BLOCK_M) < M)[:, None] & (n < N)[None, :]
        y_tiles = tile_pointers(y, m0, n0, y_sm, 1, BLOCK_M, BLOCK_N)
        if ACCUMULATE:
            total += tl.load(y_tiles, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_tiles, total.to(y.dtype.element_ty), mask=inside)
