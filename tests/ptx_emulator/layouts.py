"""What every matrix path shares: element formats, swizzles, fragments and the multiply.

All functions map numpy arrays or integers to numpy arrays and know nothing of the executor. Index
tables are computed once per shape and returned read-only.
"""

from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache, wraps
from typing import NamedTuple, TypeVar, cast

import numpy as np

F16_NAN = 0x7FFF
F32_NAN = 0x7FFFFFFF
TF32_MASK = 0xFFFFE000

Table = TypeVar("Table")


class IllegalOperand(ValueError):
    """An operand the hardware does not accept or whose effect the ISA leaves undefined."""


class Fragment(NamedTuple):
    """Which matrix element each (lane, register, element of the register) holds."""

    row: np.ndarray
    col: np.ndarray


def table(make: Callable[..., Table]) -> Callable[..., Table]:
    """Cache an index table (an array or a tuple of arrays) and make it read-only."""

    @lru_cache(maxsize=512)
    @wraps(make)
    def cached(*key: object, **named_key: object) -> Table:
        made = make(*key, **named_key)
        for array in made if isinstance(made, tuple) else (made,):
            array.setflags(write=False)
        return made

    return cast(Callable[..., Table], cached)


# Element formats


def element_bytes(dtype: str) -> int:
    """Bytes of one element as it lies in memory (a tf32 element occupies 32 bits)."""
    try:
        return {"f16": 2, "bf16": 2, "tf32": 4, "f32": 4}[dtype]
    except KeyError:
        raise IllegalOperand(f"no matrix path for elements of type .{dtype}") from None


def to_float(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The values (float32) of bit patterns: uint16 for f16 and bf16, uint32 for f32 and tf32.

    A tf32 operand is a 32-bit word whose lower 13 bits the tensor core drops before it multiplies
    (PTX ISA, wgmma.mma_async, "Precision and rounding").
    """
    if dtype == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "f16":
        return bits.view(np.float16).astype(np.float32)
    if dtype == "tf32":
        return (bits & np.uint32(TF32_MASK)).view(np.float32)
    if dtype == "f32":
        return bits.view(np.float32)
    raise IllegalOperand(f"no matrix path for elements of type .{dtype}")


def from_float(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round to nearest even; a NaN becomes the canonical NaN of PTX (0x7fff, 0x7fffffff)."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "f16":
            bits = values.astype(np.float16).view(np.uint16)
            return np.where(np.isnan(values), np.uint16(F16_NAN), bits)
        word = values.astype(np.float32).view(np.uint32)
    if dtype == "f32":
        return np.where(np.isnan(values), np.uint32(F32_NAN), word)
    if dtype == "bf16":
        carry = np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))
        rounded = ((word + carry) >> np.uint32(16)).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(F16_NAN), rounded)
    raise IllegalOperand(f"no matrix path produces elements of type .{dtype}")


def split_registers(registers: np.ndarray, dtype: str) -> np.ndarray:
    """32-bit registers [..., R] to element bits [..., R, per]: element 0 is in the low half."""
    if element_bytes(dtype) == 4:
        return registers[..., None]
    words = np.ascontiguousarray(registers, dtype="<u4")
    return words.view("<u2").reshape(*words.shape, 2)


def join_registers(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Element bits [..., R, per] to 32-bit registers [..., R]."""
    if element_bytes(dtype) == 4:
        return bits[..., 0]
    return np.ascontiguousarray(bits, dtype="<u2").view("<u4")[..., 0]


def unpack(registers: np.ndarray, dtype: str) -> np.ndarray:
    """32-bit registers [..., R] to values [..., R, per]."""
    return to_float(split_registers(registers, dtype), dtype)


def pack(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values [..., R, per] to 32-bit registers [..., R]."""
    return join_registers(from_float(values, dtype), dtype)


# Swizzles


class Swizzle(IntEnum):
    """Shared-memory swizzling modes, PTX ISA "Swizzling Modes".

    The mode B<n> permutes the 16-byte chunks inside every n-byte span; B128_ATOM32 permutes 32-byte
    chunks inside 128 bytes.
    """

    NONE = 0
    B32 = 32
    B64 = 64
    B128 = 128
    B128_ATOM32 = 132

    @property
    def span(self) -> int:
        """Contiguous bytes of one row of the swizzle atom (16 for the unswizzled interleave)."""
        return {0: 16, 32: 32, 64: 64, 128: 128, 132: 128}[self]

    @property
    def repeat(self) -> int:
        """Bytes after which the pattern repeats."""
        return {0: 16, 32: 256, 64: 512, 128: 1024, 132: 512}[self]


def swizzle(address: np.ndarray | int, mode: Swizzle) -> np.ndarray | int:
    """The byte address at which the hardware puts linear byte `address`.

    The pattern is fixed to absolute shared-memory addresses: with the 16-byte atom, address bits
    [4, 4+b) are exclusive-ored with bits [7, 7+b), b = 1, 2, 3 for 32, 64 and 128 bytes; with the
    32-byte atom bits [5, 7) with bits [7, 9).
    """
    if mode == Swizzle.NONE:
        return address
    if mode == Swizzle.B128_ATOM32:
        return address ^ (address >> 2 & 0x60)
    return address ^ (address >> 3 & mode.span - 16)


# Multiply


def multiply_accumulate(
    a: np.ndarray, b: np.ndarray, c: np.ndarray | None, d_type: str
) -> np.ndarray:
    """Bits of D = A B + C over the last two axes, for A, B, C given as values.

    The ISA promises products in full and sums "with at least single precision" in unspecified order
    and rounding. Here one instruction's products and sum, C included, are taken in fp64 and rounded
    once to the type of D: at least as exact as any hardware, and independent of summation order but
    for ties.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        d = np.matmul(a.astype(np.float64), b.astype(np.float64))
        if c is not None:
            d += c
    return from_float(d, d_type)
