"""The tensor core of sm_100: tensor memory and tcgen05.alloc, .mma, .ld and .st for one CTA.

PTX ISA "TensorCore 5th Generation Family Instructions", kinds f16 and tf32 with cta_group::1.
Tensor memory is 128 lanes (rows) by 512 columns of 32-bit cells; matrices appear here as arrays of
element bits and as the (lane, column) of each element.
"""

from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from .layouts import (
    IllegalOperand,
    Swizzle,
    element_bytes,
    multiply_accumulate,
    table,
    to_float,
)
from .smem_operand import SmemDescriptor, decode_bytes, encode_bytes
from .smem_operand import operand_addresses as operand_addresses

TMEM_LANES = 128
TMEM_COLUMNS = 512
ALLOCATION_UNIT = 32


# Addresses and allocation


def tmem_address(lane: int, column: int) -> int:
    """A tensor memory address: lane in bits 16-31, column in bits 0-15."""
    return lane << 16 | column


def split_address(address: int) -> tuple[int, int]:
    """Lane and column of a tensor memory address."""
    return address >> 16 & 0xFFFF, address & 0xFFFF


class Columns:
    """The tensor memory columns of one SM, which its resident CTAs allocate and free.

    The ISA leaves open which columns an allocation gets; here they are the lowest that fit.
    """

    def __init__(self) -> None:
        self._owner: list[Hashable | None] = [None] * TMEM_COLUMNS
        self._allocations: dict[tuple[Hashable, int], int] = {}
        self._smallest: dict[Hashable, int] = {}
        self._relinquished: set[Hashable] = set()

    def alloc(self, cta: Hashable, count: int) -> int | None:
        """tcgen05.alloc: the first column, or None while the request has to wait."""
        if count not in (32, 64, 128, 256, 512):
            raise IllegalOperand(f"tcgen05.alloc takes 32, 64, ..., 512 columns, got {count}")
        if cta in self._relinquished:
            raise IllegalOperand("tcgen05.alloc after tcgen05.relinquish_alloc_permit")
        if count > self._smallest.get(cta, TMEM_COLUMNS):
            raise IllegalOperand("tcgen05.alloc of more columns than the CTA's previous one")
        for first in range(0, TMEM_COLUMNS - count + 1, ALLOCATION_UNIT):
            if all(owner is None for owner in self._owner[first : first + count]):
                self._owner[first : first + count] = [cta] * count
                self._allocations[cta, first] = count
                self._smallest[cta] = count
                return first
        return None

    def dealloc(self, cta: Hashable, address: int, count: int) -> None:
        """tcgen05.dealloc of a whole earlier allocation."""
        lane, first = split_address(address)
        if lane or self._allocations.get((cta, first)) != count:
            raise IllegalOperand(f"tcgen05.dealloc of {count} columns at {address:#x}: no such one")
        del self._allocations[cta, first]
        self._owner[first : first + count] = [None] * count

    def relinquish(self, cta: Hashable) -> None:
        """tcgen05.relinquish_alloc_permit."""
        self._relinquished.add(cta)

    def allocated(self, cta: Hashable) -> list[tuple[int, int]]:
        """(first column, count) of each live allocation; none may be left when the CTA exits."""
        return [(first, n) for (owner, first), n in self._allocations.items() if owner == cta]

    def owns(self, cta: Hashable, columns: np.ndarray) -> bool:
        """Whether all these columns are allocated to the CTA."""
        return all(c < TMEM_COLUMNS and self._owner[c] == cta for c in np.unique(columns))


# Descriptors

SWIZZLE_CODES = {
    0: Swizzle.NONE,
    1: Swizzle.B128_ATOM32,
    2: Swizzle.B128,
    4: Swizzle.B64,
    6: Swizzle.B32,
}


def decode_smem_descriptor(value: int) -> SmemDescriptor:
    """The shared memory descriptor of tcgen05, "Shared memory descriptor".

    Bits 0-13 start address, 16-29 leading and 32-45 stride dimension byte offset (all >> 4), 46-48
    constant 0b001, 49-51 base offset, 52 leading dimension mode (1, an absolute address, is for the
    48-byte K of sm_103a), 53-60 zero, 61-63 swizzle.
    """
    if value >> 46 & 7 != 1 or value & 0x1FE0_0000_C000_C000:
        raise IllegalOperand(f"tcgen05 descriptor {value:#018x} breaks its constant bits")
    if value >> 52 & 1:
        raise IllegalOperand("an absolute leading dimension address exists on sm_103a only")
    mode = SWIZZLE_CODES.get(value >> 61)
    if mode is None:
        raise IllegalOperand(f"tcgen05 descriptor has invalid swizzle code {value >> 61}")
    return SmemDescriptor(
        decode_bytes(value),
        decode_bytes(value >> 16),
        decode_bytes(value >> 32),
        value >> 49 & 7,
        mode,
    )


def encode_smem_descriptor(descriptor: SmemDescriptor) -> int:
    """Inverse of `decode_smem_descriptor`."""
    codes = {mode: code for code, mode in SWIZZLE_CODES.items()}
    return (
        encode_bytes(descriptor.start_address)
        | encode_bytes(descriptor.leading_bytes) << 16
        | encode_bytes(descriptor.stride_bytes) << 32
        | 1 << 46
        | descriptor.base_offset << 49
        | codes[descriptor.swizzle] << 61
    )


class InstructionDescriptor(NamedTuple):
    """What tcgen05.mma multiplies: shape, types, signs and major-ness (True = M- or N-major)."""

    m: int
    n: int
    a_type: str
    b_type: str
    d_type: str
    negate_a: bool
    negate_b: bool
    a_mn_major: bool
    b_mn_major: bool

    @property
    def k(self) -> int:
        """K of one instruction: 32 bytes of elements."""
        return 32 // element_bytes(self.a_type)


INPUT_TYPES = {"f16": {0: "f16", 1: "bf16"}, "tf32": {2: "tf32"}}
OUTPUT_TYPES = {"f16": {0: "f16", 1: "f32"}, "tf32": {1: "f32"}}


def decode_instruction_descriptor(value: int, kind: str) -> InstructionDescriptor:
    """The 32-bit instruction descriptor of kind::f16 and kind::tf32, dense, cta_group::1.

    Bits 4-5 D type, 7-9 A type, 10-12 B type, 13 and 14 negate A and B, 15 and 16 transpose A and
    B, 17-22 N >> 3, 24-28 M >> 4. Sparsity (0-2), saturation (3), the reserved bits 6, 23 and 29
    and the .ws shift (30-31) must be 0.
    """
    if kind not in INPUT_TYPES:
        raise IllegalOperand(f"tcgen05.mma.kind::{kind} is not modelled")
    if value & 0xE080_004F:
        raise IllegalOperand(f"instruction descriptor {value:#010x} is sparse or sets spare bits")
    inputs, outputs = INPUT_TYPES[kind], OUTPUT_TYPES[kind]
    a_type, b_type = inputs.get(value >> 7 & 7), inputs.get(value >> 10 & 7)
    d_type = outputs.get(value >> 4 & 3)
    if a_type is None or b_type is None or d_type is None:
        raise IllegalOperand(f"instruction descriptor {value:#010x}: types not of kind::{kind}")
    if d_type == "f16" and (a_type, b_type) != ("f16", "f16"):
        raise IllegalOperand("tcgen05.mma has an f16 result for f16 operands only")
    n, m = (value >> 17 & 0x3F) << 3, (value >> 24 & 0x1F) << 4
    if m not in (64, 128) or not 8 <= n <= 256:
        raise IllegalOperand(f"tcgen05.mma.cta_group::1 has no shape {m}x{n}")
    negate_a, negate_b, a_mn, b_mn = (bool(value >> bit & 1) for bit in (13, 14, 15, 16))
    return InstructionDescriptor(*(m, n, a_type, b_type, d_type, negate_a, negate_b, a_mn, b_mn))


def check_majorness(dtype: str, mn_major: bool, mode: Swizzle) -> None:
    """The ISA's table "Valid Combinations of Type-Size, Major-ness and Swizzling"."""
    if not mn_major:
        return
    if (element_bytes(dtype) == 4) != (mode == Swizzle.B128_ATOM32):
        raise IllegalOperand(f"no transposed .{dtype} operand with swizzle {mode.name}")


# Matrices in tensor memory


@table
def _matrix_lanes(m: int) -> np.ndarray:
    """Lane of each row relative to the matrix: layout D for M = 128, layout F for M = 64.

    Layout D uses all lanes in order. Layout F uses half the data path: rows 16 w to 16 w + 15 lie
    in the first 16 lanes of the 32 that warp w can reach.
    """
    row = np.arange(m)
    return row if m == 128 else row % 16 + 32 * (row // 16)


def _first_cell(m: int, columns: int, address: int) -> tuple[int, int]:
    lane, column = split_address(address)
    allowed = (0,) if m == 128 else (0, 16)
    if m not in (64, 128) or lane not in allowed:
        raise IllegalOperand(f"an M = {m} matrix in tensor memory cannot start at lane {lane}")
    if column + columns > TMEM_COLUMNS:
        raise IllegalOperand(f"columns {column} to {column + columns - 1} leave tensor memory")
    return lane, column


def accumulator_cells(m: int, n: int, d_type: str, address: int) -> tuple[np.ndarray, np.ndarray]:
    """Lane and column of every element of D, [m, n] each: one cell per element of either type.

    Elements of 16 bits are not packed, they take the low half of their cell.
    """
    if d_type not in ("f16", "f32"):
        raise IllegalOperand(f"tcgen05.mma has no accumulator of type .{d_type}")
    first_lane, first_column = _first_cell(m, n, address)
    lane = first_lane + np.broadcast_to(_matrix_lanes(m)[:, None], (m, n))
    column = first_column + np.broadcast_to(np.arange(n), (m, n))
    return lane, column


def a_cells(m: int, k: int, dtype: str, address: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lane, column and 16-bit half of every element of A in tensor memory, [m, k] each.

    Lanes are those of D; along k, elements of 16 bits are packed two to a cell, low half first.
    """
    per = 4 // element_bytes(dtype)
    first_lane, first_column = _first_cell(m, -(-k // per), address)
    lane = first_lane + np.broadcast_to(_matrix_lanes(m)[:, None], (m, k))
    column, half = np.divmod(np.arange(k), per)
    shape = (m, k)
    return lane, first_column + np.broadcast_to(column, shape), np.broadcast_to(half, shape)


def mma(
    idesc: InstructionDescriptor,
    a_bits: np.ndarray,
    b_bits: np.ndarray,
    d_cells: np.ndarray | None,
    scale_input_d: int = 0,
) -> np.ndarray:
    """The cells of D = A B + D 2^-scale_input_d for A [m, k] and B as [n, k].

    d_cells are D's cells [m, n] before, or None when enable-input-d is false. The upper half of a
    cell that holds a 16-bit result is written as zero; the ISA does not say.
    """
    if not 0 <= scale_input_d <= 15:
        raise IllegalOperand(f"scale-input-d must be 0 to 15, got {scale_input_d}")
    a, b = to_float(a_bits, idesc.a_type), to_float(b_bits, idesc.b_type)
    c = None
    if d_cells is not None:
        half = element_bytes(idesc.d_type) == 2
        c = to_float(d_cells.astype(np.uint16) if half else d_cells, idesc.d_type)
        c = np.ldexp(c.astype(np.float64), -scale_input_d)
    a = -a if idesc.negate_a else a
    b = -b if idesc.negate_b else b
    return multiply_accumulate(a, b.T, c, idesc.d_type).astype(np.uint32)


# tcgen05.ld and tcgen05.st


class LoadShape(NamedTuple):
    """Lanes one warp accesses, registers per repetition and the largest .num."""

    lanes: int
    registers: int
    largest: int


LOAD_SHAPES = {
    "32x32b": LoadShape(32, 1, 128),
    "16x64b": LoadShape(16, 1, 128),
    "16x128b": LoadShape(16, 2, 64),
    "16x256b": LoadShape(16, 4, 32),
    "16x32bx2": LoadShape(16, 1, 128),
}


def _load_positions(shape: str, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lane, column and whether the element belongs to the second half, for each (lane, register).

    32x32b    thread t reads lane t, register r column r.
    16x64b    lane t / 4, plus 8 in odd threads; column bit 1 of t, plus 2 r.
    16x128b   lane t / 4, plus 8 in odd registers; column t % 4, plus 4 (r / 2).
    16x256b   lane t / 4, plus 8 if bit 1 of r; column 2 (t % 4) + r % 2, plus 8 (r / 4).
    16x32bx2  lane t % 16, register r column r; threads 16-31 read the second half.
    """
    t = np.arange(32)[:, None]
    r = np.arange(LOAD_SHAPES[shape].registers * num)[None, :]
    first_half = np.zeros_like(t + r)
    if shape == "32x32b":
        return t + 0 * r, r + 0 * t, first_half
    if shape == "16x64b":
        return t // 4 + 8 * (t % 2) + 0 * r, (t >> 1) % 2 + 2 * r, first_half
    if shape == "16x128b":
        return t // 4 + 8 * (r % 2), t % 4 + 4 * (r // 2), first_half
    if shape == "16x256b":
        return t // 4 + 8 * ((r >> 1) % 2), 2 * (t % 4) + r % 2 + 8 * (r // 4), first_half
    return t % 16 + 0 * r, r + 0 * t, t // 16 + 0 * r


def _check_shape(shape: str, num: int) -> None:
    if shape not in LOAD_SHAPES:
        raise IllegalOperand(f"tcgen05.ld and .st have no shape .{shape}")
    if num not in (1, 2, 4, 8, 16, 32, 64, 128) or num > LOAD_SHAPES[shape].largest:
        raise IllegalOperand(f"tcgen05.ld and .st have no .{shape}.x{num}")


@table
def load_table(shape: str, num: int, split: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lane and column of each register of each thread, [32, registers], relative to taddr.

    The same table serves tcgen05.st. `split` is immHalfSplitoff of 16x32bx2, an address offset.
    """
    _check_shape(shape, num)
    lane, column, second = _load_positions(shape, num)
    split_lane, split_column = split_address(split)
    return lane + second * split_lane, column + second * split_column


@table
def packed_load_table(shape: str, num: int, split: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """With .pack::16b or .unpack::16b: lane and column of both halves, [32, registers, 2].

    A register then stands for two adjacent columns, of whose cells only the low 16 bits take part.
    """
    _check_shape(shape, num)
    lane, column, second = _load_positions(shape, num)
    split_lane, split_column = split_address(split)
    first = 2 * column + second * split_column
    lanes = np.repeat((lane + second * split_lane)[..., None], 2, axis=-1)
    return lanes, np.stack([first, first + 1], axis=-1)


def check_warp_access(warp: int, address: int, shape: str) -> None:
    """Warp w of a warpgroup reaches lanes 32 w to 32 w + 31 only ("Access restrictions")."""
    lane, _ = split_address(address)
    lanes = LOAD_SHAPES[shape].lanes
    if lane // 32 != warp % 4 or lane % lanes:
        raise IllegalOperand(f".{shape} at lane {lane} is out of reach of warp {warp % 4}")
