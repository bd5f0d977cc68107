"""Matrix operands in shared memory: where each element of a tile lies, given a matrix descriptor.

Used by wgmma and by tcgen05, whose descriptors differ in bit layout but describe the same canonical
layouts (PTX ISA "Canonical Layouts" of wgmma.mma_async and of tcgen05).
"""

from typing import NamedTuple

import numpy as np

from .layouts import IllegalOperand, Swizzle, element_bytes, swizzle, table

CHUNK = 16  # bytes that no swizzle with a 16-byte atom takes apart


class SmemDescriptor(NamedTuple):
    """A decoded matrix descriptor; addresses and offsets in bytes."""

    start_address: int
    leading_bytes: int
    stride_bytes: int
    base_offset: int
    swizzle: Swizzle


def encode_bytes(value: int) -> int:
    """matrix-descriptor-encode(x) = (x & 0x3FFFF) >> 4."""
    if value % CHUNK:
        raise IllegalOperand(f"a matrix descriptor holds multiples of 16 bytes, got {value}")
    return (value & 0x3FFFF) >> 4


def decode_bytes(field: int) -> int:
    """Inverse of `encode_bytes`, for a descriptor shifted so that the field comes first."""
    return (field & 0x3FFF) << 4


@table
def _linear_offsets(
    mode: Swizzle, leading: int, stride: int, rows: int, k: int, size: int, mn_major: bool
) -> np.ndarray:
    """Byte offset of element (row, k) from the tile's start before swizzling, [rows, k].

    The canonical layouts in units of 16-byte chunks (T = 16 / size elements per chunk) are

        K-major,  no swizzle   ((8,m),(T,2)) : ((1T,SBO),(1,LBO))
        K-major,  swizzled     ((8,m),(T,2)) : ((wT,SBO),(1,T))            w = span / 16
        MN-major, no swizzle   ((T,1,m),(8,k)) : ((1,T,SBO),(1T,LBO))
        MN-major, swizzled     ((T,w,m),(8,k)) : ((1,T,LBO),(wT,SBO))
        MN-major, 32-byte atom ((T,8,m),(4,k)) : ((1,T,LBO),(8T,SBO))
    """
    row, column = np.meshgrid(np.arange(rows), np.arange(k), indexing="ij")
    if not mn_major:
        chunk, byte = np.divmod(column * size, CHUNK)
        next_chunk = leading if mode == Swizzle.NONE else CHUNK
        return row % 8 * mode.span + row // 8 * stride + chunk * next_chunk + byte
    next_row_group, next_k_group = leading, stride
    if mode == Swizzle.NONE:
        next_row_group, next_k_group = stride, leading
    atom_k = 4 if mode == Swizzle.B128_ATOM32 else 8
    atom, byte = np.divmod(row * size, mode.span)
    return (
        byte + atom * next_row_group + column % atom_k * mode.span + column // atom_k * next_k_group
    )


@table
def _placed_offsets(low_start: int, mode: Swizzle, *layout: int) -> np.ndarray:
    """Byte address of element (row, k) for a tile that starts at `low_start` < 1024."""
    return swizzle(low_start + _linear_offsets(mode, *layout), mode)


def operand_addresses(
    descriptor: SmemDescriptor, rows: int, k: int, dtype: str, mn_major: bool
) -> np.ndarray:
    """Shared-memory byte address of every element of an operand tile, int64 [rows, k].

    Rows are M for A and N for B. The swizzle acts on the final address, so a start address inside
    the atom (the usual advance along K) needs no base offset. A base offset moves the pattern off
    its natural boundary; nothing public says how hardware combines the two, so it is refused.
    """
    size = element_bytes(dtype)
    mode = descriptor.swizzle
    if descriptor.base_offset:
        raise IllegalOperand(f"matrix base offset {descriptor.base_offset} is not modelled")
    if mode == Swizzle.B128_ATOM32 and not mn_major:
        raise IllegalOperand("128-byte swizzle with 32-byte atoms has no K-major layout")
    low_start = descriptor.start_address % 1024
    layout = descriptor.leading_bytes, descriptor.stride_bytes, rows, k, size, bool(mn_major)
    return (descriptor.start_address - low_start) + _placed_offsets(low_start, mode, *layout)
