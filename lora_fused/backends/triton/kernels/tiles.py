"""Parts of the matmul kernel: the order of tiles, the loop over the contraction, the rank-R term.

p is an arguments.Matmul, (m0, n0) the first element of the tile of y that is made.
"""

import triton
import triton.language as tl

from lora_fused.backends.triton.kernels.dropout import keep_tile


@triton.jit
def tile_at(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(m0, n0) of a tile; GROUP_M rows of tiles go together, so that L2 serves them."""
    rows, cols = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group, inside = index // (GROUP_M * cols), index % (GROUP_M * cols)
    height = min(rows - group * GROUP_M, GROUP_M)
    return (group * GROUP_M + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def tile_pointers(t, row, col, row_stride, col_stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Pointers to the tile of t that starts at (row, col): [ROWS, COLS], 64-bit offsets."""
    rows = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols = (col + tl.arange(0, COLS)).to(tl.int64)[None, :]
    return t + rows * row_stride + cols * col_stride


@triton.jit
def contract(
    total, p, m0, n0, M,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    W_BY_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """total + x · w in fp32 [BLOCK_M, BLOCK_N]."""
    x_tiles, w_tiles = operands(p, m0, n0, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS)
    for k0 in range(0, p.K, BLOCK_K):
        x_tile, w_tile = operand_tiles(
            x_tiles, w_tiles, p, m0, n0, k0, M,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS, W_BY_ROWS,
        )  # fmt: skip
        total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
    return total


@triton.jit
def contract_and_shrink(
    total, p, m0, n0, M,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    W_BY_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`contract`, and x · aᵀ in fp32 [BLOCK_M, BLOCK_R] from the same tiles of x."""
    tl.static_assert(BLOCK_R >= 16, "tensor cores need 16 columns")
    x_tiles, w_tiles = operands(p, m0, n0, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS)
    a_tiles = tile_pointers(p.a, 0, 0, p.a_sk, p.a_sr, BLOCK_K, BLOCK_R)
    k, r_inside = tl.arange(0, BLOCK_K), (tl.arange(0, BLOCK_R) < p.R)[None, :]
    small = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(0, p.K, BLOCK_K):
        x_tile, w_tile = operand_tiles(
            x_tiles, w_tiles, p, m0, n0, k0, M,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS, W_BY_ROWS,
        )  # fmt: skip
        a_inside = r_inside if EVEN_K else r_inside & (k0 + k < p.K)[:, None]
        a_at = a_tiles + k0 * tl.cast(p.a_sk, tl.int64)
        a_tile = tl.load(a_at, mask=a_inside, other=0.0)  # [BLOCK_K, BLOCK_R]
        total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
        small = tl.dot(x_tile, a_tile.to(x_tile.dtype), small, input_precision=PRECISION)
    return total, small


@triton.jit
def operands(
    p, m0, n0,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """What `operand_tiles` moves along: the descriptors, or pointers to the tiles at k = 0."""
    if DESCRIPTORS:
        return p.x, p.w
    else:
        x_tiles = tile_pointers(p.x, m0, 0, p.x_sm, p.x_sk, BLOCK_M, BLOCK_K)
        w_tiles = tile_pointers(p.w, 0, n0, p.w_sk, p.w_sn, BLOCK_K, BLOCK_N)
        return x_tiles, w_tiles


@triton.jit
def operand_tiles(
    x_tiles, w_tiles, p, m0, n0, k0, M,
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
        w_inside = (n0 + tl.arange(0, BLOCK_N) < p.N)[None, :]
        if not EVEN_K:
            x_inside = x_inside & (k < p.K)[None, :]
            w_inside = w_inside & (k < p.K)[:, None]
        x_tile = tl.load(x_tiles + k0 * tl.cast(p.x_sk, tl.int64), mask=x_inside, other=0.0)
        w_tile = tl.load(w_tiles + k0 * tl.cast(p.w_sk, tl.int64), mask=w_inside, other=0.0)
    return x_tile, w_tile


@triton.jit
def rank_term(
    total, p, m0, n0, M,
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
        s_tiles = tile_pointers(p.s, m0, step * BLOCK_R, p.s_sm, 1, BLOCK_M, BLOCK_R)
        s_tile = tl.load(s_tiles, mask=m_inside & (r < p.R)[None, :], other=0.0)
        l_tile = expand_tile(p, n0, step * BLOCK_R, BLOCK_N, BLOCK_R)
        total = tl.dot(s_tile, l_tile.to(s_tile.dtype), total, input_precision=PRECISION)
    return total


@triton.jit
def expand_tile(p, n0, r0, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """The tile of l at (r0, n0): [BLOCK_R, BLOCK_N], zero outside."""
    r_inside = (r0 + tl.arange(0, BLOCK_R) < p.R)[:, None]
    n_inside = (n0 + tl.arange(0, BLOCK_N) < p.N)[None, :]
    l_tiles = tile_pointers(p.l, r0, n0, p.l_sr, p.l_sn, BLOCK_R, BLOCK_N)
    return tl.load(l_tiles, mask=r_inside & n_inside, other=0.0)


@triton.jit
def store_s(p, s_tile, m0, n0, M, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """Every column of tiles has s; the first one stores it."""
    m, r = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    # NOTE: not `n0 == 0`: a bool that the interpreter splats is no mask for Triton 3.9.
    first = tl.full((BLOCK_M, BLOCK_R), n0, tl.int32) == 0
    inside = (m < M)[:, None] & (r < p.R)[None, :] & first
    tl.store(tile_pointers(p.s, m0, 0, p.s_sm, 1, BLOCK_M, BLOCK_R), s_tile, mask=inside)


@triton.jit
def masked(total, p, m0, n0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """mask ⊙ total, for a mask with rows of N."""
    rows = m0 + tl.arange(0, BLOCK_M)
    return tl.where(keep_tile(p.seed, p.threshold, rows, n0, p.N, BLOCK_M, BLOCK_N), total, 0.0)


@triton.jit
def finish(
    total, p, m0, n0, M,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """y (+)= total + bias: everything joins in fp32, before the one rounding."""
    n = n0 + tl.arange(0, BLOCK_N)
    if p.bias is not None:
        total += tl.load(p.bias + n, mask=n < p.N, other=0.0).to(tl.float32)[None, :]
    if DESCRIPTORS:
        if ACCUMULATE:
            total += p.y.load([m0, n0]).to(tl.float32)
        p.y.store([m0, n0], total.to(p.y.dtype))
    else:
        inside = (m0 + tl.arange(0, BLOCK_M) < M)[:, None] & (n < p.N)[None, :]
        y_tiles = tile_pointers(p.y, m0, n0, p.y_sm, 1, BLOCK_M, BLOCK_N)
        if ACCUMULATE:
            total += tl.load(y_tiles, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_tiles, total.to(p.y.dtype.element_ty), mask=inside)
