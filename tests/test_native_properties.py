"""Random shapes, strides, masks and threads for every operation, and the wide sweep of sizes."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lora_fused import reference
from tests.native import (
    DTYPES,
    ISAS,
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
    repeats,
    shrink,
    shrink_reduce,
)

pytestmark = needs_native

DISTINCT = [layout for layout in LAYOUTS if not layout.startswith("one")]


@dataclass(frozen=True)
class Problem:
    """M tokens, `wide` features (K or N), another number of features, R rank."""

    isa: str
    dtype: torch.dtype
    M: int
    wide: int
    other: int
    R: int
    layout: str
    other_layout: str
    adapter_layout: str
    threshold: int
    threads: int
    seed: int

    def again(self, outputs: int) -> Iterator["Problem"]:
        """The problem with other data, more often the fewer its outputs: see Comparison."""
        for i in repeats(outputs):
            yield replace(self, seed=self.seed + 10 * i)

    def normal(self, rows: int, cols: int, which: int, divide_by: int = 1) -> Tensor:
        return normal(rows, cols, self.dtype, self.seed + which, divide_by)

    def keep(self, rows: int, cols: int) -> Tensor | None:
        if self.threshold == 0:
            return None
        return reference.keep_mask(self.seed, rows, cols, self.threshold / 65536)

    @property
    def options(self) -> dict[str, int]:
        return {"seed": self.seed, "threshold": self.threshold, "threads": self.threads}


def size(limit: int) -> st.SearchStrategy[int]:
    """Sizes up to a limit, often at or beside a multiple of 16."""
    near = st.builds(lambda m, d: max(0, min(limit, 16 * m + d)), st.integers(0, limit // 16),
                     st.integers(-1, 1))  # fmt: skip
    return st.one_of(st.integers(0, limit), near)


problems = st.builds(
    Problem,
    isa=st.sampled_from(ISAS or [""]),
    dtype=st.sampled_from(DTYPES),
    M=size(100),
    wide=size(600),
    other=size(300),
    R=size(70),
    layout=st.sampled_from(DISTINCT),
    other_layout=st.sampled_from(DISTINCT),
    adapter_layout=st.sampled_from(DISTINCT),
    threshold=st.sampled_from([0, 0, 1, 3277, 32768, 65535, 65536]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1 << 40),
)
random_problems = given(problem=problems)
deterministic = settings(deadline=None, derandomize=True, max_examples=150)


@deterministic
@random_problems
def test_matmul(problem: Problem) -> None:
    M, K, N, R = problem.M, problem.wide, problem.other, problem.R
    compared = Comparison(product, problem.dtype)
    for p in problem.again(M * N):
        x = place(p.normal(M, K, 0), p.layout)
        w = place(p.normal(N, K, 1, K), p.other_layout).t()
        s, l = p.normal(M, R, 2), place(p.normal(N, R, 3, R), p.adapter_layout).t()
        bias, initial = p.normal(1, N, 4)[0], p.normal(M, N, 5)
        packed = pack(p.isa, w) if p.seed % 2 else None
        y = matmul(p.isa, x, w, s, l, bias=bias, initial=initial, packed=packed, **p.options)
        compared.add(y, x, w, s, l, bias, initial, keep=p.keep(M, N))
    compared.check("y")


@each_isa
@each_dtype
@pytest.mark.parametrize("threshold", [0, 3277])
def test_few_tokens_read_weight_and_adapter_either_way(
    isa: str, dtype: torch.dtype, threshold: int
) -> None:
    """Ranks below, at and beyond a block of the kernels, columns that fill no vector."""
    K, N = 300, 70
    lies = ("contiguous", "columns")
    for M, R in itertools.product((1, 2, 3, 4, 5, 8, 9, 16, 17), (1, 31, 32, 33, 70)):
        compared = Comparison(product, dtype)
        for i, (of_w, of_l) in itertools.product(repeats(M * N), itertools.product(lies, lies)):
            x, s = normal(M, K, dtype, 10 * i), normal(M, R, dtype, 10 * i + 2)
            w = place(normal(N, K, dtype, 10 * i + 1, K), of_w).t()
            l = place(normal(N, R, dtype, 10 * i + 3, R), of_l).t()
            y = matmul(isa, x, w, s, l, seed=i, threshold=threshold)
            keep = reference.keep_mask(i, M, N, threshold / 65536) if threshold else None
            compared.add(y, x, w, s, l, keep=keep)
        compared.check(f"y, M = {M}, R = {R}")


@deterministic
@random_problems
def test_shrink(problem: Problem) -> None:
    M, K, R = problem.M, problem.wide, problem.R

    def formula(x: Tensor, a: Tensor, keep: Tensor | None = None) -> Tensor:
        return 2 * ((x if keep is None else x * keep) @ a.t())

    compared = Comparison(formula, problem.dtype)
    for p in problem.again(M * R):
        x, a = place(p.normal(M, K, 0), p.layout), place(p.normal(R, K, 1, K), p.other_layout)
        compared.add(shrink(p.isa, x, a, 2.0, **p.options), x, a, keep=p.keep(M, K))
    compared.check("s")


@deterministic
@random_problems
@pytest.mark.parametrize("fp32", [False, True])
def test_reduce(problem: Problem, fp32: bool) -> None:
    M, K, R = problem.M, problem.wide, problem.R

    def formula(ds: Tensor, x: Tensor, keep: Tensor | None = None) -> Tensor:
        return ds.t() @ (x if keep is None else x * keep)

    out_dtype = torch.float32 if fp32 else problem.dtype
    compared = Comparison(formula, out_dtype)
    for p in problem.again(R * K):
        x, ds = place(p.normal(M, K, 0), p.layout), p.normal(M, R, 1, M)
        da = reduce(p.isa, ds, x, out_dtype, columns=p.other_layout == "columns", **p.options)
        compared.add(da, ds, x, keep=p.keep(M, K))
    compared.check("da")


@deterministic
@random_problems
def test_shrink_reduce(problem: Problem) -> None:
    M, N, R = problem.M, problem.wide, problem.R
    compared_ds = Comparison(lambda dy, b: 0.5 * (dy @ b), problem.dtype)
    compared_db = Comparison(lambda dy, s: dy.t() @ s, problem.dtype)
    for p in problem.again(min(M, N) * R):
        dy = place(p.normal(M, N, 0), p.layout)
        b, s = place(p.normal(N, R, 1, N), p.other_layout), p.normal(M, R, 2, M)
        options = {"threads": p.threads, "db_columns": p.layout == "columns"}
        for want_ds, db_dtype in ((True, None), (False, p.dtype), (True, p.dtype)):
            ds, db = shrink_reduce(
                p.isa, dy, b, s, 0.5, want_ds=want_ds, db_dtype=db_dtype, **options
            )
            assert (ds is not None) == want_ds and (db is not None) == (db_dtype is not None)
            if ds is not None:
                compared_ds.add(ds, dy, b)
            if db is not None:
                compared_db.add(db, dy, s)
    compared_ds.check("ds")
    compared_db.check("db")


@pytest.mark.full
@each_isa
@each_dtype
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("M", [1, 2, 4, 5, 13, 14, 15, 28, 31, 32, 33, 64, 127])
def test_wide_sweep(isa: str, dtype: torch.dtype, across: bool, M: int) -> None:
    """Sizes near the ends of tiles, panels, strips and blocks, in all combinations."""
    ranks = itertools.cycle((0, 1, 16, 33, 3))
    for N, R in zip((1, 15, 16, 31, 33, 64, 65, 127, 129, 257), ranks, strict=False):
        compared = Comparison(product, dtype)
        for K in (1, 2, 15, 16, 17, 31, 33, 64, 127, 255, 1023, 1025):
            x, w = normal(M, K, dtype, 1), normal(N, K, dtype, 2, K).t()
            s, l = normal(M, R, dtype, 3), normal(N, R, dtype, 4, R).t()
            if across:
                w, l = w.contiguous(), l.contiguous()
            compared.add(matmul(isa, x, w, s, l), x, w, s, l)
            compared.add(matmul(isa, x, w, s, l, packed=pack(isa, w)), x, w, s, l)
        compared.check(f"N={N} R={R}")


@pytest.mark.full
@each_isa
@each_dtype
@pytest.mark.parametrize(
    "M, K, N, R",
    [(4096, 768, 2304, 16), (129, 9000, 1100, 64), (2048, 2048, 512, 8), (8192, 300, 300, 16)],
)
def test_real_sizes(isa: str, dtype: torch.dtype, M: int, K: int, N: int, R: int) -> None:
    """Sums over thousands of terms: every output of a layer."""
    x, dy, w = normal(M, K, dtype, 1), normal(M, N, dtype, 2), normal(N, K, dtype, 3, K)
    a, b = normal(R, K, dtype, 4, K), normal(N, R, dtype, 5, R)
    s = shrink(isa, x, a, threads=2)
    check("s", s, lambda x, a: x @ a.t(), x, a)
    check("y", matmul(isa, x, w.t(), s, b.t(), threads=2), product, x, w.t(), s, b.t())
    ds, db = shrink_reduce(isa, dy, b, s, db_dtype=dtype, threads=2)
    assert ds is not None and db is not None
    check("ds", ds, lambda dy, b: dy @ b, dy, b)
    check("db", db, lambda dy, s: dy.t() @ s, dy, s)
    check("dx", matmul(isa, dy, w, ds, a, threads=2), product, dy, w, ds, a)
    da = reduce(isa, ds, x, dtype, threads=2)
    check("da", da, lambda ds, x: ds.t() @ x, ds, x)
    truth = ds.t().double() @ x.double()
    error = reduce(isa, ds, x, torch.float32, threads=2) - truth
    assert error.abs().max() <= 2e-6 * truth.abs().max(), "not accumulated in fp32"
