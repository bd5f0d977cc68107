"""Element formats, swizzle patterns and the multiply, against values written out by hand."""

import numpy as np
import pytest

from .layouts import (
    IllegalOperand,
    Swizzle,
    from_float,
    join_registers,
    multiply_accumulate,
    pack,
    split_registers,
    swizzle,
    to_float,
    unpack,
)

# PTX ISA "Swizzling Modes": the 16-byte cells of one 128-byte row after another.
PATTERNS = {
    Swizzle.NONE: ["01234567"],
    Swizzle.B32: ["01234567", "10325476"],
    Swizzle.B64: ["01234567", "10325476", "23016745", "32107654"],
    Swizzle.B128: [
        *("01234567", "10325476", "23016745", "32107654"),
        *("45670123", "54761032", "67452301", "76543210"),
    ],
    Swizzle.B128_ATOM32: ["01234567", "23016745", "45670123", "67452301"],
}


@pytest.mark.parametrize("mode", Swizzle)
def test_swizzle_is_the_printed_pattern(mode: Swizzle) -> None:
    rows = PATTERNS[mode]
    address = np.arange(4096)
    placed = swizzle(address, mode)
    for linear in range(0, 4096, 16):
        line, chunk = divmod(linear // 16, 8)
        shown = rows[line % len(rows)]
        assert shown[placed[linear] // 16 % 8] == str(chunk)
    assert sorted(placed) == list(address)
    assert (placed // 128 == address // 128).all()
    assert (placed % 16 == address % 16).all()


@pytest.mark.parametrize("mode", Swizzle)
def test_swizzle_repeats_and_undoes_itself(mode: Swizzle) -> None:
    address = np.arange(2048)
    assert (swizzle(address + mode.repeat, mode) == swizzle(address, mode) + mode.repeat).all()
    assert (swizzle(swizzle(address, mode), mode) == address).all()
    assert swizzle(0x3A5, mode) == swizzle(np.array([0x3A5]), mode)[0]


def test_swizzle_by_hand() -> None:
    assert swizzle(0b11_1010_0101, Swizzle.B128) == 0b11_1101_0101
    assert swizzle(0b11_1010_0101, Swizzle.B64) == 0b11_1001_0101
    assert swizzle(0b11_1010_0101, Swizzle.B32) == 0b11_1011_0101
    assert swizzle(0b11_1010_0101, Swizzle.B128_ATOM32) == 0b11_1100_0101


@pytest.mark.parametrize(
    ("dtype", "bits", "value"),
    [
        ("bf16", 0x3F80, 1.0),
        ("bf16", 0xC049, -3.140625),
        ("bf16", 0x0001, 2.0**-133),
        ("f16", 0x3C00, 1.0),
        ("f16", 0xC248, -3.140625),
        ("f16", 0x0001, 2.0**-24),
        ("f16", 0x7BFF, 65504.0),
        ("tf32", 0x3F80_1FFF, 1.0),
        ("tf32", 0x3F80_2000, 1.0009765625),
        ("f32", 0x3F80_0001, 1.00000011920928955078125),
    ],
)
def test_to_float(dtype: str, bits: int, value: float) -> None:
    word = np.uint16 if dtype in ("bf16", "f16") else np.uint32
    assert to_float(np.array([bits], word), dtype)[0] == value


@pytest.mark.parametrize(
    ("dtype", "value", "bits"),
    [
        ("bf16", 1 + 2.0**-8, 0x3F80),
        ("bf16", 1 + 3 * 2.0**-8, 0x3F82),
        ("bf16", 1 + 2.0**-8 + 2.0**-20, 0x3F81),
        ("bf16", 3.4e38, 0x7F80),
        ("bf16", np.nan, 0x7FFF),
        ("f16", 1 + 2.0**-11, 0x3C00),
        ("f16", 65520.0, 0x7C00),
        ("f16", -np.nan, 0x7FFF),
        ("f32", 1 + 2.0**-24, 0x3F80_0000),
        ("f32", 1 + 3 * 2.0**-24, 0x3F80_0002),
        ("f32", 1e39, 0x7F80_0000),
        ("f32", np.nan, 0x7FFF_FFFF),
    ],
)
def test_from_float(dtype: str, value: float, bits: int) -> None:
    assert from_float(np.array([value]), dtype)[0] == bits


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_every_16_bit_value_survives(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = to_float(bits, dtype)
    kept = from_float(values, dtype)
    finite = ~np.isnan(values)
    assert (kept[finite] == bits[finite]).all()
    assert (kept[~finite] == 0x7FFF).all()


def test_registers_hold_element_0_low() -> None:
    registers = np.array([[0x40003F80]], np.uint32)
    assert split_registers(registers, "bf16").tolist() == [[[0x3F80, 0x4000]]]
    assert unpack(registers, "bf16").tolist() == [[[1.0, 2.0]]]
    assert (join_registers(split_registers(registers, "bf16"), "bf16") == registers).all()
    assert (pack(unpack(registers, "bf16"), "bf16") == registers).all()
    assert split_registers(registers, "f32").shape == (1, 1, 1)


def test_multiply_rounds_once() -> None:
    a = np.array([[1.0, 1.0, 1.0]], np.float32)
    b = np.array([[2.0**24], [1.0], [1.0]], np.float32)
    assert to_float(multiply_accumulate(a, b, None, "f32"), "f32") == 2.0**24 + 2
    c = np.array([[-(2.0**24)]], np.float32)
    assert to_float(multiply_accumulate(a, b, c, "f32"), "f32") == 2.0


def test_multiply_keeps_infinities_and_nans_quietly() -> None:
    a = np.array([[np.inf, 1.0]], np.float32)
    assert multiply_accumulate(a, np.array([[1.0], [1.0]]), None, "f32") == 0x7F80_0000
    assert multiply_accumulate(a, np.array([[1.0], [-np.inf]]), None, "f32") == 0x7FFF_FFFF
    big = np.array([[300.0]])
    assert multiply_accumulate(big, big, None, "f16") == 0x7C00


@pytest.mark.parametrize("function", [to_float, from_float])
def test_unknown_type_is_refused(function) -> None:
    with pytest.raises(IllegalOperand, match="e4m3"):
        function(np.zeros(1, np.uint16), "e4m3")
