"""Every entry of lora_fused._C, on every instruction set and dtype, against float64."""

import functools
import math

import pytest
import torch
from torch import Tensor

from lora_fused import reference
from tests.native import (
    CODES,
    Comparison,
    check,
    each_dtype,
    each_isa,
    keep_mask,
    matmul,
    module,
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

SEED = (11 << 40) + 12345
THRESHOLDS = [0, 6554, 65536]

# Sizes at which a kernel, a tile, a panel, a strip or a block ends, and one off them.
SHAPES = [  # M, K, N, R
    (0, 5, 7, 2), (3, 0, 7, 2), (3, 5, 0, 2), (3, 0, 7, 0), (7, 0, 200, 3),
    (1, 1, 1, 1), (1, 33, 1, 0), (2, 16, 31, 3), (3, 17, 32, 16), (4, 130, 33, 1),
    (1, 2049, 40, 3), (4, 4099, 9, 16), (5, 100, 65, 3), (5, 64, 64, 33), (32, 100, 64, 3),
    (33, 100, 64, 16), (32, 77, 65, 200), (14, 16, 100, 0), (15, 17, 128, 1), (6, 31, 129, 33),
    (29, 1024, 70, 16), (31, 1025, 131, 3), (37, 2051, 70, 0), (9, 4100, 90, 3), (40, 129, 515, 16),
    (65, 33, 1030, 200),
]  # fmt: skip


def name_of(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


each_shape = pytest.mark.parametrize("shape", SHAPES, ids=name_of)


@functools.cache
def mask(rows: int, cols: int, threshold: int) -> Tensor:
    return reference.keep_mask(SEED, rows, cols, threshold / 65536)


def keep_of(rows: int, cols: int, threshold: int) -> Tensor | None:
    return mask(rows, cols, threshold) if threshold else None


def rank_term(M: int, N: int, R: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    return normal(M, R, dtype, seed + 2), normal(N, R, dtype, seed + 3, R).t()


@each_isa
@each_dtype
@each_shape
def test_matmul(isa: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    """Plain and prepacked, the weight contiguous along the contraction (forward) or across it."""
    M, K, N, R = shape
    for across in (False, True):
        compared = Comparison(product, dtype)
        for seed in repeats(M * N):
            x = normal(M, K, dtype, seed)
            w = place(normal(N, K, dtype, seed + 1, K)).t()
            w = w.contiguous() if across else w
            s, l = rank_term(M, N, R, dtype, seed)
            l = l.contiguous() if across else l
            bias = normal(1, N, dtype, seed + 4)[0] if seed % 2 == 0 else None
            y = matmul(isa, x, w, s, l, bias=bias)
            compared.add(y, x, w, s, l, bias)
            again = matmul(isa, x, w, s, l, bias=bias, packed=pack(isa, w))
            compared.add(again, x, w, s, l, bias)
        compared.check("y")


@each_isa
@each_dtype
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize(
    "shape", [(1, 40, 13, 3), (4, 33, 140, 16), (5, 70, 300, 33), (40, 100, 137, 8)], ids=name_of
)
@pytest.mark.parametrize("across", [False, True])
def test_matmul_masks_the_rank_term_alone(
    isa: str, dtype: torch.dtype, threshold: int, shape: tuple[int, int, int, int], across: bool
) -> None:
    M, K, N, R = shape
    keep = keep_of(M, N, threshold)
    compared = Comparison(product, dtype)
    for seed in repeats(M * N):
        x, w = normal(M, K, dtype, seed), normal(N, K, dtype, seed + 1, K).t()
        s, l = rank_term(M, N, R, dtype, seed)
        if across:
            w, l = w.contiguous(), l.contiguous()
        y = matmul(isa, x, w, s, l, seed=SEED, threshold=threshold)
        compared.add(y, x, w, s, l, keep=keep)
    compared.check("y")


@each_isa
@each_dtype
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize(
    "shape", [(1, 0, 40, 3), (3, 0, 300, 16), (40, 0, 130, 1), (50, 0, 70, 33), (20, 30, 90, 5)],
    ids=name_of,
)  # fmt: skip
def test_accumulate_and_expand(
    isa: str, dtype: torch.dtype, threshold: int, shape: tuple[int, int, int, int]
) -> None:
    """y += x w + s l; with K = 0 this is what follows the vendor's GEMM."""
    M, K, N, R = shape
    keep = keep_of(M, N, threshold)
    for across in (False, True):
        compared = Comparison(product, dtype)
        for seed in repeats(M * N):
            x, w = normal(M, K, dtype, seed), normal(N, K, dtype, seed + 1, K).t()
            s, l = rank_term(M, N, R, dtype, seed)
            l = l.contiguous() if across else l
            initial = normal(M, N, dtype, seed + 5)
            y = matmul(isa, x, w, s, l, initial=initial, seed=SEED, threshold=threshold)
            compared.add(y, x, w, s, l, None, initial, keep=keep)
        compared.check("y")


SKINNY = [  # M, K, R
    (0, 5, 2), (3, 0, 2), (3, 5, 0), (20, 0, 2), (20, 5, 0), (1, 1, 1), (1, 100, 3), (4, 33, 16),
    (5, 65, 8), (16, 40, 33), (17, 41, 16), (32, 70, 64), (33, 70, 65), (15, 2100, 3), (50, 1030, 200),
    (130, 70, 16), (300, 137, 33), (700, 40, 1), (261, 700, 130),
]  # fmt: skip


@each_isa
@each_dtype
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("shape", SKINNY, ids=name_of)
def test_shrink(isa: str, dtype: torch.dtype, threshold: int, shape: tuple[int, int, int]) -> None:
    M, K, R = shape
    scale = 0.75

    def formula(x: Tensor, a: Tensor, keep: Tensor | None = None) -> Tensor:
        return scale * ((x if keep is None else x * keep) @ a.t())

    compared = Comparison(formula, dtype)
    for seed in repeats(M * R):
        x, a = normal(M, K, dtype, seed), normal(R, K, dtype, seed + 1, K)
        s = shrink(isa, x, a, scale, seed=SEED, threshold=threshold)
        compared.add(s, x, a, keep=keep_of(M, K, threshold))
    compared.check("s")


@each_isa
@each_dtype
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("shape", SKINNY, ids=name_of)
def test_reduce(isa: str, dtype: torch.dtype, threshold: int, shape: tuple[int, int, int]) -> None:
    """da in every dtype that an adapter may have; fp32 sums are held to fp32's own error."""
    M, K, R = shape

    def formula(ds: Tensor, x: Tensor, keep: Tensor | None = None) -> Tensor:
        return ds.t() @ (x if keep is None else x * keep)

    for out_dtype in sorted({dtype, torch.float32}, key=str):
        compared = Comparison(formula, out_dtype)
        for seed in repeats(R * K):
            ds, x = normal(M, R, dtype, seed, M), normal(M, K, dtype, seed + 1)
            options = {"seed": SEED, "threshold": threshold, "columns": seed % 2 == 1}
            da = reduce(isa, ds, x, out_dtype, **options)
            compared.add(da, ds, x, keep=keep_of(M, K, threshold))
        compared.check("da")


@each_isa
@each_dtype
@pytest.mark.parametrize("shape", [*SKINNY, (600, 1000, 16), (70, 9000, 5)], ids=name_of)
def test_shrink_reduce(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Both gradients, and each alone: the one that is not wanted is not touched."""
    M, N, R = shape
    scale = 1.5
    compared_ds = Comparison(lambda dy, b: scale * (dy @ b), dtype)
    compared_db = {d: Comparison(lambda dy, s: dy.t() @ s, d) for d in (dtype, torch.float32)}
    for seed in repeats(M * R):
        dy, b = normal(M, N, dtype, seed, N), normal(N, R, dtype, seed + 1)
        s = normal(M, R, dtype, seed + 2)
        ds, db = shrink_reduce(isa, dy, b, s, scale, db_dtype=dtype, db_columns=seed % 2 == 1)
        alone, nothing = shrink_reduce(isa, dy, b, s, scale)
        no_ds, db32 = shrink_reduce(isa, dy, b, s, scale, want_ds=False, db_dtype=torch.float32)
        assert ds is not None and alone is not None and nothing is None
        assert db is not None and db32 is not None and no_ds is None
        compared_ds.add(ds, dy, b)
        compared_ds.add(alone, dy, b)
        compared_db[dtype].add(db, dy, s)
        compared_db[torch.float32].add(db32, dy, s)
    for compared in (compared_ds, *compared_db.values()):
        compared.check("ds or db")


@each_isa
@pytest.mark.parametrize("M", [1, 5, 12])
@pytest.mark.parametrize("K", [128, 256, 529])
def test_fp32_error_with_few_rows(isa: str, M: int, K: int) -> None:
    """Where the vendor's GEMM has its shortest chains of additions, ours must be short as well."""
    compared = {"y": Comparison(product, torch.float32), "s": Comparison(product, torch.float32)}
    for seed in range(8):
        x, w = normal(M, K, torch.float32, seed), normal(100, K, torch.float32, seed + 1, K)
        compared["y"].add(matmul(isa, x, w.t()), x, w.t())
        a = w[:35]
        keep = reference.keep_mask(1, M, K, 1 / 65536)
        compared["s"].add(shrink(isa, x, a, seed=1, threshold=1), x * keep, a.t())
    for name, comparison in compared.items():
        comparison.check(name)


@each_isa
@each_dtype
def test_more_rows_than_one_chunk_of_packed_rows(isa: str, dtype: torch.dtype) -> None:
    """Packed rows are held 8 MiB at a time; 2-byte elements may be held as fp32."""
    K, N, R = 2080, 70, 3
    M = 2100 if isa in ("avx512_bf16", "amx_bf16") and dtype == torch.bfloat16 else 1050
    x, w = normal(M, K, dtype, 0), normal(N, K, dtype, 1, K).t()
    s, l = rank_term(M, N, R, dtype, 0)
    y = matmul(isa, x, w, s, l)
    check("y", y, product, x, w, s, l)
    assert torch.equal(y, matmul(isa, x, w, s, l, packed=pack(isa, w), threads=2))


@each_isa
@pytest.mark.parametrize("rows, cols", [(0, 9), (9, 0), (1, 1), (3, 8), (5, 127), (4, 1033)])
def test_keep_mask_is_that_of_the_reference(isa: str, rows: int, cols: int) -> None:
    for seed in (0, 1, SEED, (1 << 63) + 5, (1 << 64) - 1):
        for threshold in (1, 6554, 32768, 65535, 65536):
            expected = reference.keep_mask(seed, rows, cols, threshold / 65536)
            assert torch.equal(keep_mask(isa, seed, threshold, rows, cols), expected)
    assert keep_mask(isa, SEED, 0, rows, cols).all()


@each_isa
@each_dtype
def test_the_masks_inside_the_operations_are_keep_mask(isa: str, dtype: torch.dtype) -> None:
    """Exactly: operands of ones make every operation write its mask, or sums of it."""
    M, K, threshold = 40, 137, 20000
    keep = keep_mask(isa, SEED, threshold, M, K).to(dtype)
    ones, options = torch.ones(M, K, dtype=dtype), {"seed": SEED, "threshold": threshold}
    assert torch.equal(shrink(isa, ones, torch.eye(K, dtype=dtype), **options), keep)
    assert torch.equal(reduce(isa, torch.eye(M, dtype=dtype), ones, dtype, **options), keep)
    no_x, no_w = torch.zeros(M, 1, dtype=dtype), torch.zeros(1, K, dtype=dtype)
    s, l = torch.ones(M, 1, dtype=dtype), torch.ones(1, K, dtype=dtype)
    assert torch.equal(matmul(isa, no_x, no_w, s, l, **options), keep)
    for rows in (1, 3, 5):
        y = matmul(isa, no_x[:rows], no_w, s[:rows], l, **options)
        assert torch.equal(y, keep[:rows])
        assert torch.equal(shrink(isa, ones[:rows], torch.eye(K, dtype=dtype), **options), y)


@each_isa
@each_dtype
def test_packed_size_is_that_of_the_weight_and_its_padding(isa: str, dtype: torch.dtype) -> None:
    """Panels of 32 columns, steps of 32 in the contraction; 16-bit values may be held as fp32."""
    for K, N in ((0, 5), (5, 0), (1, 1), (100, 33), (4096, 2048)):
        size = module().packed_bytes(isa, CODES[dtype], K, N)
        padded = math.ceil(K / 32) * 32 * math.ceil(N / 32) * 32
        assert K * N * dtype.itemsize <= size <= padded * 4
