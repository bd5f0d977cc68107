"""Operand tiles in shared memory against the CuTe layouts that the PTX ISA prints."""

import numpy as np
import pytest

from .layouts import IllegalOperand, Swizzle
from .smem_operand import SmemDescriptor, operand_addresses


def cute_offset(index: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """A CuTe mode: split a coordinate in mixed radix, first part fastest, times the strides."""
    offset = 0
    for size, step in zip(shape, stride, strict=True):
        index, digit = divmod(index, size)
        offset += digit * step
    return offset


def cute_swizzle(offset: int, bits: int, base: int, shift: int) -> int:
    """CuTe's Swizzle<bits, base, shift>: xor `bits` bits above base with those `shift` higher."""
    return offset ^ (offset >> shift & (1 << bits) - 1 << base)


# The examples under "Canonical Layouts": element bytes, major-ness, Swizzle<...>, the exact layout
# ((rows), (cols)) : ((strides), (strides)) in elements, and LBO and SBO in elements.
EXAMPLES = {
    "K-major no swizzle tf32": (
        *("tf32", False, Swizzle.NONE, (0, 4, 3)),
        *(((8, 2), (4, 4)), ((4, 32), (1, 64)), 64, 32),
    ),
    "K-major 32B tf32": (
        *("tf32", False, Swizzle.B32, (1, 4, 3)),
        *(((8, 2), (4, 4)), ((8, 64), (1, 4)), 0, 64),
    ),
    "MN-major no swizzle bf16": (
        *("bf16", True, Swizzle.NONE, (0, 4, 3)),
        *(((8, 1, 2), (8, 2)), ((1, 8, 64), (8, 128)), 128, 64),
    ),
    "MN-major 32B bf16": (
        *("bf16", True, Swizzle.B32, (1, 4, 3)),
        *(((8, 2, 2), (8, 2)), ((1, 8, 128), (16, 256)), 128, 256),
    ),
    "MN-major 64B bf16": (
        *("bf16", True, Swizzle.B64, (2, 4, 3)),
        *(((8, 4, 2), (8, 2)), ((1, 8, 256), (32, 512)), 256, 512),
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_isa_examples(name: str) -> None:
    dtype, mn_major, mode, cute, shape, stride, leading, step = EXAMPLES[name]
    size = 4 if dtype == "tf32" else 2
    rows, k = int(np.prod(shape[0])), 32 // size
    d = SmemDescriptor(4096, leading * size, step * size, 0, mode)
    address = operand_addresses(d, rows, k, dtype, mn_major)
    for row in range(rows):
        for col in range(k):
            element = cute_offset(row, shape[0], stride[0]) + cute_offset(col, shape[1], stride[1])
            assert address[row, col] == 4096 + cute_swizzle(element * size, *cute)


def test_k_major_128_byte_swizzle_by_hand() -> None:
    d = SmemDescriptor(0x400, 0, 1024, 0, Swizzle.B128)
    address = operand_addresses(d, 64, 16, "bf16", False)
    assert address[0, :9].tolist() == [0x400 + 2 * i for i in range(8)] + [0x410]
    assert address[1, 0] == 0x400 + 128 + 16
    assert address[1, 8] == 0x400 + 128
    assert address[7, 0] == 0x400 + 7 * 128 + 7 * 16
    assert address[9, 0] == 0x400 + 1024 + 128 + 16
    advanced = operand_addresses(d._replace(start_address=0x420), 64, 16, "bf16", False)
    assert advanced[0, 0] == 0x420
    assert advanced[1, 0] == 0x400 + 128 + 3 * 16
    assert advanced[2, 0] == 0x400 + 256


def test_mn_major_128_byte_swizzle_by_hand() -> None:
    """N = 128, a 64-deep K tile: atoms of 64 n by 8 k, 8192 bytes to the next 64 n."""
    d = SmemDescriptor(0, 8192, 1024, 0, Swizzle.B128)
    address = operand_addresses(d, 128, 16, "bf16", True)
    assert address[0, 0] == 0
    assert address[8, 0] == 16
    assert address[0, 1] == 128 + 16
    assert address[8, 1] == 128
    assert address[64, 0] == 8192
    assert address[0, 8] == 1024
    assert address[127, 15] == 8192 + 1024 + 7 * 128 + (7 ^ 7) * 16 + 14


def test_32_byte_atoms_hold_four_k() -> None:
    d = SmemDescriptor(0, 4096, 2048, 0, Swizzle.B128_ATOM32)
    address = operand_addresses(d, 64, 8, "tf32", True)
    assert address[0, :5].tolist() == [0, 128 + 32, 256 + 64, 384 + 96, 2048]
    assert address[32, 0] == 4096
    assert address[8, 1] == 128


@pytest.mark.parametrize("mn_major", [False, True])
@pytest.mark.parametrize("mode", [Swizzle.NONE, Swizzle.B32, Swizzle.B64, Swizzle.B128])
def test_packed_tiles_cover_memory_once(mode: Swizzle, mn_major: bool) -> None:
    """With dense strides, the k steps of a tile read every byte of it exactly once."""
    rows, span = 128, mode.span
    seen: list[np.ndarray] = []
    if mn_major:
        tile_k = 32
        per_row_atom = span * tile_k
        strides = (128, rows * 16) if mode == Swizzle.NONE else (per_row_atom, 8 * span)
        leading, stride = (strides[1], strides[0]) if mode == Swizzle.NONE else strides
        advance = 2 * (leading if mode == Swizzle.NONE else stride)
    else:
        tile_k = 32 if mode == Swizzle.NONE else span // 2
        leading, stride = rows * 16, 128 if mode == Swizzle.NONE else 8 * span
        advance = 2 * leading if mode == Swizzle.NONE else 32
    for step in range(tile_k // 16):
        d = SmemDescriptor(2048 + step * advance, leading, stride, 0, mode)
        seen.append(operand_addresses(d, rows, 16, "bf16", mn_major))
    touched = np.sort(np.concatenate(seen, axis=None))
    assert (touched == 2048 + 2 * np.arange(rows * tile_k)).all()


def test_refusals() -> None:
    with pytest.raises(IllegalOperand, match="base offset 3"):
        operand_addresses(SmemDescriptor(0, 0, 1024, 3, Swizzle.B128), 64, 16, "f16", False)
    with pytest.raises(IllegalOperand, match="K-major"):
        operand_addresses(SmemDescriptor(0, 0, 512, 0, Swizzle.B128_ATOM32), 64, 8, "tf32", False)
