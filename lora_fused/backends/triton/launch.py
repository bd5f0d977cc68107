"""The host side of each kernel: grid, strides, workspace, launch on torch's current stream."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lora_fused.backends.triton import arguments
from lora_fused.backends.triton.candidates import rank_block, tiles_without_descriptors
from lora_fused.config import Mask, Tiles
from lora_fused.devices import tf32_is_allowed

GROUP_M = 8
_SUM_BLOCK = 1024


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


def shrink(
    tiles: Tiles, members: Sequence[tuple[Tensor, Tensor, Tensor, float, Mask | None]]
) -> None:
    """s = scale · (mask ⊙ x) aᵀ for each (x [M, K], a [R, K], s [M, R], scale, mask).

    One launch for all, and one to add where the contraction is split. s is written; it has unit
    stride along R.
    """
    M = members[0][0].shape[0]
    if M == 0:
        return
    splits = _splits(tiles, max(s.numel() for _, _, s, _, _ in members))
    parts = max(_parts(x.shape[1], tiles.block_k, splits)[1] for x, *_ in members)
    packed, sums = [], []
    for x, a, s, scale, mask in members:
        (R, K), out = a.shape, s
        per_part = _parts(K, tiles.block_k, parts)[0]
        if parts > 1:
            out = x.new_empty(parts, M, R, dtype=torch.float32)
            sums.append(arguments.Sum(out, s, scale, M, R, s.stride(0)))
        p = arguments.Shrink._make((
            x, a, out, *_seed_and_threshold(mask, x.device), scale, K, R, per_part,
            *x.stride(), *a.stride(), out.stride(-2), M * R,
        ))  # fmt: skip
        packed.append(p)
    r_blocks = max(_cdiv(p.R, tiles.block_r) for p in packed)
    grid = (_cdiv(M, tiles.block_m) * len(packed) * r_blocks, parts)
    with _on_device_of(members[0][0]):
        kernels().shrink[grid](
            tuple(packed), M,
            R_BLOCKS=r_blocks, BLOCK_M=tiles.block_m, BLOCK_K=tiles.block_k, BLOCK_R=tiles.block_r,
            EVEN_K=all(p.K % tiles.block_k == 0 for p in packed), PARTIAL=parts > 1,
            PRECISION=_precision(members[0][0].dtype), **_options(tiles),
        )  # fmt: skip
        _add_parts(sums, parts)


def reduce(
    tiles: Tiles, members: Sequence[tuple[Tensor, Tensor, Mask | None, bool, torch.dtype]]
) -> list[Tensor]:
    """(mask ⊙ z)ᵀ t for each (z [M, C], t [M, R], mask, transposed, dtype), in one launch.

    The result is [C, R], or [R, C] where transposed. Where the tokens are split, a second launch
    adds.
    """
    (M, _), device = members[0][0].shape, members[0][0].device
    splits = _splits(tiles, max(z.shape[1] * t.shape[1] for z, t, *_ in members))
    per_part, parts = _parts(M, tiles.block_m, splits)
    outputs, packed, sums = [], [], []
    for z, t, mask, transposed, dtype in members:
        t = t if t.stride(1) == 1 else t.contiguous()
        C, R = z.shape[1], t.shape[1]
        shape = (R, C) if transposed else (C, R)
        out = torch.empty(shape, dtype=dtype, device=device)
        outputs.append(out)
        if parts > 1:
            partial = out.new_empty(parts, *shape, dtype=torch.float32)
            sums.append(arguments.Sum(partial, out, 1.0, *shape, out.stride(0)))
            out = partial
        out_sc, out_sr = (1, C) if transposed else (R, 1)
        p = arguments.Reduce._make((
            z, t, out, *_seed_and_threshold(mask, device), C, R,
            *z.stride(), t.stride(0), out_sc, out_sr, C * R,
        ))  # fmt: skip
        packed.append(p)
    columns = sum(_cdiv(p.C, tiles.block_n) for p in packed)
    grid = (columns, max(_cdiv(p.R, tiles.block_r) for p in packed), parts)
    with _on_device_of(members[0][0]):
        kernels().reduce[grid](
            tuple(packed), M, per_part,
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_R=tiles.block_r,
            PRECISION=_precision(members[0][0].dtype), **_options(tiles),
        )  # fmt: skip
        _add_parts(sums, parts)
    return outputs


def library_reduce(
    z: Tensor, t: Tensor, mask: Mask | None, transposed: bool, dtype: torch.dtype
) -> Tensor:
    """One member of `reduce` by torch; mask is None."""
    return (torch.mm(t.t(), z) if transposed else torch.mm(z.t(), t)).to(dtype)


def _add_parts(sums: list[arguments.Sum], parts: int) -> None:
    """Add the partial sums of all members in one launch, if there are any."""
    if sums:
        blocks = sum(_cdiv(p.rows * p.cols, _SUM_BLOCK) for p in sums)
        kernels().sum[(blocks,)](tuple(sums), parts, BLOCK=_SUM_BLOCK)


def matmul_member(
    x: Tensor | None,
    w: Tensor,
    y: Tensor,
    s: Tensor | None = None,
    l: Tensor | None = None,
    a: Tensor | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    mask: Mask | None = None,
) -> arguments.Matmul:
    """The arguments of one member for `matmul`; see arguments.Matmul. Any strides.

    Without x only the rank-R term is left. s [M, R] is read, or written where a is given.
    """
    K, R = 0 if x is None else x.shape[1], 0 if s is None else s.shape[1]
    if s is None or l is None or R == 0:
        s = l = a = mask = None
    elif s.stride(1) != 1:
        s = s.contiguous()
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()
    x = y if x is None else x
    return arguments.Matmul._make((
        x, w, a, s, l, bias, y, *_seed_and_threshold(mask, y.device), scale, y.shape[1], K, R,
        *x.stride(), *w.stride(), *((0, 0) if a is None else a.stride()),
        0 if s is None else s.stride(0), *((0, 0) if l is None else l.stride()), y.stride(0),
    ))  # fmt: skip


def matmul(
    tiles: Tiles, members: Sequence[arguments.Matmul], summed: bool, accumulate: bool = False
) -> None:
    """y (+)= x w + mask ⊙ (s l) + bias for every member; summed: all add to the y of the first."""
    M, device = members[0].y.shape[0], members[0].y.device
    if M == 0:
        return
    by_rows = not _fits_descriptor(members[0].w)
    if tiles.descriptors and not all(_fits_descriptors(p, by_rows) for p in members):
        tiles = tiles_without_descriptors(tiles)
    dtype, largest = members[0].y.dtype, max(p.R for p in members)
    block_r = tiles.block_r or rank_block(largest)
    even = all(p.K % tiles.block_k == 0 for p in members)
    makers = members[:1] if summed else members
    grid = sum(_cdiv(M, tiles.block_m) * _cdiv(p.N, tiles.block_n) for p in makers)
    if tiles.persistent:
        grid = min(grid, _multiprocessors(device))
    if tiles.descriptors:
        members = [_with_descriptors(p, tiles, by_rows) for p in members]
    with _on_device_of(makers[0].y):
        kernels().matmul[(grid,)](
            tuple(members), M,
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, BLOCK_R=block_r,
            RANK_STEPS=_cdiv(largest, block_r), GROUP_M=GROUP_M, EVEN_K=even, SUM=summed,
            ACCUMULATE=accumulate, DESCRIPTORS=tiles.descriptors, W_BY_ROWS=by_rows,
            PERSISTENT=tiles.persistent, PRECISION=_precision(dtype), **_options(tiles),
        )  # fmt: skip


def _fits_descriptors(p: arguments.Matmul, by_rows: bool) -> bool:
    w = p.w.t() if by_rows else p.w
    return p.K > 0 and all(map(_fits_descriptor, (p.x, w, p.y)))


def _fits_descriptor(t: Tensor) -> bool:
    """Whether TMA reaches a matrix: unit stride along rows that begin at multiples of 16 bytes."""
    row = t.stride(0) * t.element_size()
    dense = t.stride(1) == 1 and t.stride(0) >= t.shape[1]
    return dense and t.data_ptr() % 16 == 0 and row % 16 == 0 and row < 1 << 40


def _with_descriptors(p: arguments.Matmul, tiles: Tiles, by_rows: bool) -> arguments.Matmul:
    w = p.w.t() if by_rows else p.w
    w_block = (tiles.block_n, tiles.block_k) if by_rows else (tiles.block_k, tiles.block_n)
    return p._replace(
        x=_descriptor(p.x, tiles.block_m, tiles.block_k),
        w=_descriptor(w, *w_block),
        y=_descriptor(p.y, tiles.block_m, tiles.block_n),
    )


def _descriptor(t: Tensor, rows: int, cols: int) -> Any:
    return kernels().TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, cols])


def _splits(tiles: Tiles, outputs: int) -> int:
    """The parts of the contraction; `sum_kernel` counts outputs in 32 bits."""
    return tiles.splits if outputs <= 1 << 30 else 1


def _parts(length: int, block: int, splits: int) -> tuple[int, int]:
    """Elements of one part, a multiple of block, and the parts that then cover the length."""
    steps = max(_cdiv(length, block), 1)
    per_part = _cdiv(steps, splits)
    return per_part * block, _cdiv(steps, per_part)


def _precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: TF32 only for fp32, and only where torch allows it."""
    allowed = dtype == torch.float32 and tf32_is_allowed()
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
