"""tcgen05: descriptors, tensor memory layouts and load shapes by hand, products against numpy."""

import numpy as np
import pytest

from .layouts import IllegalOperand, Swizzle, from_float, to_float
from .mma import fragment
from .smem_operand import SmemDescriptor
from .tcgen05 import (
    LOAD_SHAPES,
    TMEM_COLUMNS,
    TMEM_LANES,
    Columns,
    InstructionDescriptor,
    a_cells,
    accumulator_cells,
    check_majorness,
    check_warp_access,
    decode_instruction_descriptor,
    decode_smem_descriptor,
    encode_smem_descriptor,
    load_table,
    mma,
    operand_addresses,
    packed_load_table,
    split_address,
    tmem_address,
)
from .test_wgmma import gather, load_operand, random_matrix


def test_addresses() -> None:
    assert tmem_address(0x21, 0x180) == 0x0021_0180
    assert split_address(0x0021_0180) == (0x21, 0x180)


# Allocation


def test_columns_are_shared_and_waited_for() -> None:
    columns = Columns()
    assert columns.alloc("a", 256) == 0
    assert columns.alloc("b", 256) == 256
    assert columns.alloc("c", 32) is None
    columns.dealloc("a", 0, 256)
    assert columns.alloc("c", 32) == 0
    assert columns.alloc("d", 64) == 32
    assert columns.allocated("c") == [(0, 32)]
    assert columns.owns("c", np.arange(32))
    assert not columns.owns("c", np.arange(33))
    assert not columns.owns("b", np.array([511, 512]))


def test_allocation_rules() -> None:
    columns = Columns()
    for count in (0, 16, 48, 1024):
        with pytest.raises(IllegalOperand, match="takes 32"):
            columns.alloc("a", count)
    columns.alloc("a", 64)
    with pytest.raises(IllegalOperand, match="more columns"):
        columns.alloc("a", 128)
    for address, count in ((0, 32), (32, 64), (tmem_address(1, 0), 64)):
        with pytest.raises(IllegalOperand, match="no such"):
            columns.dealloc("a", address, count)
    columns.relinquish("a")
    with pytest.raises(IllegalOperand, match="relinquish"):
        columns.alloc("a", 32)
    columns.dealloc("a", 0, 64)
    assert columns.allocated("a") == []


# Descriptors


def test_smem_descriptor_bits() -> None:
    value = 2 << 61 | 1 << 46 | 1024 >> 4 << 32 | 8192 >> 4 << 16 | 0x12340 >> 4
    d = decode_smem_descriptor(value)
    assert d == SmemDescriptor(0x12340, 8192, 1024, 0, Swizzle.B128)
    assert encode_smem_descriptor(d) == value
    codes = {0: Swizzle.NONE, 1: Swizzle.B128_ATOM32, 4: Swizzle.B64, 6: Swizzle.B32}
    for code, mode in codes.items():
        assert decode_smem_descriptor(code << 61 | 1 << 46).swizzle == mode
    for bad in (0, 3 << 61 | 1 << 46, 1 << 46 | 1 << 53, 1 << 46 | 1 << 14, 1 << 46 | 1 << 52):
        with pytest.raises(IllegalOperand):
            decode_smem_descriptor(bad)


def test_instruction_descriptor_bits() -> None:
    """0x04110490: D f32, A and B bf16, B transposed, N = 64, M = 64."""
    value = 4 << 24 | 8 << 17 | 1 << 16 | 1 << 10 | 1 << 7 | 1 << 4
    assert value == 0x04110490
    idesc = decode_instruction_descriptor(value, "f16")
    assert idesc == InstructionDescriptor(
        *(64, 64, "bf16", "bf16", "f32", False, False, False, True)
    )
    assert idesc.k == 16
    negated = decode_instruction_descriptor(0x08200010 | 3 << 13 | 1 << 15, "f16")
    assert negated == InstructionDescriptor(
        *(128, 128, "f16", "f16", "f32", True, True, True, False)
    )
    tf32 = decode_instruction_descriptor(0x08200010 | 2 << 7 | 2 << 10, "tf32")
    assert (tf32.a_type, tf32.k) == ("tf32", 8)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (0x04110490, "tf32", "types"),
        (0x04110490, "f8f6f4", "not modelled"),
        (0x04110490 | 4, "f16", "sparse"),
        (0x04110490 | 1 << 30, "f16", "sparse"),
        (0x10200490, "f16", "shape 256x128"),
        (0x08000490, "f16", "shape 128x0"),
        (0x08200480, "f16", "f16 operands only"),
    ],
)
def test_instruction_descriptor_refuses(value: int, kind: str, message: str) -> None:
    with pytest.raises(IllegalOperand, match=message):
        decode_instruction_descriptor(value, kind)


def test_valid_majors() -> None:
    check_majorness("bf16", True, Swizzle.B128)
    check_majorness("tf32", True, Swizzle.B128_ATOM32)
    check_majorness("tf32", False, Swizzle.B128)
    for dtype, mode in (("tf32", Swizzle.B128), ("bf16", Swizzle.B128_ATOM32)):
        with pytest.raises(IllegalOperand, match="transposed"):
            check_majorness(dtype, True, mode)


# Matrices in tensor memory


def test_accumulator_layouts() -> None:
    lane, column = accumulator_cells(128, 64, "f32", tmem_address(0, 32))
    assert (lane[77, 5], column[77, 5]) == (77, 37)
    lane, column = accumulator_cells(64, 64, "f32", tmem_address(16, 32))
    rows = [0, 15, 16, 31, 32, 47, 48, 63]
    assert lane[rows, 0].tolist() == [16, 31, 48, 63, 80, 95, 112, 127]
    assert column[3, 63] == 95
    for m, address in ((128, tmem_address(16, 0)), (64, tmem_address(32, 0)), (128, 480)):
        with pytest.raises(IllegalOperand):
            accumulator_cells(m, 64, "f32", address)


def test_a_layout_packs_16_bit_elements() -> None:
    lane, column, half = a_cells(128, 16, "bf16", tmem_address(0, 8))
    assert (lane[9, 5], column[9, 5], half[9, 5]) == (9, 10, 1)
    assert column.max() == 15
    lane, column, half = a_cells(64, 8, "tf32", tmem_address(0, 8))
    assert (lane[20, 5], column[20, 5], half[20, 5]) == (36, 13, 0)


def test_mma_by_hand() -> None:
    a = np.full((128, 16), 0x3C00, np.uint16)
    b = np.full((8, 16), 0x4000, np.uint16)
    idesc = InstructionDescriptor(128, 8, "f16", "f16", "f32", False, False, False, False)
    one = np.full((128, 8), 0x3F800000, np.uint32)
    expected = {
        "overwrite": (mma(idesc, a, b, None), 32.0),
        "accumulate": (mma(idesc, a, b, one), 33.0),
        "scaled": (mma(idesc, a, b, one, scale_input_d=2), 32.25),
        "negate A": (mma(idesc._replace(negate_a=True), a, b, one), -31.0),
        "negate both": (mma(idesc._replace(negate_a=True, negate_b=True), a, b, one), 33.0),
    }
    for name, (cells, value) in expected.items():
        assert (cells.view(np.float32) == value).all(), name
    half = idesc._replace(d_type="f16")
    assert (mma(half, a, b, np.full((128, 8), 0xFFFF3C00, np.uint32)) == 0x5020).all()
    with pytest.raises(IllegalOperand, match="scale-input-d"):
        mma(idesc, a, b, one, scale_input_d=16)


# tcgen05.ld and tcgen05.st


def lane_column(shape: str, num: int, thread: int, register: int, split: int = 0) -> tuple:
    lane, column = load_table(shape, num, split)
    return int(lane[thread, register]), int(column[thread, register])


def test_load_shapes_by_hand() -> None:
    assert lane_column("32x32b", 8, 13, 5) == (13, 5)
    assert [lane_column("16x64b", 1, t, 0) for t in range(5)] == [
        *((0, 0), (8, 0), (0, 1), (8, 1), (1, 0))
    ]
    assert lane_column("16x64b", 4, 31, 3) == (15, 7)
    assert [lane_column("16x128b", 1, t, r) for t in (0, 3, 4) for r in (0, 1)] == [
        *((0, 0), (8, 0), (0, 3), (8, 3), (1, 0), (9, 0))
    ]
    assert lane_column("16x128b", 2, 31, 3) == (15, 7)
    assert [lane_column("16x256b", 1, 5, r) for r in range(4)] == [(1, 2), (1, 3), (9, 2), (9, 3)]
    assert lane_column("16x256b", 2, 5, 4) == (1, 10)
    assert lane_column("16x32bx2", 4, 15, 2, split=32) == (15, 2)
    assert lane_column("16x32bx2", 4, 16, 2, split=32) == (0, 34)


def test_16x256b_is_the_accumulator_fragment_of_mma_sync() -> None:
    lane, column = load_table("16x256b", 1)
    row, col = fragment("m16n8k16", "C", "f32")
    assert (lane == row[..., 0]).all()
    assert (column == col[..., 0]).all()


@pytest.mark.parametrize("shape", LOAD_SHAPES)
def test_load_shapes_cover_their_cells_once(shape: str) -> None:
    lanes, registers, largest = LOAD_SHAPES[shape]
    num = 1
    while num <= largest:
        width = 32 * registers * num // lanes
        lane, column = load_table(shape, num, split=num)
        assert lane.shape == (32, registers * num)
        assert sorted((lane * width + column).ravel()) == list(range(lanes * width))
        num *= 2
    with pytest.raises(IllegalOperand, match="have no"):
        load_table(shape, num)
    with pytest.raises(IllegalOperand, match="have no"):
        load_table(shape, 3)


@pytest.mark.parametrize("shape", LOAD_SHAPES)
def test_packed_loads_join_adjacent_columns(shape: str) -> None:
    lane, column = packed_load_table(shape, 2, split=4)
    plain_lane, plain_column = load_table(shape, 2, split=2)
    assert (lane == plain_lane[..., None]).all()
    assert (column[..., 0] == 2 * plain_column).all()
    assert (column[..., 1] == 2 * plain_column + 1).all()


def test_warp_access() -> None:
    check_warp_access(6, tmem_address(64, 3), "32x32b")
    check_warp_access(1, tmem_address(48, 0), "16x64b")
    for warp, lane, shape in ((0, 32, "32x32b"), (1, 48, "32x32b"), (3, 100, "16x64b")):
        with pytest.raises(IllegalOperand, match="out of reach"):
            check_warp_access(warp, tmem_address(lane, 0), shape)


# A whole tile: TMA -> shared memory -> tcgen05.mma -> tensor memory -> tcgen05.ld


def load_accumulator(tmem: np.ndarray, m: int, n: int, address: int) -> np.ndarray:
    """D [m, n] through four warps' tcgen05.ld, with the shape Triton picks for each M."""
    first_lane, first_column = split_address(address)
    result = np.empty((m, n), np.uint32)
    for warp in range(4):
        if m == 128:
            lane, column = load_table("32x32b", n)
            thread = np.arange(32)[:, None]
            row, col = 32 * warp + thread + 0 * column, column
        else:
            lane, column = load_table("16x32bx2", n // 2, split=n // 2)
            row, col = 16 * warp + lane, column
        base = tmem_address(first_lane + 32 * warp, first_column)
        check_warp_access(warp, base, "32x32b" if m == 128 else "16x32bx2")
        result[row, col] = tmem[first_lane + 32 * warp + lane, first_column + column]
    return result


@pytest.mark.parametrize("a_in_tmem", [False, True], ids=["A smem", "A tmem"])
@pytest.mark.parametrize("majors", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("mode", [Swizzle.NONE, Swizzle.B32, Swizzle.B64, Swizzle.B128])
@pytest.mark.parametrize(("m", "n"), [(128, 128), (128, 16), (64, 64), (64, 256)])
def test_tile(m: int, n: int, mode: Swizzle, majors: tuple, a_in_tmem: bool) -> None:
    rng = np.random.default_rng(9)
    a, b = (random_matrix(rng, (rows, 64), "bf16") for rows in (m, n))
    memory_a, descriptors_a = load_operand(a, "bf16", mode, majors[0], 1024)
    memory_b, descriptors_b = load_operand(b, "bf16", mode, majors[1], 2048)
    idesc = InstructionDescriptor(m, n, "bf16", "bf16", "f32", False, False, *majors)
    tmem = np.full((TMEM_LANES, TMEM_COLUMNS), 0x7FFFFFFF, np.uint32)
    address = tmem_address(16 if m == 64 else 0, 64)
    a_address = tmem_address(16 if m == 64 else 0, 320)
    lanes, columns = accumulator_cells(m, n, "f32", address)
    enable = False
    for da, db in zip(descriptors_a, descriptors_b, strict=True):
        da, db = (decode_smem_descriptor(encode_smem_descriptor(x)) for x in (da, db))
        a_bits = gather(memory_a, operand_addresses(da, m, 16, "bf16", majors[0]))
        b_bits = gather(memory_b, operand_addresses(db, n, 16, "bf16", majors[1]))
        if a_in_tmem:
            lane, column, half = a_cells(m, 16, "bf16", a_address)
            halves = tmem.view(np.uint16).reshape(TMEM_LANES, TMEM_COLUMNS, 2)
            halves[lane, column, half] = a_bits
            a_bits = halves[lane, column, half]
        d = mma(idesc, a_bits, b_bits, tmem[lanes, columns] if enable else None)
        tmem[lanes, columns] = d
        enable = True
    result = load_accumulator(tmem, m, n, address).view(np.float32)
    x, y = (to_float(v, "bf16").astype(np.float64) for v in (a, b))
    assert (np.abs(result - x @ y.T) <= (np.abs(x) @ np.abs(y).T) * 2.0**-21).all()


def test_tf32_tile_with_32_byte_atoms() -> None:
    """MN-major tf32 exists only with 32-byte atoms: 32 n by 4 k each."""
    rng = np.random.default_rng(10)
    a, b = (from_float(rng.standard_normal((rows, 8)), "f32") for rows in (64, 64))
    d = SmemDescriptor(1024, 1024, 512, 0, Swizzle.B128_ATOM32)
    memory = np.zeros(2048, np.uint32)
    where = operand_addresses(d, 64, 8, "tf32", True)
    memory[where // 4] = b
    assert (memory[256:768] != 0).all()
    idesc = InstructionDescriptor(64, 64, "tf32", "tf32", "f32", False, False, False, True)
    result = mma(idesc, a, gather(memory, where), None).view(np.float32)
    x, y = (to_float(v, "tf32").astype(np.float64) for v in (a, b))
    assert (result == (x @ y.T).astype(np.float32)).all()
