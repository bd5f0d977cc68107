"""Tensor maps and the tiles that the tensor memory accelerator (TMA) moves with them.

PTX ISA "Tensors" (tiled mode) and the driver's cuTensorMapEncodeTiled. A tensor map is 128 opaque
bytes: NVIDIA documents its fields and their limits but not their place, and no public description
of the bits is known. The bytes here are therefore this package's own encoding. A program cannot
tell, because it may only copy the object, hand it to TMA instructions and edit it with
tensormap.replace; and 128 zero bytes are a blank map, from which kernels build theirs.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

from .layouts import F16_NAN, F32_NAN, IllegalOperand, Swizzle, swizzle, table

MAP_BYTES = 128
MAX_RANK = 5

# The codes of tensormap.replace, which differ from those of the driver's enumerations.
ELEMENT_TYPES = (
    *("u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32"),
    *("f32_ftz", "f64", "bf16", "tf32", "tf32_ftz"),
)
ELEMENT_BYTES = (1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4)
SWIZZLES = (Swizzle.NONE, Swizzle.B32, Swizzle.B64, Swizzle.B128)
ATOM_16B, ATOM_32B = 0, 1
FLOAT_NANS = {
    **dict.fromkeys(("f16", "bf16"), F16_NAN),
    **dict.fromkeys(("f32", "f32_ftz", "tf32", "tf32_ftz"), F32_NAN),
    "f64": 0x7FFFFFFFFFFFFFFF,
}

# Our encoding: address, 5 sizes and 4 strides of 8 bytes, 5 box sizes of 2 bytes, 5 element strides
# and then rank - 1, element type, interleave, swizzle, swizzle atom and fill mode of 1 byte.
LAYOUT = struct.Struct("<Q5Q4Q5H5B6B27x")
FIELDS = {
    "global_address": (0, 1),
    "global_dim": (1, 5),
    "global_stride": (6, 4),
    "box_dim": (10, 5),
    "element_stride": (15, 5),
    "rank": (20, 1),
    "elemtype": (21, 1),
    "interleave_layout": (22, 1),
    "swizzle_mode": (23, 1),
    "swizzle_atomicity": (24, 1),
    "fill_mode": (25, 1),
}
INDEXED = ("global_dim", "global_stride", "box_dim", "element_stride")
CODES = {
    "rank": MAX_RANK,
    "elemtype": len(ELEMENT_TYPES),
    "interleave_layout": 3,
    "swizzle_mode": len(SWIZZLES),
    "swizzle_atomicity": 2,
    "fill_mode": 2,
}


@dataclass(frozen=True)
class TensorMap:
    """A tiled tensor map; dimension 0 is the innermost, its stride one element.

    global_stride holds the byte strides of dimensions 1 and up, as cuTensorMapEncodeTiled takes
    them. interleave is 0, 16 or 32 bytes.
    """

    element_type: str
    global_address: int
    global_dim: tuple[int, ...]
    global_stride: tuple[int, ...]
    box_dim: tuple[int, ...]
    element_stride: tuple[int, ...]
    interleave: int = 0
    swizzle: Swizzle = Swizzle.NONE
    nan_fill: bool = False

    @property
    def rank(self) -> int:
        return len(self.global_dim)

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[ELEMENT_TYPES.index(self.element_type)]

    @property
    def box_elements(self) -> tuple[int, ...]:
        """Elements moved per dimension: ceil(box / element stride), dimension 0 taken whole."""
        steps = (1, *self.element_stride[1:])
        return tuple(-(-b // s) for b, s in zip(self.box_dim, steps, strict=True))

    @property
    def box_bytes(self) -> int:
        """Bytes of one box in shared memory, which are also its transaction bytes."""
        return prod(self.box_elements) * self.element_bytes


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise IllegalOperand(f"tensor map: {message}")


def check(m: TensorMap) -> None:
    """The requirements of cuTensorMapEncodeTiled, in the order of its documentation."""
    _require(m.element_type in ELEMENT_TYPES, f"unknown element type {m.element_type}")
    _require(1 <= m.rank <= MAX_RANK, f"rank must be 1 to 5, got {m.rank}")
    lengths = len(m.global_stride) + 1, len(m.box_dim), len(m.element_stride)
    _require(lengths == (m.rank,) * 3, f"rank {m.rank} but {lengths} strides + 1, boxes, steps")
    _require(m.interleave in (0, 16, 32), f"interleave must be 0, 16 or 32, got {m.interleave}")
    _require(not m.interleave or m.rank >= 3, "an interleaved layout needs rank 3 or more")
    alignment = 32 if m.interleave == 32 else 16
    address = m.global_address
    _require(address % alignment == 0, f"global address {address:#x} is not {alignment}-aligned")
    for i, size in enumerate(m.global_dim):
        _require(1 <= size <= 2**32, f"global_dim[{i}] must be 1 to 2**32, got {size}")
    for i, stride in enumerate(m.global_stride):
        good = stride % alignment == 0 and 0 <= stride < 2**40
        _require(good, f"global_stride[{i}] must be a multiple of {alignment}, got {stride}")
    for i, size in enumerate(m.box_dim):
        _require(1 <= size <= 256, f"box_dim[{i}] must be 1 to 256, got {size}")
    for i, step in enumerate(m.element_stride):
        _require(1 <= step <= 8, f"element_stride[{i}] must be 1 to 8, got {step}")
    inner = m.box_dim[0] * m.element_bytes
    if m.interleave == 0:
        _require(inner % 16 == 0, f"inner box of {inner} bytes is not a multiple of 16")
        fits = m.swizzle == Swizzle.NONE or inner <= m.swizzle.span
        _require(fits, f"inner box of {inner} bytes exceeds the {m.swizzle.span}-byte swizzle")
    good = m.interleave != 32 or m.swizzle == Swizzle.B32
    _require(good, "32-byte interleave needs the 32-byte swizzle")
    _require(not m.nan_fill or m.element_type in FLOAT_NANS, f"no NaN of type {m.element_type}")


def encode_tiled(
    element_type: str,
    global_address: int,
    global_dim: Sequence[int],
    global_stride: Sequence[int],
    box_dim: Sequence[int],
    element_stride: Sequence[int] | None = None,
    interleave: int = 0,
    swizzle: Swizzle = Swizzle.NONE,
    nan_fill: bool = False,
) -> bytes:
    """cuTensorMapEncodeTiled: a checked tensor map as 128 bytes. Element strides default to 1."""
    steps = tuple(element_stride) if element_stride is not None else (1,) * len(global_dim)
    m = TensorMap(
        *(element_type, global_address, tuple(global_dim), tuple(global_stride), tuple(box_dim)),
        *(steps, interleave, swizzle, nan_fill),
    )
    check(m)

    def padded(values: Sequence[int], length: int = MAX_RANK) -> list[int]:
        return [*values, *[0] * (length - len(values))]

    atom = ATOM_32B if swizzle == Swizzle.B128_ATOM32 else ATOM_16B
    mode = Swizzle.B128 if atom else swizzle
    return LAYOUT.pack(
        *(global_address, *padded(m.global_dim), *padded(m.global_stride, MAX_RANK - 1)),
        *(*padded(m.box_dim), *padded(steps), m.rank - 1, ELEMENT_TYPES.index(element_type)),
        *(interleave // 16, SWIZZLES.index(mode), atom, int(nan_fill)),
    )


def decode(raw: bytes | np.ndarray) -> TensorMap:
    """The checked tensor map that 128 bytes hold."""
    data = bytes(raw)
    _require(len(data) == MAP_BYTES, f"128 bytes expected, got {len(data)}")
    _require(not any(data[-27:]), "these 128 bytes are not a tensor map")
    values = LAYOUT.unpack(data)
    _require(
        all(values[FIELDS[field][0]] < codes for field, codes in CODES.items()),
        "these 128 bytes are not a tensor map",
    )
    rank = values[20] + 1
    mode = SWIZZLES[values[23]]
    if values[24] == ATOM_32B:
        _require(mode == Swizzle.B128, "32-byte swizzle atoms need the 128-byte swizzle")
        mode = Swizzle.B128_ATOM32
    m = TensorMap(
        *(ELEMENT_TYPES[values[21]], values[0], values[1 : 1 + rank], values[6 : 5 + rank]),
        *(values[10 : 10 + rank], values[15 : 15 + rank], 16 * values[22], mode, values[25] == 1),
    )
    check(m)
    return m


def replace_field(
    raw: bytes | np.ndarray, field: str, value: int, ordinal: int | None = None
) -> bytes:
    """tensormap.replace.tile.field: the edited 128 bytes.

    `value` is the operand as PTX passes it: rank is one less than the rank, global_stride[i] is the
    byte stride of dimension i + 1, and the last five fields take the codes of the ISA's table. The
    map may be incomplete in between; `decode` checks the whole.
    """
    _require(field in FIELDS, f"no field .{field}")
    first, count = FIELDS[field]
    _require((ordinal is not None) == (field in INDEXED), f"wrong operands for .{field}")
    index = ordinal or 0
    _require(0 <= index < count, f".{field} has ordinals 0 to {count - 1}, got {index}")
    if field in CODES:
        _require(0 <= value < CODES[field], f".{field} has no value {value}")
    if field in ("box_dim", "element_stride"):
        _require(0 < value <= 256, f".{field}[{index}] cannot hold {value}")
    values = list(LAYOUT.unpack(bytes(raw)))
    values[first + index] = value & (1 << 64) - 1
    return LAYOUT.pack(*values)


def fill_bits(m: TensorMap) -> int:
    """The element that a load writes where the box leaves the tensor.

    Zero, or "a special NaN called OOB-NaN"; its bits are not documented, the canonical NaN of the
    type stands in for it.
    """
    return FLOAT_NANS[m.element_type] if m.nan_fill else 0


class Box(NamedTuple):
    """The elements of one box, innermost dimension first.

    Where in_bounds is False a load writes `fill_bits` and a store writes nothing; global_address
    means nothing there.
    """

    global_address: np.ndarray
    in_bounds: np.ndarray
    shared_address: np.ndarray
    element_bytes: int


def _outer(terms: Sequence[np.ndarray], combine: np.ufunc) -> np.ndarray:
    """Combine one vector per dimension over the whole box, dimension 0 innermost, flattened."""
    result = terms[0]
    for term in terms[1:]:
        result = combine.outer(term, result).reshape(-1)
    return result


@table
def _global_offsets(box: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """Byte offset of each element of the box from its first."""
    terms = [np.arange(n) * s for n, s in zip(box, strides, strict=True)]
    return _outer(terms, np.add).astype(np.int64)


@table
def _shared_addresses(low_start: int, count: int, size: int, mode: Swizzle) -> np.ndarray:
    """Address of each element of a dense box placed at `low_start` < 1024, after the swizzle."""
    linear = low_start + np.arange(count, dtype=np.int64) * size
    return swizzle(linear, mode)


def tile_box(m: TensorMap, coords: Sequence[int], shared_address: int, store: bool = False) -> Box:
    """The elements that one tiled copy moves between global memory and `shared_address`.

    `coords` are signed and name the element of the tensor that comes first in the box. Element
    strides make the box skip elements: it spans box_dim of them and moves one in each stride. The
    swizzle pattern belongs to absolute addresses (ISA "Swizzling Modes": a destination off the
    pattern's boundary gives a non-zero base offset), so alignment to 128 bytes is enough. Rows
    shorter than the swizzle span are refused: the CUDA guide only says that shared memory must
    accommodate the full span, not where the rows then lie.
    """
    _require(len(coords) == m.rank, f"{len(coords)} coordinates for rank {m.rank}")
    _require(m.interleave == 0, "interleaved layouts are not modelled")
    inner = m.box_dim[0] * m.element_bytes
    dense = m.swizzle == Swizzle.NONE or inner == m.swizzle.span
    _require(dense, f"{inner}-byte rows under a {m.swizzle.span}-byte swizzle are not modelled")
    _require(shared_address % 128 == 0, f"shared address {shared_address:#x} is not 128-aligned")
    _require(not store or min(coords) >= 0, f"a store cannot start at {tuple(coords)}")
    steps = (1, *m.element_stride[1:])
    strides = (m.element_bytes, *m.global_stride)
    box = m.box_elements
    offsets = _global_offsets(box, tuple(s * t for s, t in zip(strides, steps, strict=True)))
    origin = m.global_address + sum(c * s for c, s in zip(coords, strides, strict=True))
    inside = []
    for size, count, step, first in zip(m.global_dim, box, steps, coords, strict=True):
        position = first + step * np.arange(count)
        inside.append((position >= 0) & (position < size))
    low_start = shared_address % 1024
    shared = _shared_addresses(low_start, offsets.size, m.element_bytes, m.swizzle)
    return Box(
        origin + offsets,
        _outer(inside, np.logical_and),
        shared_address - low_start + shared,
        m.element_bytes,
    )
