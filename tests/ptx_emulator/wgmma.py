"""Warpgroup matrix multiply of sm_90a: wgmma.mma_async.

PTX ISA "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Operation". A warpgroup's registers
are uint32 bit patterns [..., 128 threads, registers]; leading axes are warpgroups side by side.
"""

import numpy as np

from .layouts import (
    Fragment,
    IllegalOperand,
    Swizzle,
    element_bytes,
    multiply_accumulate,
    table,
    to_float,
)
from .mma import fragment_rows_cols, gather_matrix, scatter_matrix
from .smem_operand import SmemDescriptor, decode_bytes, encode_bytes
from .smem_operand import operand_addresses as operand_addresses

M = 64
SWIZZLE_CODES = (Swizzle.NONE, Swizzle.B128, Swizzle.B64, Swizzle.B32)


def k_of(dtype: str) -> int:
    """K of one instruction: 32 bytes of elements."""
    return 32 // element_bytes(dtype)


def decode_descriptor(value: int) -> SmemDescriptor:
    """The matrix descriptor of wgmma, "Matrix Descriptor Format".

    Bits 0-13 start address, 16-29 leading and 32-45 stride dimension byte offset (all >> 4), 49-51
    base offset, 62-63 swizzle: 0 none, 1 128-byte, 2 64-byte, 3 32-byte. The other bits must be 0.
    """
    if value & ~0xC00E_3FFF_3FFF_3FFF:
        raise IllegalOperand(f"wgmma matrix descriptor {value:#018x} sets reserved bits")
    return SmemDescriptor(
        decode_bytes(value),
        decode_bytes(value >> 16),
        decode_bytes(value >> 32),
        value >> 49 & 7,
        SWIZZLE_CODES[value >> 62],
    )


def encode_descriptor(descriptor: SmemDescriptor) -> int:
    """Inverse of `decode_descriptor`."""
    if descriptor.swizzle not in SWIZZLE_CODES:
        raise IllegalOperand(f"wgmma has no {descriptor.swizzle.name} layout")
    return (
        encode_bytes(descriptor.start_address)
        | encode_bytes(descriptor.leading_bytes) << 16
        | encode_bytes(descriptor.stride_bytes) << 32
        | descriptor.base_offset << 49
        | SWIZZLE_CODES.index(descriptor.swizzle) << 62
    )


def _warpgroup(row: np.ndarray, col: np.ndarray) -> Fragment:
    """Four warps one below the other: warp w of the warpgroup holds rows 16 w to 16 w + 15."""
    warp = np.repeat(np.arange(4), 32).reshape(128, 1, 1)
    return Fragment(np.tile(row, (4, 1, 1)) + 16 * warp, np.tile(col, (4, 1, 1)))


@table
def accumulator_table(n: int, d_type: str) -> Fragment:
    """Row and column of D held by each thread, [128, registers, per].

    Thread t holds rows 16 (t / 32) + (t % 32) / 4 and that plus 8; its elements d0, d1, d2, d3 are
    columns 2 (t % 4), 2 (t % 4) + 1 of the first row and of the second, d4... repeat 8 columns on.
    """
    if n not in range(8, 257, 8):
        raise IllegalOperand(f"wgmma needs n in 8, 16, ..., 256, got {n}")
    row, col = fragment_rows_cols(16, n, 2)
    if d_type == "f32":
        return _warpgroup(row.reshape(32, n // 2, 1), col.reshape(32, n // 2, 1))
    if d_type == "f16":
        return _warpgroup(row, col)
    raise IllegalOperand(f"wgmma has no accumulator of type .{d_type}")


@table
def a_fragment_table(dtype: str) -> Fragment:
    """Row and k of A held by each thread when A is in registers, [128, 4, per]."""
    return _warpgroup(*fragment_rows_cols(16, k_of(dtype), 4 // element_bytes(dtype)))


def read_a_fragment(registers: np.ndarray, dtype: str) -> np.ndarray:
    """Element bits of A [..., 64, k] from its four registers per thread."""
    return gather_matrix(registers, a_fragment_table(dtype), (M, k_of(dtype)), dtype)


def check_operands(d_type: str, ab_type: str, a_mn_major: bool, b_mn_major: bool) -> None:
    """Refuse type and transpose combinations that wgmma.mma_async does not have."""
    if d_type == "f16" and ab_type != "f16":
        raise IllegalOperand(f"wgmma accumulates .{ab_type} products in .f32 only")
    if ab_type == "tf32" and (a_mn_major or b_mn_major):
        raise IllegalOperand("wgmma transposes f16 and bf16 operands only, tf32 must be K-major")


def _values(bits: np.ndarray, dtype: str, scale: int) -> np.ndarray:
    if scale not in (1, -1):
        raise IllegalOperand(f"imm-scale must be 1 or -1, got {scale}")
    return to_float(bits, dtype) if scale == 1 else -to_float(bits, dtype)


def wgmma(
    d_type: str,
    ab_type: str,
    a_bits: np.ndarray,
    b_bits: np.ndarray,
    d_registers: np.ndarray | None,
    scale_d: bool,
    scale_a: int = 1,
    scale_b: int = 1,
) -> np.ndarray:
    """D = A B + D (or A B when scale-d is false) for A [..., 64, k] and B as [..., n, k].

    imm-scale-a and imm-scale-b of -1 negate the elements of A and B. Returns D's registers.
    """
    check_operands(d_type, ab_type, False, False)
    n = b_bits.shape[-2]
    layout = accumulator_table(n, d_type)
    c = None
    if scale_d:
        c = to_float(gather_matrix(d_registers, layout, (M, n), d_type), d_type)
    a, b = _values(a_bits, ab_type, scale_a), _values(b_bits, ab_type, scale_b)
    d = multiply_accumulate(a, np.swapaxes(b, -1, -2), c, d_type)
    return scatter_matrix(d, layout, d_type)
