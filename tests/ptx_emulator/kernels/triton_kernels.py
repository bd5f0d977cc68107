"""Triton kernels whose compiled PTX the tests run: matrix products, reductions, random numbers."""

import triton
import triton.language as tl


@triton.jit
def lora_kernel(
    x,
    w,
    a,
    b,
    y,
    M,
    N,
    K,
    scaling,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    R: tl.constexpr,
):
    """y = x wᵀ + scaling (x aᵀ) bᵀ; x [M, K], w [N, K], a [R, K], b [N, R]."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, R)
    sum_w = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_a = tl.zeros((BLOCK_M, R), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < K
        x_tile = tl.load(
            x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & inside[None, :], other=0.0
        )
        w_tile = tl.load(
            w + n[None, :] * K + k[:, None], mask=(n < N)[None, :] & inside[:, None], other=0.0
        )
        a_tile = tl.load(a + r[None, :] * K + k[:, None], mask=inside[:, None], other=0.0)
        sum_w = tl.dot(x_tile, w_tile, sum_w)
        sum_a = tl.dot(x_tile, a_tile, sum_a)
    b_tile = tl.load(b + n[None, :] * R + r[:, None], mask=(n < N)[None, :], other=0.0)
    total = tl.dot((sum_a * scaling).to(x.dtype.element_ty), b_tile, sum_w)
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y + m[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def descriptor_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = x wᵀ through tensor descriptors that the kernel makes itself."""
    x = tl.make_tensor_descriptor(x_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    w = tl.make_tensor_descriptor(w_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    y = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        total = tl.dot(x.load([m, k]), w.load([n, k]).T, total)
    y.store([m, n], total.to(tl.bfloat16))


@triton.jit
def specialised_kernel(
    x,
    w,
    a,
    b,
    y,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LORA: tl.constexpr,
):
    """y = x wᵀ (+ (x aᵀ) bᵀ) with host descriptors; producer and consumer warps apart."""
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    small = tl.zeros((BLOCK_M, 16), tl.float32)
    for k in tl.range(0, K, BLOCK_K, warp_specialize=True):
        x_tile = x.load([m, k])
        total = tl.dot(x_tile, w.load([n, k]).T, total)
        if LORA:
            small = tl.dot(x_tile, a.load([0, k]).T, small)
    if LORA:
        total = tl.dot(small.to(tl.bfloat16), b.load([n, 0]).T, total)
    y.store([m, n], total.to(tl.bfloat16))


@triton.jit
def gradient_kernel(
    x, ds, out, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, R: tl.constexpr
):
    """out += xᵀ ds with fp32 atomics; x [M, K], ds [M, R], out [K, R]."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, R)
    total = tl.zeros((BLOCK_K, R), tl.float32)
    for start in range(tl.program_id(1) * BLOCK_M, M, BLOCK_M * tl.num_programs(1)):
        m = start + tl.arange(0, BLOCK_M)
        inside = (m < M)[:, None]
        x_tile = tl.load(x + m[:, None] * K + k[None, :], mask=inside & (k < K)[None, :], other=0.0)
        ds_tile = tl.load(ds + m[:, None] * R + r[None, :], mask=inside, other=0.0)
        total = tl.dot(tl.trans(x_tile), ds_tile, total)
    tl.atomic_add(out + k[:, None] * R + r[None, :], total, mask=(k < K)[:, None])


@triton.jit
def softmax_kernel(x, y, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < N
    value = tl.load(x + row * N + column, mask=inside, other=-float("inf")).to(tl.float32)
    value = tl.exp(value - tl.max(value, 0))
    tl.store(y + row * N + column, value / tl.sum(value, 0), mask=inside)


@triton.jit
def dropout_kernel(x, y, seed, n, p, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n)
    keep = tl.rand(seed, at) > p
    tl.store(y + at, tl.where(keep, value / (1 - p), 0.0), mask=at < n)
