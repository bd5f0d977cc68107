"""Where the kernels read and write: strides, edges, what is not a number."""

import itertools

import pytest
import torch
from torch import Tensor

from lora_fused import reference
from tests.native import (
    LAYOUTS,
    Comparison,
    check,
    each_dtype,
    each_isa,
    matmul,
    needs_native,
    normal,
    pack,
    place,
    product,
    reduce,
    shrink,
    shrink_reduce,
)

pytestmark = needs_native

SEED, THRESHOLD = 4321, 20000
SIZES = [(3, 40, 70, 5), (37, 75, 90, 6), (40, 64, 50, 3)]  # M, K, N, R
each_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))


@each_isa
@each_dtype
@each_size
def test_matmul_with_any_strides(
    isa: str, dtype: torch.dtype, size: tuple[int, int, int, int]
) -> None:
    M, K, N, R = size
    s = normal(M, R, dtype, 3)
    for x_layout in LAYOUTS:
        compared = Comparison(product, dtype)
        x = place(normal(M, K, dtype, 1), x_layout)
        for w_layout in LAYOUTS:
            w = place(normal(N, K, dtype, 2, K), w_layout).t()
            l = place(normal(N, R, dtype, 4, R), w_layout).t()
            compared.add(matmul(isa, x, w, s, l, row_gap=1), x, w, s, l)
            if x_layout == "contiguous":
                compared.add(matmul(isa, x, w, s, l, packed=pack(isa, w)), x, w, s, l)
        compared.check(f"y, x {x_layout}")


@each_isa
@each_dtype
@each_size
@pytest.mark.parametrize("threshold", [0, THRESHOLD])
def test_skinny_operations_with_any_strides(
    isa: str, dtype: torch.dtype, size: tuple[int, int, int, int], threshold: int
) -> None:
    M, K, _, R = size
    keep = reference.keep_mask(SEED, M, K, threshold / 65536).to(torch.float64)
    options = {"seed": SEED, "threshold": threshold}
    all_s = Comparison(lambda x, a: 0.5 * (x * keep.to(x.dtype)) @ a.t(), dtype)
    all_ds = Comparison(lambda x, b: 0.5 * x @ b, dtype)
    all_da = Comparison(lambda ds, x: ds.t() @ (x * keep.to(x.dtype)), torch.float32)
    all_db = Comparison(lambda x, ds: x.t() @ ds, torch.float32)
    for i, (layout, other) in enumerate(
        itertools.product(LAYOUTS, ("contiguous", "columns", "strided"))
    ):
        x = place(normal(M, K, dtype, 10 * i + 1), layout)
        a = place(normal(R, K, dtype, 10 * i + 2, K), other)
        all_s.add(shrink(isa, x, a, 0.5, **options), x, a)
        ds = normal(M, R, dtype, 10 * i + 3, M)
        da = reduce(isa, ds, x, torch.float32, columns=other == "columns", **options)
        all_da.add(da, ds, x)
        if threshold == 0:
            b = place(normal(K, R, dtype, 10 * i + 4, R), other)
            got, db = shrink_reduce(isa, x, b, ds, 0.5, db_dtype=torch.float32)
            assert got is not None and db is not None
            all_ds.add(got, x, b)
            all_db.add(db, x, ds)
    all_s.check("s")
    all_da.check("da")
    if threshold == 0:
        all_ds.check("ds")
        all_db.check("db")


@each_isa
@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "columns", "strided"])
def test_gradients_of_many_tokens_from_dy_with_any_strides(
    isa: str, dtype: torch.dtype, layout: str
) -> None:
    """Several blocks of tokens: what one block packed must still be there for the next."""
    M, N, R = 150, 4200, 6
    dy = place(normal(M, N, dtype, 1, N), layout)
    b, s = normal(N, R, dtype, 2), normal(M, R, dtype, 3, M)
    ds, db = shrink_reduce(isa, dy, b, s, db_dtype=torch.float32)
    assert ds is not None and db is not None
    check("ds", ds, lambda dy, b: dy @ b, dy, b)
    check("db", db, lambda dy, s: dy.t() @ s, dy, s)


def poisoned(t: Tensor, row: int, col: int, value: float) -> Tensor:
    t = t.clone()
    t[row, col] = value
    return t


def assert_spoils(
    got: Tensor | None, clean: Tensor | None, row: int | None = None, col: int | None = None
) -> None:
    """Not finite in exactly this row or column; everywhere else the same bits as without it."""
    assert got is not None and clean is not None and clean.isfinite().all()
    expected = torch.zeros(got.shape, dtype=torch.bool)
    expected[slice(None) if row is None else row, slice(None) if col is None else col] = True
    assert torch.equal(~got.isfinite(), expected)
    assert torch.equal(got[~expected], clean[~expected])


not_finite = pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
few_and_many = pytest.mark.parametrize("M", [1, 3, 5, 37])


@each_isa
@each_dtype
@not_finite
@few_and_many
def test_what_is_not_finite_spoils_its_row_or_column_of_y(
    isa: str, dtype: torch.dtype, value: float, M: int
) -> None:
    """At an edge, where a padding zero beside it would spread it further."""
    N, R, row = 70, 3, M - 1
    for K, across in itertools.product((9, 33, 64), (False, True)):
        x, w = normal(M, K, dtype, 1), normal(N, K, dtype, 2, K).t()
        s, l = normal(M, R, dtype, 3), normal(N, R, dtype, 4).t()
        if across:
            w, l = w.contiguous(), l.contiguous()
        y = matmul(isa, x, w, s, l)
        for k in (0, K - 1):
            bad_x, bad_w = poisoned(x, row, k, value), poisoned(w, k, N - 1, value)
            assert_spoils(matmul(isa, bad_x, w, s, l), y, row=row)
            assert_spoils(matmul(isa, x, bad_w, s, l), y, col=N - 1)
        assert_spoils(matmul(isa, x, w, poisoned(s, row, R - 1, value), l), y, row=row)
        assert_spoils(matmul(isa, x, w, s, poisoned(l, R - 1, N - 1, value)), y, col=N - 1)


@each_isa
@each_dtype
@not_finite
@few_and_many
@pytest.mark.parametrize("K", [9, 33, 64])
def test_what_is_not_finite_spoils_its_row_or_column_of_the_gradients(
    isa: str, dtype: torch.dtype, value: float, M: int, K: int
) -> None:
    R, row, col = 3, M - 1, K - 1
    x, a = normal(M, K, dtype, 1), normal(R, K, dtype, 2, K)
    b, ds = normal(K, R, dtype, 3), normal(M, R, dtype, 4)
    bad_x = poisoned(x, row, col, value)
    s, da = shrink(isa, x, a), reduce(isa, ds, x, dtype)
    assert_spoils(shrink(isa, bad_x, a), s, row=row)
    assert_spoils(shrink(isa, x, poisoned(a, R - 1, col, value)), s, col=R - 1)
    assert_spoils(reduce(isa, ds, bad_x, dtype), da, col=col)
    assert_spoils(reduce(isa, poisoned(ds, row, 0, value), x, dtype), da, row=0)
    clean_ds, clean_db = shrink_reduce(isa, x, b, ds, db_dtype=dtype)
    bad_ds, bad_db = shrink_reduce(isa, bad_x, b, ds, db_dtype=dtype)
    assert_spoils(bad_ds, clean_ds, row=row)
    assert_spoils(bad_db, clean_db, row=col)


@each_isa
@each_dtype
@few_and_many
def test_what_the_mask_drops_is_zero_even_if_it_is_not_finite(
    isa: str, dtype: torch.dtype, M: int
) -> None:
    K, R = 75, 3
    options = {"seed": SEED, "threshold": THRESHOLD}
    keep = reference.keep_mask(SEED, M, K, THRESHOLD / 65536)
    x, a = normal(M, K, dtype, 1), normal(R, K, dtype, 2, K)
    ds, bad_x = normal(M, R, dtype, 3), x.masked_fill(~keep, torch.nan)
    assert torch.equal(shrink(isa, bad_x, a, **options), shrink(isa, x, a, **options))
    assert torch.equal(
        reduce(isa, ds, bad_x, dtype, **options), reduce(isa, ds, x, dtype, **options)
    )
