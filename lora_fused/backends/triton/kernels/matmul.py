"""The matmul with extended K, both directions: y [M, N] = x w + mask ⊙ (s l) + bias.

    forward   y  = x Wᵀ + s Bᵀ + bias        x [M, K], w = Wᵀ [K, N], l = Bᵀ [R, N]
    dx        dx = dy W + mask ⊙ (ds A)      x is dy, w = W, l = A; N is in_features here

`split`: s [M, R] comes from `shrink_kernel`, and the contraction over K goes on for R steps.
`one_pass` (and `decode`, the same with 16-row tiles): each tile of x feeds w and a, so that
s = scale · x aᵀ is born in registers, meets l there and is stored once, by a row's first tile.

A launch serves one layer or a group. Forward, the members' tiles follow each other in the grid;
for dx (SUM) all members add to one y, whose tile stays in registers. A program makes one tile, or
(PERSISTENT) every num_programs-th. x, w and y are reached by pointers with any strides, or by
tensor descriptors (TMA), which need a unit stride and rows at multiples of 16 bytes. With dropout
(`split` only) the rank-R term is masked on its own, before the loop.
Not handled: sizes beyond 2**31 - 1; dropout in `one_pass`; R > BLOCK_R in `one_pass`.
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
    store_s,
    tile_at,
)


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    members,
    M,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    SUM: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    W_BY_ROWS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """members: arguments.Matmul each. A single member is a sum of one.

    RANK_STEPS = ceil(R / BLOCK_R) of the largest R; EVEN_K: BLOCK_K divides every K; ACCUMULATE: y
    is added to.
    """
    if PERSISTENT:
        tiles = 0
        for i in tl.static_range(1 if SUM else len(members)):
            tiles += tl.cdiv(M, BLOCK_M) * tl.cdiv(members[i].N, BLOCK_N)
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            _tile(
                index, members, M, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, RANK_STEPS, GROUP_M,
                EVEN_K, SUM, ACCUMULATE, DESCRIPTORS, W_BY_ROWS, PRECISION,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), members, M, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, RANK_STEPS, GROUP_M,
            EVEN_K, SUM, ACCUMULATE, DESCRIPTORS, W_BY_ROWS, PRECISION,
        )  # fmt: skip


@triton.jit
def _tile(
    index, members, M,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    SUM: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    W_BY_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    if SUM:
        m0, n0 = tile_at(index, M, members[0].N, BLOCK_M, BLOCK_N, GROUP_M)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.static_range(len(members)):
            total = _add(
                total, members[i], m0, n0, M, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, RANK_STEPS,
                EVEN_K, DESCRIPTORS, W_BY_ROWS, PRECISION,
            )  # fmt: skip
        finish(total, members[0], m0, n0, M, BLOCK_M, BLOCK_N, ACCUMULATE, DESCRIPTORS)
    else:
        for i in tl.static_range(len(members)):
            tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(members[i].N, BLOCK_N)
            if (index >= 0) & (index < tiles):
                m0, n0 = tile_at(index, M, members[i].N, BLOCK_M, BLOCK_N, GROUP_M)
                total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                total = _add(
                    total, members[i], m0, n0, M, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, RANK_STEPS,
                    EVEN_K, DESCRIPTORS, W_BY_ROWS, PRECISION,
                )  # fmt: skip
                finish(total, members[i], m0, n0, M, BLOCK_M, BLOCK_N, ACCUMULATE, DESCRIPTORS)
            index -= tiles


@triton.jit
def _add(
    total, p, m0, n0, M,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    W_BY_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """total + x w + mask ⊙ (s l) of one member."""
    if p.a is not None:
        total, small = contract_and_shrink(
            total, p, m0, n0, M,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, EVEN_K, DESCRIPTORS, W_BY_ROWS, PRECISION,
        )  # fmt: skip
        s_tile = (small * p.scale).to(p.s.dtype.element_ty)
        store_s(p, s_tile, m0, n0, M, BLOCK_M, BLOCK_R)
        l_tile = expand_tile(p, n0, 0, BLOCK_N, BLOCK_R)
        total = tl.dot(s_tile, l_tile.to(s_tile.dtype), total, input_precision=PRECISION)
    else:
        if p.seed is not None:
            term = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            term = rank_term(term, p, m0, n0, M, BLOCK_M, BLOCK_N, BLOCK_R, RANK_STEPS, PRECISION)
            total += masked(term, p, m0, n0, BLOCK_M, BLOCK_N)
        total = contract(
            total, p, m0, n0, M,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS, W_BY_ROWS, PRECISION,
        )  # fmt: skip
        if p.seed is None and p.s is not None:
            total = rank_term(total, p, m0, n0, M, BLOCK_M, BLOCK_N, BLOCK_R, RANK_STEPS, PRECISION)
    return total
