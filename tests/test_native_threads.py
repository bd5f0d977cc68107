"""Threads: the same bits for any number of them, OpenMP's and Python's."""

import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.native import (
    ISAS,
    each_dtype,
    each_isa,
    matmul,
    needs_native,
    normal,
    pack,
    raw_matmul,
    reduce,
    shrink,
    shrink_reduce,
)

pytestmark = needs_native

THREADS = (2, 3, 5)
MASK = {"seed": 99, "threshold": 20000}


def assert_same_for_all_threads(run: Callable[[int], Tensor]) -> None:
    alone = run(1)
    for threads in THREADS:
        assert torch.equal(run(threads), alone), f"{threads} threads"


@each_isa
@each_dtype
@pytest.mark.parametrize(
    "M, K, N, R",
    [(1, 70, 40, 3), (4, 300, 1100, 9), (16, 2100, 50, 3), (30, 8, 700, 2), (33, 70, 60, 3),
     (7, 130, 515, 4), (61, 1100, 140, 33), (90, 40, 1030, 0)],
)  # fmt: skip
def test_matmul(isa: str, dtype: torch.dtype, M: int, K: int, N: int, R: int) -> None:
    x, w = normal(M, K, dtype, 1), normal(N, K, dtype, 2, K).t()
    s, l = normal(M, R, dtype, 3), normal(N, R, dtype, 4).t()
    panels = pack(isa, w)
    across = w.contiguous(), s, l.contiguous()
    columns = normal(K, M, dtype, 1).t()
    assert_same_for_all_threads(lambda threads: pack(isa, w, threads=threads))
    assert_same_for_all_threads(lambda threads: matmul(isa, x, w, s, l, threads=threads))
    assert_same_for_all_threads(
        lambda threads: matmul(isa, x, w, s, l, packed=panels, threads=threads)
    )
    assert_same_for_all_threads(lambda threads: matmul(isa, x, *across, threads=threads))
    assert_same_for_all_threads(lambda threads: matmul(isa, x, w, s, l, threads=threads, **MASK))
    assert_same_for_all_threads(lambda threads: matmul(isa, columns, w, s, l, threads=threads))


@each_isa
@each_dtype
@pytest.mark.parametrize(
    "M, K, R",
    [(1, 70, 3), (4, 1100, 9), (16, 2100, 16), (33, 700, 8), (130, 517, 70), (600, 1000, 16)],
)
def test_skinny_operations(isa: str, dtype: torch.dtype, M: int, K: int, R: int) -> None:
    x, a = normal(M, K, dtype, 1), normal(R, K, dtype, 2, K)
    ds, b = normal(M, R, dtype, 3), normal(K, R, dtype, 4)

    def both(threads: int) -> Tensor:
        gradients = shrink_reduce(isa, x, b, ds, db_dtype=dtype, threads=threads)
        return torch.cat([t for t in gradients if t is not None])

    assert_same_for_all_threads(both)
    for mask in ({}, MASK):
        assert_same_for_all_threads(lambda n, mask=mask: shrink(isa, x, a, threads=n, **mask))
        assert_same_for_all_threads(
            lambda n, mask=mask: reduce(isa, ds, x, torch.float32, threads=n, **mask)
        )


@each_isa
@each_dtype
@pytest.mark.parametrize("masked", [False, True])
def test_a_row_does_not_depend_on_the_other_rows(
    isa: str, dtype: torch.dtype, masked: bool
) -> None:
    """Within the blocked kernels: for matmul from 33 rows on, or 9 where N > 64 (and K > 16).

    Fewer rows take kernels that add in another order. A mask depends on the row's number, so with
    one the rows that stay are the first ones.
    """
    M, K, N, R = 700, 2500, 70, 5
    x, w = normal(M, K, dtype, 1), normal(N, K, dtype, 2, K).t()
    s, l, a = normal(M, R, dtype, 3), normal(N, R, dtype, 4).t(), normal(R, K, dtype, 5, K)
    mask = MASK if masked else {}
    y, sums = matmul(isa, x, w, s, l, **mask), shrink(isa, x, a, **mask)
    for rows in (torch.arange(9), torch.arange(33), torch.arange(333), torch.randperm(M)):
        if masked and len(rows) == M:
            continue
        assert torch.equal(matmul(isa, x[rows], w, s[rows], l, **mask), y[rows])
        if len(rows) > 32:
            assert torch.equal(shrink(isa, x[rows], a, **mask), sums[rows])


@each_dtype
def test_two_python_threads_at_once(dtype: torch.dtype) -> None:
    isa = ISAS[-1]
    problems = [
        (
            normal(40 + i, 300, dtype, i),
            normal(130, 300, dtype, i + 9).t(),
            normal(9, 300, dtype, i),
        )
        for i in range(4)
    ]
    expected = [(matmul(isa, x, w), shrink(isa, x, a)) for x, w, a in problems]
    wrong: list[int] = []

    def work(i: int) -> None:
        x, w, a = problems[i]
        for _ in range(30):
            y, s = matmul(isa, x, w, threads=2), shrink(isa, x, a, threads=2)
            if not (torch.equal(y, expected[i][0]) and torch.equal(s, expected[i][1])):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_interpreter_runs_meanwhile() -> None:
    """The interpreter lock is released: Python ticks while a long call runs."""
    rows, cols = 4000, 1 << 18
    y, s, l = torch.empty(1, cols), torch.ones(1, 1), torch.ones(1, cols)
    nothing = torch.empty(rows, 0), torch.empty(0, cols)
    call = threading.Thread(
        target=raw_matmul,
        args=(ISAS[-1], *nothing, s.expand(rows, 1), l, y.expand(rows, cols)),
    )
    ticks = 0
    call.start()
    while call.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert (y == 1).all()
    assert ticks > 10
