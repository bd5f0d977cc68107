"""The host side of each kernel: grid, strides, workspace, launch on torch's current stream."""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_fused.backends.torch_ops import flatten
from lora_fused.backends.triton.candidates import rank_block, tiles_without_descriptors
from lora_fused.config import Mask, Route, Tiles

GROUP_M = 8
_SUM_BLOCK = 1024


class Reduction(NamedTuple):
    """One gradient zᵀ t of `launch_reduce`: z [M, C] wide, t [M, R], and the gradient's dtype."""

    z: Tensor
    t: Tensor
    dtype: torch.dtype


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def kernels() -> SimpleNamespace:
    """The kernels. They are compiled or interpreted as TRITON_INTERPRET says at the first call."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from lora_fused.backends.triton.kernels import matmul, reduce, shrink

    return SimpleNamespace(
        matmul=matmul.matmul_kernel,
        shrink=shrink.shrink_kernel,
        sum=shrink.sum_kernel,
        reduce=reduce.reduce_kernel,
        TensorDescriptor=TensorDescriptor,
    )


def launch_shrink(
    tiles: Tiles, x: Tensor, a: Tensor, scale: float, mask: Mask | None = None
) -> Tensor:
    """s [M, R] = scale · (mask ⊙ x) aᵀ from x [M, K] and a [R, K], any strides."""
    (M, K), R = x.shape, a.shape[0]
    s = x.new_empty(M, R)
    if s.numel() == 0:
        return s
    per_part, parts = _parts(K, tiles.block_k, tiles.splits)
    partial = x.new_empty(parts, M, R, dtype=torch.float32) if parts > 1 else None
    seed, threshold = _seed_and_threshold(mask, x.device)
    grid = (_cdiv(M, tiles.block_m), _cdiv(R, tiles.block_r), parts)
    with _on_device_of(x):
        kernels().shrink[grid](
            x, a, s if partial is None else partial, seed, threshold, scale,
            M, K, R, per_part, *x.stride(), *a.stride(), R,
            BLOCK_M=tiles.block_m, BLOCK_K=tiles.block_k, BLOCK_R=tiles.block_r,
            EVEN_K=K % tiles.block_k == 0, PARTIAL=parts > 1, PRECISION=_precision(x.dtype),
            **_options(tiles),
        )  # fmt: skip
        if partial is not None:
            _sum_parts([(partial, s)], scale)
    return s


def launch_reduce(
    tiles: Tiles, for_a: Reduction | None, mask: Mask | None, for_b: Reduction | None
) -> tuple[Tensor | None, Tensor | None]:
    """da [R, K] = dsᵀ (mask ⊙ x) for (x, ds) and db [N, R] = dyᵀ s for (dy, s), as far as given."""
    some = for_a or for_b
    assert some is not None
    M, R = some.t.shape
    device = some.z.device
    da = db = None
    if for_a is not None:
        da = torch.empty(R, for_a.z.shape[1], dtype=for_a.dtype, device=device)
    if for_b is not None:
        db = torch.empty(for_b.z.shape[1], R, dtype=for_b.dtype, device=device)
    per_part, parts = _parts(M, tiles.block_m, tiles.splits)
    outputs = [
        None if out is None or parts == 1 else out.new_empty(parts, *out.shape, dtype=torch.float32)
        for out in (da, db)
    ]
    x, ds, *x_strides = _operands(for_a)
    dy, s, *dy_strides = _operands(for_b)
    K = 0 if for_a is None else for_a.z.shape[1]
    N = 0 if for_b is None else for_b.z.shape[1]
    a_blocks, b_blocks = _cdiv(K, tiles.block_n), _cdiv(N, tiles.block_n)
    seed, threshold = _seed_and_threshold(mask, device)
    with _on_device_of(some.z):
        kernels().reduce[(a_blocks + b_blocks, _cdiv(R, tiles.block_r), parts)](
            x, ds, outputs[0] if parts > 1 else da, seed, threshold,
            dy, s, outputs[1] if parts > 1 else db,
            M, K, N, R, a_blocks, per_part, *x_strides, *dy_strides,
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_R=tiles.block_r,
            PRECISION=_precision(some.z.dtype), **_options(tiles),
        )  # fmt: skip
        if parts > 1:
            pairs = zip(outputs, (da, db), strict=True)
            _sum_parts([(p, out) for p, out in pairs if p is not None and out is not None], 1.0)
    return da, db


def launch_matmul(
    tiles: Tiles,
    x: Tensor | None,
    w: Tensor,
    a: Tensor | None,
    s: Tensor | None,
    l: Tensor | None,
    scale: float,
    bias: Tensor | None,
    mask: Mask | None,
    y: Tensor,
    accumulate: bool,
) -> None:
    """y [M, N] (+)= x [M, K] w [K, N] + mask ⊙ (s [M, R] l [R, N]) + bias [N].

    With a [R, K], s is written: s = scale · x aᵀ. Without x only the rank-R term is added. y has
    a unit stride along N, the other tensors any strides.
    """
    (M, N), K = y.shape, 0 if x is None else x.shape[1]
    if y.numel() == 0:
        return
    R = 0 if s is None else s.shape[1]
    if s is None or l is None or R == 0:
        s = l = a = None
    elif s.stride(1) != 1:
        s = s.contiguous()
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()
    x = y if x is None else x
    by_rows = not _fits_descriptor(w)
    w_for_tma = w.t() if by_rows else w
    if tiles.descriptors and not (K > 0 and all(map(_fits_descriptor, (x, w_for_tma, y)))):
        tiles = tiles_without_descriptors(tiles)
    block_r = tiles.block_r or rank_block(R)
    seed, threshold = _seed_and_threshold(mask, y.device)
    operands: tuple[Any, Any, Any] = (x, w, y)
    if tiles.descriptors:
        w_block = (tiles.block_n, tiles.block_k) if by_rows else (tiles.block_k, tiles.block_n)
        operands = (
            _descriptor(x, tiles.block_m, tiles.block_k),
            _descriptor(w_for_tma, *w_block),
            _descriptor(y, tiles.block_m, tiles.block_n),
        )
    grid = _cdiv(M, tiles.block_m) * _cdiv(N, tiles.block_n)
    if tiles.persistent:
        grid = min(grid, _multiprocessors(y.device))
    with _on_device_of(y):
        kernels().matmul[(grid,)](
            operands[0], operands[1], a, s, l, bias, operands[2], seed, threshold, scale,
            M, N, K, R, *x.stride(), *reversed(w.stride()),
            *((0, 0) if a is None else a.stride()),
            0 if s is None else s.stride(0), *((0, 0) if l is None else l.stride()), y.stride(0),
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, BLOCK_R=block_r,
            RANK_STEPS=_cdiv(R, block_r), GROUP_M=GROUP_M, EVEN_K=K % tiles.block_k == 0,
            ACCUMULATE=accumulate, DESCRIPTORS=tiles.descriptors, W_BY_ROWS=by_rows,
            PERSISTENT=tiles.persistent, PRECISION=_precision(y.dtype), **_options(tiles),
        )  # fmt: skip


def _sum_parts(pairs: list[tuple[Tensor, Tensor]], scale: float) -> None:
    """out = scale · Σ partial[p] for one or two (partial, out), in one launch."""
    (first, first_out), *others = pairs
    second, second_out = others[0] if others else (None, None)
    counts = [out.numel() for _, out in pairs] + [0] * (2 - len(pairs))
    blocks = [_cdiv(count, _SUM_BLOCK) for count in counts]
    kernels().sum[(sum(blocks),)](
        first, first_out, second, second_out, scale, *counts, blocks[0], first.shape[0],
        BLOCK=_SUM_BLOCK,
    )  # fmt: skip


def _parts(length: int, block: int, splits: int) -> tuple[int, int]:
    """Elements of one part, a multiple of block, and the parts that then cover the length."""
    steps = max(_cdiv(length, block), 1)
    per_part = _cdiv(steps, splits)
    return per_part * block, _cdiv(steps, per_part)


def _operands(reduction: Reduction | None) -> tuple[Any, ...]:
    """z, t, the strides of z and the row stride of t."""
    if reduction is None:
        return None, None, 0, 0, 0
    z, t = reduction.z, reduction.t
    if t.stride(1) != 1:
        t = t.contiguous()
    return z, t, *z.stride(), t.stride(0)


def _precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: TF32 only for fp32, and only where torch allows it."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def _seed_and_threshold(mask: Mask | None, device: torch.device) -> tuple[Tensor | None, int]:
    """The seed as an int64 tensor on the device, written there by a kernel: no copy, no wait."""
    if mask is None:
        return None, 0
    seed = mask.seed
    if not isinstance(seed, Tensor):
        signed = seed - (1 << 64) if seed >= 1 << 63 else seed
        seed = torch.full((), signed, dtype=torch.int64, device=device)
    return seed, mask.threshold


def _fits_descriptor(t: Tensor) -> bool:
    """Whether TMA reaches a matrix: unit stride along rows that begin at multiples of 16 bytes."""
    row = t.stride(0) * t.element_size()
    dense = t.stride(1) == 1 and t.stride(0) >= t.shape[1]
    return dense and t.data_ptr() % 16 == 0 and row % 16 == 0 and row < 1 << 40


def _descriptor(t: Tensor, rows: int, cols: int) -> Any:
    return kernels().TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, cols])


def _on_device_of(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, whose current stream Triton launches on."""
    if t.device.type == "cpu" or t.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _options(tiles: Tiles) -> dict[str, int]:
    return {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
