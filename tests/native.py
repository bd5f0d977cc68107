"""lora_fused._C on tensors, for the tests.

Every output of a checked call lies in a larger buffer: the elements of the output are NaN before
the call, so that one left unwritten shows in the comparison that follows, and those around it must
be untouched after it. Inputs must be untouched as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fused.backends import cpu
from lora_fused.testing import assert_close_to_ref
from tests.conftest import native_isas

ISAS = native_isas()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
GUARD = 77.0
MARGIN = 64  # elements before and behind an output

needs_native = pytest.mark.skipif(not ISAS, reason="the native kernels are not built or cannot run")
each_isa = pytest.mark.parametrize("isa", ISAS or [pytest.param("none", marks=needs_native)])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])


def module() -> Any:
    return cpu.native()


@contextmanager
def guarded(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Iterator[Tensor]:
    """An output, all NaN, in a buffer whose other elements must not change."""
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    count = last + 1 if 0 not in shape else 0
    buffer = torch.full((count + 2 * MARGIN,), GUARD, dtype=dtype)
    out = buffer.as_strided(shape, strides, MARGIN).fill_(torch.nan)
    yield out
    around = buffer.clone()
    around.as_strided(shape, strides, MARGIN).fill_(GUARD)
    changed = (around != GUARD).nonzero().flatten()
    assert changed.numel() == 0, f"written outside the output: {changed[:8].tolist()}"


@contextmanager
def unchanged(*inputs: Tensor | None) -> Iterator[None]:
    """The inputs must have the same bits afterwards, NaN included."""
    given = [t for t in inputs if t is not None]
    before = [_bits(t) for t in given]
    yield
    for old, t in zip(before, given, strict=True):
        assert torch.equal(old, _bits(t)), "an input was modified"


def _bits(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format).view(
        torch.int32 if t.dtype == torch.float32 else torch.int16
    )


def raw_matmul(
    isa: str,
    x: Tensor,
    w: Tensor,
    s: Tensor | None,
    l: Tensor | None,
    y: Tensor,
    *,
    bias: Tensor | None = None,
    accumulate: bool = False,
    seed: int = 0,
    threshold: int = 0,
    packed: Tensor | None = None,
    threads: int = 1,
) -> None:
    """_C.matmul with w [K, N] and l [R, N] as logical operands, without checks."""
    (M, K), N = x.shape, w.shape[1]
    rank = (0, 0, 0, 0, 0, 0)
    if s is not None and l is not None:
        rank = (s.shape[1], s.data_ptr(), s.stride(0), l.data_ptr(), *l.stride())
    module().matmul(
        isa, CODES[x.dtype], M, N, K, rank[0], x.data_ptr(), *x.stride(), w.data_ptr(), *w.stride(),
        0 if packed is None else packed.data_ptr(), *rank[1:],
        0 if bias is None else bias.data_ptr(), accumulate, seed, threshold,
        y.data_ptr(), y.stride(0), threads,
    )  # fmt: skip


def matmul(
    isa: str,
    x: Tensor,
    w: Tensor,
    s: Tensor | None = None,
    l: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    row_gap: int = 3,
    **options: Any,
) -> Tensor:
    """Checked. `initial` is what y holds before; it asks for accumulation."""
    M, N = x.shape[0], w.shape[1]
    with guarded((M, N), (N + row_gap, 1), x.dtype) as y, unchanged(x, w, s, l):
        if initial is not None:
            y.copy_(initial)
        raw_matmul(isa, x, w, s, l, y, accumulate=initial is not None, **options)
    return y


def pack(isa: str, w: Tensor, threads: int = 1) -> Tensor:
    """Checked. The panels of the logical operand w [K, N], 64-byte aligned."""
    K, N = w.shape
    size = module().packed_bytes(isa, CODES[w.dtype], K, N)
    buffer = torch.full((size + 128,), 0xAB, dtype=torch.uint8)
    start = 64 - buffer.data_ptr() % 64
    panels = buffer[start : start + size]
    with unchanged(w):
        module().pack(
            isa, CODES[w.dtype], K, N, w.data_ptr(), *w.stride(), panels.data_ptr(), threads
        )
    assert (buffer[:start] == 0xAB).all() and (buffer[start + size :] == 0xAB).all()
    return panels


def shrink(
    isa: str,
    x: Tensor,
    a: Tensor,
    scale: float = 1.0,
    *,
    seed: int = 0,
    threshold: int = 0,
    threads: int = 1,
) -> Tensor:
    """Checked. s [M, R] of x [M, K] and a [R, K]."""
    (M, K), R = x.shape, a.shape[0]
    with guarded((M, R), (R, 1), x.dtype) as s, unchanged(x, a):
        module().shrink(
            isa, CODES[x.dtype], M, K, R, x.data_ptr(), *x.stride(), a.data_ptr(), *a.stride(),
            scale, seed, threshold, s.data_ptr(), threads,
        )  # fmt: skip
    return s


def shrink_reduce(
    isa: str,
    dy: Tensor,
    b: Tensor,
    s: Tensor,
    scale: float = 1.0,
    *,
    want_ds: bool = True,
    db_dtype: torch.dtype | None = None,
    db_columns: bool = False,
    threads: int = 1,
) -> tuple[Tensor | None, Tensor | None]:
    """Checked. ds [M, R] and db [N, R] (None: not wanted; db_columns: column major)."""
    (M, N), R = dy.shape, b.shape[1]
    db_strides = (1, N + 2) if db_columns else (R + 1, 1)
    with (
        guarded((M, R), (R, 1), dy.dtype) as ds,
        guarded((N, R), db_strides, db_dtype or dy.dtype) as db,
        unchanged(dy, b, s),
    ):
        module().shrink_reduce(
            isa, CODES[dy.dtype], M, N, R, dy.data_ptr(), *dy.stride(), b.data_ptr(), *b.stride(),
            scale, ds.data_ptr() if want_ds else 0, s.data_ptr(),
            db.data_ptr() if db_dtype else 0, CODES[db.dtype], *db_strides, threads,
        )  # fmt: skip
    return (ds if want_ds else None), (db if db_dtype else None)


def reduce(
    isa: str,
    ds: Tensor,
    x: Tensor,
    out_dtype: torch.dtype,
    *,
    seed: int = 0,
    threshold: int = 0,
    columns: bool = False,
    threads: int = 1,
) -> Tensor:
    """Checked. da [R, K] of ds [M, R] and x [M, K]; `columns`: column major."""
    (M, K), R = x.shape, ds.shape[1]
    strides = (1, R + 2) if columns else (K + 1, 1)
    with guarded((R, K), strides, out_dtype) as da, unchanged(ds, x):
        module().reduce(
            isa, CODES[x.dtype], M, K, R, ds.data_ptr(), x.data_ptr(), *x.stride(), seed, threshold,
            da.data_ptr(), CODES[out_dtype], *strides, threads,
        )  # fmt: skip
    return da


def keep_mask(isa: str, seed: int, threshold: int, M: int, K: int) -> Tensor:
    """Checked. The generator's mask as bool [M, K]."""
    buffer = torch.full((M * K + 2 * MARGIN,), 0xAB, dtype=torch.uint8)
    mask = buffer[MARGIN : MARGIN + M * K]
    module().keep_mask(isa, seed, threshold, M, K, mask.data_ptr())
    assert (buffer[:MARGIN] == 0xAB).all() and (buffer[MARGIN + M * K :] == 0xAB).all()
    assert (mask <= 1).all()
    return mask.bool().view(M, K)


LAYOUTS = (
    "contiguous", "gap", "odd gap", "odd start", "far", "columns", "strided",
    "one row", "one column", "one value",
)  # fmt: skip


def place(values: Tensor, layout: str = "contiguous") -> Tensor:
    """The values in another memory layout, with NaN in every element that belongs to nobody.

    The last three layouts repeat the first row, column or value by a stride of 0.
    """
    rows, cols = values.shape
    if layout == "one row":
        return place(values[:1]).expand(rows, cols) if rows else values
    if layout == "one column":
        return place(values[:, :1]).expand(rows, cols) if cols else values
    if layout == "one value":
        return place(values[:1, :1]).expand(rows, cols) if values.numel() else values
    strides = {
        "contiguous": (cols, 1),
        "gap": (cols + cols % 2 + 6, 1),
        "odd gap": (cols + 1 - cols % 2 + 4, 1),
        "odd start": (cols + cols % 2, 1),
        "far": (cols + 5000, 1),
        "columns": (1, rows + 3),
        "strided": (3 * cols + 1, 3),
    }[layout]
    count = max(rows - 1, 0) * strides[0] + max(cols - 1, 0) * strides[1] + 1
    buffer = torch.full((count + 2 * MARGIN,), torch.nan, dtype=values.dtype)
    start = MARGIN + (layout == "odd start")
    return buffer.as_strided((rows, cols), strides, start).copy_(values)


def normal(rows: int, cols: int, dtype: torch.dtype, seed: int, divide_by: int = 1) -> Tensor:
    """randn / sqrt(divide_by): sums over `divide_by` products stay of order one."""
    generator = torch.Generator().manual_seed(seed * 7919 + rows * 31 + cols)
    values = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    return (values / max(divide_by, 1) ** 0.5).to(dtype)


def repeats(outputs: int) -> range:
    """How many problems of one shape are judged together: see Comparison."""
    return range(max(1, min(64, 256 // max(outputs, 1))))


Formula = Callable[..., Tensor]


def product(
    x: Tensor,
    w: Tensor,
    s: Tensor | None = None,
    l: Tensor | None = None,
    bias: Tensor | None = None,
    initial: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """What matmul computes, by torch in the dtype of its inputs."""
    y = x @ w
    if s is not None and l is not None:
        y = y + (s @ l if keep is None else (s @ l) * keep)
    for term in (bias, initial):
        y = y if term is None else y + term
    return y


class Comparison:
    """Results against their formula by the 2x rule; those added are judged together.

    Several tiny problems are judged as one, where a baseline exact by luck would decide.
    """

    def __init__(self, formula: Formula, out_dtype: torch.dtype) -> None:
        self.formula, self.out_dtype = formula, out_dtype
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, got: Tensor, *tensors: Tensor | None, keep: Tensor | None = None) -> None:
        def by(dtype: torch.dtype) -> Tensor:
            # Contiguous: torch's own bf16 matmul lets NaN in between two rows of x into y.
            cast = [t if t is None else t.to(dtype).contiguous() for t in tensors]
            mask = {} if keep is None else {"keep": keep}
            return self.formula(*cast, **mask)

        baseline = by(self.out_dtype)
        self.rows.append((got.flatten(), by(torch.float64).flatten(), baseline.flatten()))

    def check(self, name: str) -> None:
        got, truth, baseline = (torch.cat(parts) for parts in zip(*self.rows, strict=True))
        assert_close_to_ref(name, got, truth, baseline)


def check(
    name: str, got: Tensor, formula: Formula, *tensors: Tensor | None, keep: Tensor | None = None
) -> None:
    """One result against its formula by the 2x rule, shape included."""
    assert got.shape == formula(*tensors).shape
    comparison = Comparison(formula, got.dtype)
    comparison.add(got, *tensors, keep=keep)
    comparison.check(name)
