"""wgmma: descriptors and fragments by hand, and TMA tile -> descriptor -> product against numpy."""

import numpy as np
import pytest

from .layouts import IllegalOperand, Swizzle, from_float, to_float
from .mma import scatter_matrix
from .smem_operand import SmemDescriptor
from .tensor_map import decode, encode_tiled, fill_bits, tile_box
from .wgmma import (
    a_fragment_table,
    accumulator_table,
    check_operands,
    decode_descriptor,
    encode_descriptor,
    k_of,
    operand_addresses,
    read_a_fragment,
    wgmma,
)

SWIZZLES = [Swizzle.NONE, Swizzle.B32, Swizzle.B64, Swizzle.B128]
TILE_K = 64  # elements of 16 bits; half as many of 32


def test_descriptor_bits() -> None:
    value = 1 << 62 | 1024 >> 4 << 32 | 8192 >> 4 << 16 | 0x12340 >> 4
    d = decode_descriptor(value)
    assert d == SmemDescriptor(0x12340, 8192, 1024, 0, Swizzle.B128)
    assert encode_descriptor(d) == value
    assert decode_descriptor(2 << 62).swizzle == Swizzle.B64
    assert decode_descriptor(3 << 62).swizzle == Swizzle.B32
    assert decode_descriptor(5 << 49).base_offset == 5
    for bit in (14, 30, 46, 52, 61):
        with pytest.raises(IllegalOperand, match="reserved"):
            decode_descriptor(1 << bit)
    with pytest.raises(IllegalOperand, match="multiples of 16"):
        encode_descriptor(d._replace(stride_bytes=1000))


def test_accumulator_by_hand() -> None:
    """Figure "WGMMA .m64nNk16 register fragment layout for accumulator matrix D"."""
    row, col = accumulator_table(256, "f32")
    assert row.shape == (128, 128, 1)
    assert [(row[0, i, 0], col[0, i, 0]) for i in range(5)] == [
        (0, 0),
        (0, 1),
        (8, 0),
        (8, 1),
        (0, 8),
    ]
    assert (row[37, 6, 0], col[37, 6, 0]) == (16 + 1 + 8, 8 + 2)
    assert (row[127, 127, 0], col[127, 127, 0]) == (63, 255)
    row, col = accumulator_table(16, "f16")
    assert row.shape == (128, 4, 2)
    assert (row[70, 3].tolist(), col[70, 3].tolist()) == ([32 + 1 + 8] * 2, [12, 13])


def test_a_fragment_by_hand() -> None:
    row, col = a_fragment_table("bf16")
    assert (row[37, 1].tolist(), col[37, 1].tolist()) == ([25, 25], [2, 3])
    assert (row[37, 2].tolist(), col[37, 2].tolist()) == ([17, 17], [10, 11])
    row, col = a_fragment_table("tf32")
    assert (row[:, :, 0][37].tolist(), col[:, :, 0][37].tolist()) == (
        [17, 25, 17, 25],
        [1, 1, 5, 5],
    )


@pytest.mark.parametrize("d_type", ["f32", "f16"])
def test_accumulator_covers_the_tile_once(d_type: str) -> None:
    for n in range(8, 257, 8):
        row, col = accumulator_table(n, d_type)
        assert sorted((row * n + col).ravel()) == list(range(64 * n))
    for n in (0, 12, 264):
        with pytest.raises(IllegalOperand, match="n in 8, 16"):
            accumulator_table(n, d_type)


def load_operand(
    matrix: np.ndarray, dtype: str, mode: Swizzle, mn_major: bool, base: int
) -> tuple[np.ndarray, list[SmemDescriptor]]:
    """TMA an operand [rows, k] into shared memory; its bytes and one descriptor per instruction.

    Boxes are as wide as the swizzle span (16 bytes without), one after the other, the way CUTLASS
    tiles its canonical layouts.
    """
    source = np.ascontiguousarray(matrix.T if mn_major else matrix)
    size, inner = source.itemsize, mode.span // source.itemsize
    outer, across = source.shape
    tensor = decode(
        encode_tiled(
            *("u16" if size == 2 else "u32", 0, (across, outer), (across * size,)),
            *((inner, outer),),
            swizzle=mode,
        )
    )
    shared = np.full(base + 2 * source.nbytes + 128 * outer, 0xAB, np.uint8)
    words, memory = source.reshape(-1), shared.view(source.dtype)
    for i, first in enumerate(range(0, across, inner)):
        box = tile_box(tensor, (first, 0), base + i * tensor.box_bytes)
        memory[box.shared_address[~box.in_bounds] // size] = fill_bits(tensor)
        inside = box.in_bounds
        memory[box.shared_address[inside] // size] = words[box.global_address[inside] // size]
    eight, box_bytes = 8 * mode.span, tensor.box_bytes
    leading, stride = box_bytes, eight
    if mn_major and mode == Swizzle.NONE:
        leading, stride = eight, box_bytes
    descriptors = []
    k = k_of(dtype)
    for step in range(matrix.shape[1] // k):
        if mn_major:
            start = base + step * k // 8 * eight
        else:
            box, chunk = divmod(step * 32, mode.span)
            start = base + box * box_bytes + chunk
        descriptors.append(SmemDescriptor(start, leading, stride, 0, mode))
    return memory, descriptors


def gather(memory: np.ndarray, addresses: np.ndarray) -> np.ndarray:
    return memory[addresses // memory.itemsize]


def random_matrix(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> np.ndarray:
    return from_float(rng.standard_normal(shape), "f32" if dtype == "tf32" else dtype)


def multiply_tiles(
    a: np.ndarray, b: np.ndarray, dtype: str, modes: tuple, majors: tuple
) -> np.ndarray:
    """[64, K] times [n, K] transposed, through shared memory and a chain of wgmmas; D as fp32."""
    memory_a, descriptors_a = load_operand(a, dtype, modes[0], majors[0], 1024)
    memory_b, descriptors_b = load_operand(b, dtype, modes[1], majors[1], 2048)
    k, n = k_of(dtype), len(b)
    d = None
    for da, db in zip(descriptors_a, descriptors_b, strict=True):
        da, db = (decode_descriptor(encode_descriptor(x)) for x in (da, db))
        a_bits = gather(memory_a, operand_addresses(da, 64, k, dtype, majors[0]))
        b_bits = gather(memory_b, operand_addresses(db, n, k, dtype, majors[1]))
        d = wgmma("f32", dtype, a_bits, b_bits, d, scale_d=d is not None)
    row, col = accumulator_table(n, "f32")
    result = np.empty((64, n), np.float32)
    result[row, col] = d.view(np.float32)[..., None]
    return result


def assert_is_product(result: np.ndarray, a: np.ndarray, b: np.ndarray, dtype: str) -> None:
    """Every instruction rounds once, so the chain is within K / k ulps of the sum of magnitudes."""
    x, y = (to_float(m, dtype).astype(np.float64) for m in (a, b))
    bound = (np.abs(x) @ np.abs(y).T) * 2.0**-23 * (a.shape[1] // k_of(dtype))
    assert (np.abs(result - x @ y.T) <= bound).all()


@pytest.mark.parametrize("mn_major", [False, True], ids=["K-major", "N-major"])
@pytest.mark.parametrize("mode", SWIZZLES)
def test_every_n_swizzle_and_b_major(mode: Swizzle, mn_major: bool) -> None:
    rng = np.random.default_rng(4)
    a = random_matrix(rng, (64, TILE_K), "bf16")
    for n in range(8, 257, 8):
        b = random_matrix(rng, (n, TILE_K), "bf16")
        result = multiply_tiles(a, b, "bf16", (Swizzle.B128, mode), (False, mn_major))
        assert_is_product(result, a, b, "bf16")


@pytest.mark.parametrize("b_major", [False, True], ids=["B K-major", "B N-major"])
@pytest.mark.parametrize("a_major", [False, True], ids=["A K-major", "A M-major"])
@pytest.mark.parametrize("b_mode", SWIZZLES)
@pytest.mark.parametrize("a_mode", SWIZZLES)
def test_swizzles_and_majors_of_both(
    a_mode: Swizzle, b_mode: Swizzle, a_major: bool, b_major: bool
) -> None:
    rng = np.random.default_rng(5)
    a, b = (random_matrix(rng, (rows, TILE_K), "f16") for rows in (64, 96))
    result = multiply_tiles(a, b, "f16", (a_mode, b_mode), (a_major, b_major))
    assert_is_product(result, a, b, "f16")


@pytest.mark.parametrize("mode", SWIZZLES)
def test_tf32_is_k_major_and_truncated(mode: Swizzle) -> None:
    rng = np.random.default_rng(6)
    a, b = (random_matrix(rng, (rows, TILE_K // 2), "tf32") for rows in (64, 40))
    assert_is_product(multiply_tiles(a, b, "tf32", (mode, mode), (False, False)), a, b, "tf32")
    with pytest.raises(IllegalOperand, match="tf32 must be K-major"):
        check_operands("f32", "tf32", False, True)


def test_register_a_equals_shared_a() -> None:
    rng = np.random.default_rng(7)
    a, b = (random_matrix(rng, (rows, 16), "bf16") for rows in (64, 32))
    registers = scatter_matrix(a, a_fragment_table("bf16"), "bf16")
    assert registers.shape == (128, 4)
    assert (read_a_fragment(registers, "bf16") == a).all()
    assert (
        wgmma("f32", "bf16", read_a_fragment(registers, "bf16"), b, None, False)
        == wgmma("f32", "bf16", a, b, None, False)
    ).all()


def test_warpgroups_side_by_side() -> None:
    rng = np.random.default_rng(8)
    a = random_matrix(rng, (3 * 64, 16), "bf16").reshape(3, 64, 16)
    b = random_matrix(rng, (3 * 24, 16), "bf16").reshape(3, 24, 16)
    d = rng.integers(0, 1 << 30, (3, 128, 12), dtype=np.uint32)
    together = wgmma("f32", "bf16", a, b, d, True)
    for i in range(3):
        assert (together[i] == wgmma("f32", "bf16", a[i], b[i], d[i], True)).all()


def test_scale_d_and_negation() -> None:
    a = np.full((64, 16), 0x3C00, np.uint16)
    b = np.full((8, 16), 0x4000, np.uint16)
    d = np.full((128, 4), 0x3F800000, np.uint32)

    def value(*scales: int, scale_d: bool = True) -> float:
        registers = wgmma("f32", "f16", a, b, d, scale_d, *scales)
        assert (registers == registers[0, 0]).all()
        return float(registers.view(np.float32)[0, 0])

    assert value() == 33
    assert value(scale_d=False) == 32
    assert value(-1, 1) == value(1, -1) == -31
    assert value(-1, -1) == 33
    with pytest.raises(IllegalOperand, match="imm-scale"):
        value(0, 1)


def test_f16_accumulator() -> None:
    a = np.full((64, 16), 0x3C00, np.uint16)
    b = np.full((16, 16), 0x4000, np.uint16)
    d = wgmma("f16", "f16", a, b, np.full((128, 4), 0x3C003C00, np.uint32), True)
    assert (d == 0x50205020).all()  # 33.0
    with pytest.raises(IllegalOperand, match=r"in \.f32 only"):
        wgmma("f16", "bf16", a, b, None, False)
