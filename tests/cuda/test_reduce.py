"""csrc/cuda/reduce.cuh in the emulator: da and db by one launch."""

from __future__ import annotations

import pytest
import torch

from lora_fused.backends import cuda
from tests.ptx_emulator import EVERY_SCHEDULE, TOGETHER, Schedule
from tests.ptx_emulator.testing import on_schedules

from .budgets import EVERY_TARGET, assert_budget
from .emulated import EmulatedGpu
from .faults import Fault, assert_caught
from .problems import DTYPES, IDS, assert_product, data, dropped, mask_of, route, strided

SOURCE = "csrc/cuda/reduce.cu"
SCHEDULES = (TOGETHER, Schedule("reversed", "late"))
SHAPES = [(1, 3, 9, 1), (70, 130, 24, 16), (129, 16, 136, 5), (33, 40, 129, 70), (5, 8, 8, 129)]


def factors(d, M: int, R: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(R)
    ds, s = (torch.randn(M, R, generator=generator).to(dtype) for _ in range(2))
    return ds, s


def run_pair(d, ds, s, r, *, mask=None, dtypes=None, arch="sm_80", **options):
    a_dtype, b_dtype = dtypes or (ds.dtype, ds.dtype)
    with EmulatedGpu(arch, **options) as gpu:
        gpu.see(*d.all(), ds, s)
        da, db = cuda.reduce_pair(r, ds, d.x, mask, a_dtype, d.dy, s, b_dtype)
    return gpu, da, db


def check(d, ds, s, r, *, mask=None, **options) -> None:
    gpu, da, db = run_pair(d, ds, s, r, mask=mask, **options)
    gpu.check()
    assert len(gpu.launches) == 1
    assert_product("da", da, ds.t(), dropped(d.x, mask))
    assert_product("db", db, d.dy.t(), s)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_shapes(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    M, K, N, R = shape
    d = data(M, K, N, R, dtype)
    check(d, *factors(d, M, R, dtype), route(M, K, N, R, dtype))


@pytest.mark.parametrize("layout", ["row", "column", "padded", "offset", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_any_strides_and_addresses(dtype: torch.dtype, layout: str) -> None:
    M, K, N, R = 45, 72, 40, 11
    d = data(M, K, N, R, dtype)
    ds, s = factors(d, M, R, dtype)
    d.x, d.dy, ds, s = (strided(t, layout) for t in (d.x, d.dy, ds, s))
    check(d, ds, s, route(M, K, N, R, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("layout", ["row", "column"])
def test_dropout_masks_x_alone(layout: str, dtype: torch.dtype) -> None:
    M, K, N, R = 40, 107 if layout == "column" else 112, 24, 6
    d = data(M, K, N, R, dtype)
    ds, s = factors(d, M, R, dtype)
    d.x = strided(d.x, layout)
    for p in (0.25, 1.0):
        check(d, ds, s, route(M, K, N, R, dtype), mask=mask_of(p))


def test_each_gradient_alone_and_in_its_own_dtype() -> None:
    M, K, N, R, dtype = 20, 40, 24, 6, torch.bfloat16
    d = data(M, K, N, R, dtype)
    ds, s = factors(d, M, R, dtype)
    r = route(M, K, N, R, dtype)
    with EmulatedGpu() as gpu:
        gpu.see(*d.all(), ds, s)
        wide = cuda.reduce(r, ds, d.x, None, torch.float32)
        double = cuda.reduce(r, ds, d.x, None, torch.float64)
        none, db = cuda.reduce_pair(r, None, None, None, None, d.dy, s, torch.float16)
        _, alone = cuda.shrink_reduce(r, d.dy, None, 1.0, s, False, torch.bfloat16)
    gpu.check()
    assert none is None and db.dtype == torch.float16 and double.dtype == torch.float64
    truth = ds.double().t() @ d.x.double()
    assert (wide.double() - truth).abs().max() < 1e-5 and torch.equal(wide.double(), double)
    assert_product("db", alone, d.dy.t(), s)
    assert (db.double() - d.dy.double().t() @ s.double()).abs().max() < 1e-2


def test_no_tokens_give_zeros() -> None:
    d = data(0, 16, 16, 4, torch.bfloat16)
    ds, s = (torch.zeros(0, 4, dtype=torch.bfloat16) for _ in range(2))
    gpu, da, db = run_pair(d, ds, s, route(0, 16, 16, 4, torch.bfloat16))
    gpu.check()
    assert not da.any() and not db.any() and da.shape == (4, 16) and db.shape == (16, 4)


@pytest.mark.parametrize("splits", [2, 4])
def test_parts_are_summed_in_order_under_every_schedule(splits: int) -> None:
    M, K, N, R, dtype = 300, 136, 24, 20, torch.bfloat16
    d = data(M, K, N, R, dtype)
    ds, s = factors(d, M, R, dtype)
    r = route(M, K, N, R, dtype, splits)

    def once(schedule: Schedule):
        gpu, da, db = run_pair(d, ds, s, r, schedule=schedule)
        gpu.check()
        return gpu.launches[0].report, torch.cat([da, db.t()], 1)

    got = on_schedules(once, EVERY_SCHEDULE)
    assert_product("da", got[:, :K], ds.t(), d.x)
    assert_product("db", got[:, K:].t(), d.dy.t(), s)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_120"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_other_targets(schedule: Schedule, arch: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        d = data(100, 72, 40, 30, dtype)
        ds, s = factors(d, 100, 30, dtype)
        check(d, ds, s, route(100, 72, 40, 30, dtype, 2), arch=arch, schedule=schedule)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_no_bank_conflicts_and_no_byte_twice(dtype: torch.dtype) -> None:
    M, K, N, R = 256, 128, 256, 16
    d = data(M, K, N, R, dtype)
    ds, s = factors(d, M, R, dtype)
    gpu, _, _ = run_pair(d, ds, s, route(M, K, N, R, dtype), counters=True)
    counters = gpu.launches[0].report.counters
    assert counters.shared_wavefronts <= 1.05 * counters.ideal_wavefronts
    planned = dtype.itemsize * (M * (K + N) + 3 * M * R)
    assert counters.global_bytes["load"] <= 1.02 * planned


@pytest.mark.parametrize("arch", EVERY_TARGET)
def test_budget(arch: str) -> None:
    assert_budget(SOURCE, arch, registers=256, tensor="HMMA")


FAULTS = [
    Fault("the barrier of the main loop", r"bar\.sync\s+0;", 0, "", {"race"}),
    Fault("the wait for a stage", r"cp\.async\.wait_group\s+2;", 0, "cp.async.wait_group 3;",
          {"async-read", "race", "uninitialised"}),
    Fault("the ticket releases", r"atom\.acq_rel\.gpu", 0, "atom.relaxed.gpu", {"global-race"}),
    Fault("the transposition", r"ldmatrix(\S*)\.trans", 0, r"ldmatrix\1", set()),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught(fault: Fault) -> None:
    M, K, N, R, dtype = 300, 136, 24, 20, torch.bfloat16
    d = data(M, K, N, R, dtype)
    ds, s = factors(d, M, R, dtype)
    r = route(M, K, N, R, dtype, 2)

    def once(edit, schedule):
        gpu, da, _ = run_pair(d, ds, s, r, edit=edit, schedule=schedule)
        return gpu.launches[0].report, da

    assert_caught(fault, once)
