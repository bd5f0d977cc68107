"""csrc/cuda/shrink.cuh in the emulator: s from x and lora_A, ds from dy and lora_B."""

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

SOURCE = "csrc/cuda/shrink.cu"
SCHEDULES = (TOGETHER, Schedule("reversed", "late"))
SHAPES = [(1, 8, 1), (130, 72, 16), (37, 331, 5), (128, 192, 70), (3, 64, 129)]
LAYOUTS = ["row", "column", "padded", "offset", "strided"]


def run_shrink(
    d, r, *, which="s", mask=None, arch="sm_80", schedule=TOGETHER, edit=None, counters=False
):
    with EmulatedGpu(arch, schedule=schedule, edit=edit, counters=counters) as gpu:
        gpu.see(*d.all())
        if which == "s":
            out = cuda.shrink(r, d.x, d.lora_A, 2.0, mask)
        else:
            out, _ = cuda.shrink_reduce(r, d.dy, d.lora_B, 2.0, None, True, None)
    return gpu, out


def check(d, r, which="s", mask=None, **options) -> None:
    gpu, got = run_shrink(d, r, which=which, mask=mask, **options)
    gpu.check()
    if which == "s":
        assert_product(which, got, dropped(d.x, mask), d.lora_A.t(), 2.0)
    else:
        assert_product(which, got, d.dy, d.lora_B, 2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("which", ["s", "ds"])
def test_ragged_shapes(which: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    M, K, R = shape
    check(data(M, K, K, R, dtype), route(M, K, K, R, dtype), which)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_any_strides_and_addresses(dtype: torch.dtype, layout: str) -> None:
    d = data(70, 104, 88, 12, dtype)
    d.x, d.lora_A = strided(d.x, layout), strided(d.lora_A, layout)
    check(d, route(70, 104, 88, 12, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("layout", ["row", "column"])
def test_dropout_is_the_generator_of_every_backend(layout: str, dtype: torch.dtype) -> None:
    d = data(33, 107 if layout == "column" else 112, 24, 9, dtype)
    d.x = strided(d.x, layout)
    seed = torch.tensor(-(1 << 62) + 12345)
    for mask in (mask_of(0.3), mask_of(0.5, seed), mask_of(1.0)):
        check(d, route(*d.x.shape, 24, 9, dtype), mask=mask)


def test_the_seed_is_read_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    d = data(20, 64, 16, 4, torch.bfloat16)
    seed = torch.tensor([987654321987])
    words = (seed.data_ptr(), 0, mask_of(0.25).threshold)
    monkeypatch.setattr(cuda, "mask_words", lambda mask: words)
    with EmulatedGpu() as gpu:
        gpu.see(*d.all(), seed)
        got = cuda.shrink(route(20, 64, 16, 4, torch.bfloat16), d.x, d.lora_A, 2.0, mask_of(0.25))
    gpu.check()
    assert_product("s", got, dropped(d.x, mask_of(0.25, seed)), d.lora_A.t(), 2.0)


@pytest.mark.parametrize("splits", [2, 4])
def test_parts_are_summed_in_order_under_every_schedule(splits: int) -> None:
    d = data(140, 520, 16, 20, torch.bfloat16)
    r = route(140, 520, 16, 20, torch.bfloat16, splits)

    def once(schedule: Schedule):
        gpu, out = run_shrink(d, r, schedule=schedule)
        gpu.check()
        return gpu.launches[0].report, out

    got = on_schedules(once, EVERY_SCHEDULE)
    assert_product("s", got, d.x, d.lora_A.t(), 2.0)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_120"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_other_targets(schedule: Schedule, arch: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        check(data(40, 264, 80, 30, dtype), route(40, 264, 80, 30, dtype, 2), arch=arch,
              schedule=schedule)  # fmt: skip


@pytest.mark.parametrize("which", ["s", "ds"])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_no_bank_conflicts_and_no_byte_twice(dtype: torch.dtype, which: str) -> None:
    M, K, R = 256, 256, 16
    d = data(M, K, K, R, dtype)
    gpu, _ = run_shrink(d, route(M, K, K, R, dtype), which=which, counters=True)
    counters = gpu.launches[0].report.counters
    assert counters.shared_wavefronts <= 1.05 * counters.ideal_wavefronts
    size = dtype.itemsize
    planned = size * (M * K + -(-M // 128) * R * K)
    assert counters.global_bytes["load"] <= 1.02 * planned


@pytest.mark.parametrize("arch", EVERY_TARGET)
def test_budget(arch: str) -> None:
    assert_budget(SOURCE, arch, registers=256, tensor="HMMA")


FAULTS = [
    Fault("the barrier of the main loop", r"bar\.sync\s+0;", 0, "", {"race"}),
    Fault("the wait for a stage", r"cp\.async\.wait_group\s+1;", 0, "cp.async.wait_group 2;",
          {"async-read", "race", "uninitialised"}),
    Fault("the ticket releases", r"atom\.acq_rel\.gpu", 0, "atom.relaxed.gpu",
          {"global-race"}),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught(fault: Fault) -> None:
    d = data(140, 520, 16, 20, torch.bfloat16)
    r = route(140, 520, 16, 20, torch.bfloat16, 2)

    def once(edit, schedule):
        gpu, out = run_shrink(d, r, edit=edit, schedule=schedule)
        return gpu.launches[0].report, out

    assert_caught(fault, once)
