"""Warp fragments against the formulas and figures of the PTX ISA, and products against numpy."""

import numpy as np
import pytest

from .layouts import IllegalOperand, from_float, pack, to_float, unpack
from .mma import (
    SHAPES,
    fragment,
    k_of,
    ldmatrix,
    matrix_bytes,
    matrix_row_lanes,
    mma_sync,
    movmatrix,
    scatter_matrix,
    stmatrix,
)

# Row and column formulas as the ISA prints them, for element i of a lane: g = groupID = lane >> 2,
# t = threadID_in_group = lane % 4.
ISA_FORMULAS = {
    ("m16n8k16", "A", "bf16"): lambda g, t, i: (
        g if 0 <= i < 2 or 4 <= i < 6 else g + 8,
        t * 2 + (i & 1) + (0 if i < 4 else 8),
    ),
    ("m16n8k16", "B", "bf16"): lambda g, t, i: (t * 2 + (i & 1) + (0 if i < 2 else 8), g),
    ("m16n8k16", "C", "f32"): lambda g, t, i: (g if i < 2 else g + 8, t * 2 + (i & 1)),
    ("m16n8k16", "C", "f16"): lambda g, t, i: (g if i < 2 else g + 8, t * 2 + (i & 1)),
    ("m16n8k8", "A", "f16"): lambda g, t, i: (g if i < 2 else g + 8, t * 2 + (i & 1)),
    ("m16n8k8", "B", "f16"): lambda g, t, i: (t * 2 + i, g),
    ("m16n8k8", "A", "tf32"): lambda g, t, i: (
        g if i in (0, 2) else g + 8,
        t if i in (0, 1) else t + 4,
    ),
    ("m16n8k8", "B", "tf32"): lambda g, t, i: (t if i == 0 else t + 4, g),
    ("m16n8k8", "C", "f32"): lambda g, t, i: (g if i < 2 else g + 8, t * 2 + (i & 1)),
    ("m16n8k4", "A", "tf32"): lambda g, t, i: (g if i == 0 else g + 8, t),
    ("m16n8k4", "B", "tf32"): lambda g, t, i: (t, g),
}
REGISTERS = {
    ("m16n8k16", "A", "bf16"): 4,
    ("m16n8k16", "B", "bf16"): 2,
    ("m16n8k16", "C", "f32"): 4,
    ("m16n8k16", "C", "f16"): 2,
    ("m16n8k8", "A", "f16"): 2,
    ("m16n8k8", "B", "f16"): 1,
    ("m16n8k8", "A", "tf32"): 4,
    ("m16n8k8", "B", "tf32"): 2,
    ("m16n8k8", "C", "f32"): 4,
    ("m16n8k4", "A", "tf32"): 2,
    ("m16n8k4", "B", "tf32"): 1,
}


@pytest.mark.parametrize("key", ISA_FORMULAS, ids="-".join)
def test_fragment_is_the_isa_formula(key: tuple[str, str, str]) -> None:
    row, col = fragment(*key)
    per = row.shape[2]
    assert row.shape[:2] == (32, REGISTERS[key])
    for lane in range(32):
        for i in range(REGISTERS[key] * per):
            element = lane, i // per, i % per
            assert (row[element], col[element]) == ISA_FORMULAS[key](lane >> 2, lane % 4, i)
    assert len(set(zip(row.ravel(), col.ravel(), strict=True))) == row.size


def test_fragment_spot_values() -> None:
    a = fragment("m16n8k16", "A", "bf16")
    assert (a.row[5, 3].tolist(), a.col[5, 3].tolist()) == ([9, 9], [10, 11])
    b = fragment("m16n8k16", "B", "f16")
    assert (b.row[31, 1].tolist(), b.col[31, 1].tolist()) == ([14, 15], [7, 7])
    c = fragment("m16n8k8", "C", "f32")
    assert (c.row[6, 3, 0], c.col[6, 3, 0]) == (9, 5)


def random_bits(rng: np.random.Generator, shape: tuple, dtype: str) -> np.ndarray:
    if dtype == "tf32":
        return from_float(rng.standard_normal(shape), "f32")
    return from_float(rng.standard_normal(shape), dtype)


@pytest.mark.parametrize("cd_type", ["f32", "f16"])
@pytest.mark.parametrize(("shape", "ab_type"), SHAPES)
def test_mma_is_the_matrix_product(shape: str, ab_type: str, cd_type: str) -> None:
    rng = np.random.default_rng(1)
    k = k_of(shape, ab_type)
    a = random_bits(rng, (3, 16, k), ab_type)
    b = random_bits(rng, (3, k, 8), ab_type)
    c = random_bits(rng, (3, 16, 8), cd_type)
    layout = fragment(shape, "C", cd_type)
    operands = (
        scatter_matrix(a, fragment(shape, "A", ab_type), ab_type),
        scatter_matrix(b, fragment(shape, "B", ab_type), ab_type),
        scatter_matrix(c, layout, cd_type),
    )
    if cd_type == "f16" and ab_type != "f16":
        with pytest.raises(IllegalOperand, match=r"in \.f32 only"):
            mma_sync(shape, ab_type, cd_type, *operands)
        return
    d = mma_sync(shape, ab_type, cd_type, *operands)
    exact = to_float(a, ab_type).astype(np.float64) @ to_float(b, ab_type).astype(np.float64)
    exact = exact + to_float(c, cd_type)
    expected = from_float(exact, cd_type)
    assert (d == scatter_matrix(expected, layout, cd_type)).all()


def test_mma_one_product_by_hand() -> None:
    a, b = np.zeros((32, 4), np.uint32), np.zeros((32, 2), np.uint32)
    a[5, 3] = 0x40000000  # A[9][11] = 2 (bf16, high half)
    b[9, 1] = 0x40400000  # B[11][2] = 3: lane 9 is column 2, its b3 row 2 + 1 + 8
    c = np.zeros((32, 4), np.uint32)
    d = mma_sync("m16n8k16", "bf16", "f32", a, b, c)
    assert d[5, 2] == 0x40C00000  # D[9][2] = 6 is c2 of the lane 4 * (9 - 8) + 2 / 2
    assert np.count_nonzero(d) == 1


def test_mma_tf32_drops_13_bits() -> None:
    a, b = np.zeros((32, 4), np.uint32), np.zeros((32, 2), np.uint32)
    a[0, 0], b[0, 0] = 0x3F801FFF, 0x3F803FFF
    d = mma_sync("m16n8k8", "tf32", "f32", a, b, np.zeros((32, 4), np.uint32))
    assert d[0, 0] == 0x3F802000


def test_unknown_shapes_are_refused() -> None:
    with pytest.raises(IllegalOperand, match="m16n8k16"):
        k_of("m16n8k16", "tf32")
    with pytest.raises(IllegalOperand, match="m8n8k4"):
        fragment("m8n8k4", "A", "f16")
    with pytest.raises(IllegalOperand, match="32 lanes x 4 registers"):
        mma_sync("m16n8k16", "f16", "f32", *[np.zeros((32, 2), np.uint32)] * 3)


# ldmatrix, stmatrix, movmatrix


def numbered_rows(num: int) -> np.ndarray:
    """Element (row, col) of matrix i is 100 i + 10 row + col."""
    i, row, col = np.ogrid[:num, :8, :8]
    return (100 * i + 10 * row + col).astype("<u2").view(np.uint8)


def test_row_lanes() -> None:
    assert matrix_row_lanes(1).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert matrix_row_lanes(4)[3].tolist() == [24, 25, 26, 27, 28, 29, 30, 31]
    with pytest.raises(IllegalOperand, match="x3"):
        matrix_row_lanes(3)


@pytest.mark.parametrize("num", [1, 2, 4])
def test_ldmatrix_gives_lane_l_two_elements_of_row_l_over_4(num: int) -> None:
    halves = ldmatrix(numbered_rows(num), trans=False).view("<u2").reshape(32, num, 2)
    for lane in range(32):
        for i in range(num):
            first = 100 * i + 10 * (lane // 4) + 2 * (lane % 4)
            assert halves[lane, i].tolist() == [first, first + 1]


@pytest.mark.parametrize("num", [1, 2, 4])
def test_ldmatrix_trans_gives_column_pairs(num: int) -> None:
    halves = ldmatrix(numbered_rows(num), trans=True).view("<u2").reshape(32, num, 2)
    for lane in range(32):
        for i in range(num):
            first = 100 * i + 10 * (2 * (lane % 4)) + lane // 4
            assert halves[lane, i].tolist() == [first, first + 10]


@pytest.mark.parametrize("trans", [False, True])
def test_matrix_bytes_names_the_source_of_each_half(trans: bool) -> None:
    row, byte = matrix_bytes(2, trans)
    assert row.shape == byte.shape == (32, 2, 2)
    assert (row[7, 1].tolist(), byte[7, 1].tolist()) == (
        ([6, 7], [2, 2]) if trans else ([1, 1], [12, 14])
    )


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("num", [1, 2, 4])
def test_stmatrix_undoes_ldmatrix(num: int, trans: bool) -> None:
    rng = np.random.default_rng(2)
    rows = rng.integers(0, 256, (5, num, 8, 16), dtype=np.uint8)
    assert (stmatrix(ldmatrix(rows, trans), trans) == rows).all()


def test_movmatrix_transposes() -> None:
    registers = ldmatrix(numbered_rows(1), trans=False)[:, 0]
    assert (movmatrix(registers) == ldmatrix(numbered_rows(1), trans=True)[:, 0]).all()
    assert (movmatrix(movmatrix(registers)) == registers).all()


def test_ldmatrix_feeds_mma() -> None:
    """A by ldmatrix.x4, row-major B [k, n] by ldmatrix.x2.trans, as every sm_80 kernel does."""
    rng = np.random.default_rng(3)
    a, b = (from_float(rng.standard_normal(s), "f16") for s in ((16, 16), (16, 8)))
    quadrants = np.stack([a[:8, :8], a[8:, :8], a[:8, 8:], a[8:, 8:]])
    a_registers = ldmatrix(np.ascontiguousarray(quadrants).view(np.uint8), trans=False)
    b_registers = ldmatrix(b.reshape(2, 8, 8).view(np.uint8), trans=True)
    zero = np.zeros((32, 4), np.uint32)
    d = mma_sync("m16n8k16", "f16", "f32", a_registers, b_registers, zero)
    row, col = fragment("m16n8k16", "C", "f32")
    product = to_float(a, "f16").astype(np.float64) @ to_float(b, "f16")
    assert (unpack(d, "f32") == product.astype(np.float32)[row, col]).all()
    assert (pack(unpack(d, "f32"), "f32") == d).all()
