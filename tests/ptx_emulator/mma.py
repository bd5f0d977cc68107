"""Warp-level matrix instructions: mma.sync, ldmatrix, stmatrix and movmatrix.

PTX ISA "Matrix multiply-accumulate operation using mma instruction". A warp's registers are uint32
bit patterns [..., 32 lanes, registers]; leading axes are warps side by side.
"""

import numpy as np

from .layouts import (
    Fragment,
    IllegalOperand,
    element_bytes,
    join_registers,
    multiply_accumulate,
    split_registers,
    table,
    to_float,
)

SHAPES = {
    ("m16n8k16", "f16"): 16,
    ("m16n8k16", "bf16"): 16,
    ("m16n8k8", "f16"): 8,
    ("m16n8k8", "bf16"): 8,
    ("m16n8k8", "tf32"): 8,
    ("m16n8k4", "tf32"): 4,
}


def k_of(shape: str, dtype: str) -> int:
    """The K extent of mma.sync.shape for A and B of `dtype`."""
    try:
        return SHAPES[shape, dtype]
    except KeyError:
        raise IllegalOperand(f"no mma.sync.{shape} for .{dtype}") from None


def fragment_rows_cols(rows: int, cols: int, per: int) -> tuple[np.ndarray, np.ndarray]:
    """The register layout every tensor-core fragment is made of, [32, registers, per].

    A register covers 8 rows by 4 * per columns: with groupID = lane / 4 and threadID_in_group =
    lane % 4, element i of it is row groupID, column threadID_in_group * per + i. Registers then
    walk the matrix in steps of 8 rows first, 4 * per columns second.
    """
    lane = np.arange(32).reshape(32, 1, 1)
    register = np.arange(rows // 8 * (cols // (4 * per))).reshape(1, -1, 1)
    element = np.arange(per).reshape(1, 1, per)
    row_step, col_step = register % (rows // 8), register // (rows // 8)
    shape = np.broadcast_shapes(lane.shape, register.shape, element.shape)
    row = np.broadcast_to(lane // 4 + 8 * row_step, shape)
    col = np.broadcast_to(lane % 4 * per + element + 4 * per * col_step, shape)
    return row.copy(), col.copy()


@table
def fragment(shape: str, operand: str, dtype: str) -> Fragment:
    """Row and column of each element that a lane holds of A (M x K), B (K x N) or C (M x N).

    C stands for D as well. B is stored transposed: its columns take the place of rows. An fp32
    accumulator has one element per register but the columns of a pair, as an f16x2 one does.
    """
    if operand == "C":
        row, col = fragment_rows_cols(16, 8, 2)
        if dtype == "f32":
            return Fragment(row.reshape(32, 4, 1), col.reshape(32, 4, 1))
        if dtype == "f16":
            return Fragment(row, col)
        raise IllegalOperand(f"mma.sync has no accumulator of type .{dtype}")
    k, per = k_of(shape, dtype), 4 // element_bytes(dtype)
    if operand == "A":
        return Fragment(*fragment_rows_cols(16, k, per))
    if operand == "B":
        col, row = fragment_rows_cols(8, k, per)
        return Fragment(row, col)
    raise IllegalOperand(f"mma.sync has no operand {operand}")


def gather_matrix(
    registers: np.ndarray, layout: Fragment, shape: tuple[int, int], dtype: str
) -> np.ndarray:
    """Element bits of the matrix that a fragment describes, [..., rows, cols]."""
    bits = split_registers(registers, dtype)
    if bits.shape[-3:] != layout.row.shape:
        lanes, count, _ = layout.row.shape
        raise IllegalOperand(f"expected {lanes} lanes x {count} registers, got {registers.shape}")
    batch, (rows, cols) = bits.shape[:-3], shape
    matrix = np.empty((*batch, rows * cols), bits.dtype)
    matrix[..., layout.row * cols + layout.col] = bits
    return matrix.reshape(*batch, rows, cols)


def scatter_matrix(matrix: np.ndarray, layout: Fragment, dtype: str) -> np.ndarray:
    """Registers of a fragment from element bits [..., rows, cols]."""
    *batch, rows, cols = matrix.shape
    elements = matrix.reshape(*batch, rows * cols)
    return join_registers(np.take(elements, layout.row * cols + layout.col, axis=-1), dtype)


def mma_sync(
    shape: str, ab_type: str, cd_type: str, a: np.ndarray, b: np.ndarray, c: np.ndarray
) -> np.ndarray:
    """D = A B + C of mma.sync.aligned.shape.row.col, for all leading warps at once."""
    k = k_of(shape, ab_type)
    if cd_type == "f16" and ab_type != "f16":
        raise IllegalOperand(f"mma.sync accumulates .{ab_type} products in .f32 only")
    layout = fragment(shape, "C", cd_type)
    a_bits = gather_matrix(a, fragment(shape, "A", ab_type), (16, k), ab_type)
    b_bits = gather_matrix(b, fragment(shape, "B", ab_type), (k, 8), ab_type)
    c_bits = gather_matrix(c, layout, (16, 8), cd_type)
    d_bits = multiply_accumulate(
        to_float(a_bits, ab_type), to_float(b_bits, ab_type), to_float(c_bits, cd_type), cd_type
    )
    return scatter_matrix(d_bits, layout, cd_type)


# ldmatrix, stmatrix, movmatrix: 8x8 matrices of 16-bit elements


@table
def matrix_row_lanes(num: int) -> np.ndarray:
    """The lane whose address operand points at row r of matrix i, [num, 8].

    Lanes 0-7 address the rows of the first matrix, lanes 8-15 those of the second, and so on; with
    .x1 and .x2 the addresses of the remaining lanes are not used. A row is 16 aligned bytes.
    """
    if num not in (1, 2, 4):
        raise IllegalOperand(f"ldmatrix and stmatrix move 1, 2 or 4 matrices, got .x{num}")
    return np.arange(8 * num).reshape(num, 8)


@table
def matrix_bytes(num: int, trans: bool) -> tuple[np.ndarray, np.ndarray]:
    """Row and first byte within it of half h of register i of each lane, [32, num, 2] each.

    Register i belongs to matrix i. Lane l holds the elements (l / 4, 2 (l % 4) + h) of it, with
    .trans the elements (2 (l % 4) + h, l / 4).
    """
    matrix_row_lanes(num)
    lane = np.arange(32).reshape(32, 1, 1)
    half = np.arange(2).reshape(1, 1, 2)
    row, col = lane // 4 + 0 * half, lane % 4 * 2 + half
    if trans:
        row, col = col, row
    shape = (32, num, 2)
    return np.broadcast_to(row, shape).copy(), np.broadcast_to(2 * col, shape).copy()


def ldmatrix(rows: np.ndarray, trans: bool) -> np.ndarray:
    """Registers [..., 32, num] from the bytes of the addressed rows, uint8 [..., num, 8, 16]."""
    num = rows.shape[-3]
    row, byte = matrix_bytes(num, bool(trans))
    elements = np.ascontiguousarray(rows).view("<u2")
    halves = elements[..., np.arange(num).reshape(1, num, 1), row, byte // 2]
    return join_registers(halves, "f16")


def stmatrix(registers: np.ndarray, trans: bool) -> np.ndarray:
    """The bytes to store at the addressed rows, uint8 [..., num, 8, 16]."""
    num = registers.shape[-1]
    row, byte = matrix_bytes(num, bool(trans))
    elements = np.empty((*registers.shape[:-2], num, 8, 8), "<u2")
    halves = split_registers(registers, "f16")
    elements[..., np.arange(num).reshape(1, num, 1), row, byte // 2] = halves
    return elements.view(np.uint8)


def movmatrix(registers: np.ndarray) -> np.ndarray:
    """movmatrix.sync.aligned.m8n8.trans.b16: transpose one 8x8 matrix held as [..., 32]."""
    return ldmatrix(stmatrix(registers[..., None], False), True)[..., 0]
