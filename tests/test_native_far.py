"""Index arithmetic beyond 2³¹ elements, and counters beyond 2³², with hardly any memory."""

import mmap
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_fused import reference
from tests.native import (
    CODES,
    ISAS,
    each_dtype,
    each_isa,
    module,
    needs_native,
    normal,
    pack,
    raw_matmul,
    reduce,
    shrink,
    shrink_reduce,
)

pytestmark = [
    needs_native,
    pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is mapped when touched"),
]

NO_RESERVE = 0x4000  # mmap.MAP_NORESERVE of Linux, which Python knows from 3.13 on
HUGE = (1 << 29) + 8  # from row to row: the fifth begins behind element 2³¹
M, K, N, R = 33, 20, 70, 5


def far(values: Tensor, columns: bool = False) -> Tensor:
    """The values with rows (or columns) so far apart that offsets exceed 31 bits."""
    rows, cols = values.shape
    strides = (1, HUGE) if columns else (HUGE, 1)
    count = (rows - 1) * strides[0] + (cols - 1) * strides[1] + 1
    assert count > 1 << 31
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    try:
        memory = mmap.mmap(-1, count * values.dtype.itemsize, flags=flags)
    except OSError as error:
        pytest.skip(f"this machine does not map that much address space: {error}")
    return (
        torch.frombuffer(memory, dtype=values.dtype).as_strided((rows, cols), strides).copy_(values)
    )


def near(values: Tensor, columns: bool = False) -> Tensor:
    return values.t().contiguous().t() if columns else values.contiguous()


def far_and_near(values: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(far(values, columns), near(values, columns)) for columns in (False, True)]


def assert_same_with_each_operand_far(run: Callable[..., Tensor], operands: list[Tensor]) -> None:
    for i, values in enumerate(operands):
        for distant, close in far_and_near(values):
            before, after = operands[:i], operands[i + 1 :]
            assert torch.equal(run(*before, distant, *after), run(*before, close, *after)), i


@each_isa
@each_dtype
@pytest.mark.parametrize("rows", [4, M])
def test_matmul(isa: str, dtype: torch.dtype, rows: int) -> None:
    x, weight = normal(rows, K, dtype, 1), normal(N, K, dtype, 2, K)
    s, lora_B = normal(rows, R, dtype, 3), normal(N, R, dtype, 4)

    def run(weight: Tensor, lora_B: Tensor, x: Tensor = x, s: Tensor = s) -> Tensor:
        y = torch.full((rows, N), torch.nan, dtype=dtype)
        raw_matmul(isa, x, weight.t(), s, lora_B.t(), y)
        return y

    assert_same_with_each_operand_far(run, [weight, lora_B])
    if rows > 4:
        for distant, close in far_and_near(x):
            assert torch.equal(run(weight, lora_B, distant), run(weight, lora_B, close))
        assert torch.equal(run(weight, lora_B, s=far(s)), run(weight, lora_B))
        y = far(torch.full((rows, N), torch.nan, dtype=dtype))
        raw_matmul(isa, x, weight.t(), s, lora_B.t(), y)
        assert torch.equal(y, run(weight, lora_B))
    assert_same_with_each_operand_far(lambda weight: pack(isa, weight.t()), [weight])


@each_isa
@each_dtype
@pytest.mark.parametrize("threshold", [0, 20000])
def test_skinny_operations(isa: str, dtype: torch.dtype, threshold: int) -> None:
    x, a = normal(M, K, dtype, 1), normal(R, K, dtype, 2, K)
    b, ds = normal(K, R, dtype, 3), normal(M, R, dtype, 4)
    options = {"seed": 5, "threshold": threshold}
    assert_same_with_each_operand_far(lambda x, a: shrink(isa, x, a, **options), [x, a])
    assert_same_with_each_operand_far(lambda x: reduce(isa, ds, x, dtype, **options), [x])

    def both(dy: Tensor, b: Tensor) -> Tensor:
        gradients = shrink_reduce(isa, dy, b, ds, db_dtype=dtype)
        return torch.cat([t for t in gradients if t is not None])

    assert_same_with_each_operand_far(both, [x, b])


@each_isa
@each_dtype
def test_outputs_of_the_gradients(isa: str, dtype: torch.dtype) -> None:
    x, b, ds = normal(M, K, dtype, 1), normal(K, R, dtype, 2), normal(M, R, dtype, 3)
    code, pointers = CODES[dtype], (x.data_ptr(), *x.stride())
    da = reduce(isa, ds, x, dtype)
    _, db = shrink_reduce(isa, x, b, ds, db_dtype=dtype)
    for columns in (False, True):
        out = far(torch.full((R, K), torch.nan, dtype=dtype), columns)
        module().reduce(
            isa, code, M, K, R, ds.data_ptr(), *pointers, 0, 0, out.data_ptr(), code,
            *out.stride(), 1,
        )  # fmt: skip
        assert torch.equal(out, da)
        out = far(torch.full((K, R), torch.nan, dtype=dtype), columns)
        module().shrink_reduce(
            isa, code, M, K, R, *pointers, b.data_ptr(), *b.stride(), 1.0, 0, ds.data_ptr(),
            out.data_ptr(), code, *out.stride(), 1,
        )  # fmt: skip
        assert torch.equal(out, db)


@pytest.mark.full
@pytest.mark.parametrize("isa", sorted({*ISAS[:1], *ISAS[-1:]}))
def test_counters_beyond_two_to_the_32(isa: str) -> None:
    """The mask of a y whose rows all lie in the same memory: what remains is the last row.

    Its counters pass 2³² in the middle, and its elements 2³⁵.
    """
    dtype, cols, threshold, seed = torch.bfloat16, 3 << 20, 30000, 77
    rows = (1 << 32) // (cols // 8) + 1
    y = torch.full((1, cols), torch.nan, dtype=dtype)
    s, l = torch.ones(1, 1, dtype=dtype).expand(rows, 1), torch.ones(1, cols, dtype=dtype)
    nothing = torch.empty(rows, 0, dtype=dtype), torch.empty(0, cols, dtype=dtype)
    raw_matmul(isa, *nothing, s, l, y.expand(rows, cols), seed=seed, threshold=threshold, threads=2)
    keep = reference.keep_mask(seed, 1, cols, threshold / 65536, row_offset=rows - 1)
    assert torch.equal(y, keep.to(dtype))
