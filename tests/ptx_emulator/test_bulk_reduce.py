"""Element operations of cp.reduce.async.bulk."""

import numpy as np
import pytest

from .bulk_reduce import reduce
from .layouts import IllegalOperand


@pytest.mark.parametrize(
    ("op", "dtype", "old", "new", "result"),
    [
        ("add", "u32", 0xFFFFFFFF, 2, 1),
        ("add", "s32", 0xFFFFFFFF, 2, 1),
        ("add", "f32", 0x3F800000, 0x40000000, 0x40400000),
        ("add", "f32", 0x00000001, 0x00000001, 0),
        ("add", "f32", 0x80000001, 0x80000001, 0x80000000),
        ("min", "s32", 0xFFFFFFFF, 2, 0xFFFFFFFF),
        ("min", "u32", 0xFFFFFFFF, 2, 2),
        ("max", "s32", 0xFFFFFFFF, 2, 2),
        ("inc", "u32", 4, 5, 5),
        ("inc", "u32", 5, 5, 0),
        ("dec", "u32", 3, 5, 2),
        ("dec", "u32", 0, 5, 5),
        ("dec", "u32", 6, 5, 5),
        ("and", "b32", 0b1100, 0b1010, 0b1000),
        ("or", "b32", 0b1100, 0b1010, 0b1110),
        ("xor", "b32", 0b1100, 0b1010, 0b0110),
    ],
)
def test_32_bit(op: str, dtype: str, old: int, new: int, result: int) -> None:
    assert reduce(op, dtype, np.array([old], np.uint32), np.array([new], np.uint32)) == result


@pytest.mark.parametrize(
    ("op", "dtype", "old", "new", "result"),
    [
        ("add", "f16", 0x3C00, 0x4000, 0x4200),
        ("add", "f16", 0x0001, 0x0001, 0x0002),
        ("add", "bf16", 0x3F80, 0x3B80, 0x3F80),
        ("add", "bf16", 0x3F81, 0x3B80, 0x3F82),
        ("min", "bf16", 0x3F80, 0xC000, 0xC000),
        ("max", "f16", 0x7FFF, 0x3C00, 0x3C00),
    ],
)
def test_16_bit(op: str, dtype: str, old: int, new: int, result: int) -> None:
    assert reduce(op, dtype, np.array([old], np.uint16), np.array([new], np.uint16)) == result


def test_64_bit() -> None:
    one, two = (np.array([x], np.float64).view(np.uint64) for x in (1.0, 2.0))
    assert reduce("add", "f64", one, two).view(np.float64) == 3.0
    top = np.array([2**64 - 1], np.uint64)
    assert reduce("add", "u64", top, np.array([2], np.uint64)) == 1
    assert reduce("max", "s64", top, np.array([2], np.uint64)) == 2


def test_unknown_combinations_are_refused() -> None:
    for op, dtype in (("add", "s64"), ("and", "u32"), ("min", "f32"), ("mul", "u32")):
        with pytest.raises(IllegalOperand, match=dtype):
            reduce(op, dtype, np.zeros(1, np.uint32), np.zeros(1, np.uint32))
