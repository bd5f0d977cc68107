"""csrc/cuda/decode.cuh in the emulator: y and s of a few tokens by one launch."""

from __future__ import annotations

import pytest
import torch

from lora_fused.backends import cuda, cuda_native
from lora_fused.backends.cuda_candidates import decode_parts
from tests.ptx_emulator import EVERY_SCHEDULE, TOGETHER, Schedule
from tests.ptx_emulator.testing import on_schedules

from .budgets import EVERY_TARGET, assert_budget
from .emulated import EmulatedGpu
from .faults import Fault, assert_caught
from .problems import DTYPES, IDS, assert_close_to_ref, data, route, strided

SOURCE = "csrc/cuda/decode.cu"
SCHEDULES = (TOGETHER, Schedule("reversed", "late", slow_block=0))
SHAPES = [(1, 8, 40, 9), (16, 600, 72, 16), (3, 331, 100, 5), (7, 256, 136, 70), (2, 64, 300, 512)]


def run_decode(d, r, *, direction="forward", bias=True, arch="sm_80", launches=1, **options):
    with EmulatedGpu(arch, **options) as gpu:
        gpu.see(*d.all())
        for _ in range(launches):
            if direction == "forward":
                out = cuda.shrink_matmul(
                    r, direction, d.x, d.weight, d.lora_A, d.lora_B, 2.0, d.bias if bias else None
                )
            else:
                out = cuda.shrink_matmul(r, direction, d.dy, d.weight, d.lora_B, d.lora_A, 2.0)
    return gpu, *out


def check(d, r, *, direction="forward", bias=True, **options) -> None:
    gpu, y, s = run_decode(d, r, direction=direction, bias=bias, **options)
    gpu.check()
    x, w, a, b = d.x, d.weight.t(), d.lora_A.t(), d.lora_B.t()
    if direction == "dx":
        x, w, a, b = d.dy, d.weight, d.lora_B, d.lora_A
    extra = d.bias if bias and direction == "forward" else torch.zeros(w.shape[1], dtype=x.dtype)
    truth_s = 2.0 * x.double() @ a.double()
    assert_close_to_ref("s", s, truth_s, 2.0 * (x @ a))
    truth = x.double() @ w.double() + truth_s @ b.double() + extra.double()
    baseline = x @ w + (2.0 * (x @ a)).to(x.dtype) @ b + extra
    assert_close_to_ref("y", y, truth, baseline)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("splits", [1, 2])
def test_ragged_shapes(splits: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check(data(*shape, dtype), route(*shape, dtype, splits), bias=splits == 1)


@pytest.mark.parametrize("layout", ["row", "column", "padded", "offset", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_any_strides_and_addresses(dtype: torch.dtype, layout: str) -> None:
    d = data(5, 104, 40, 12, dtype)
    d.x, d.weight, d.lora_A, d.lora_B = (
        strided(t, layout) for t in (d.x, d.weight, d.lora_A, d.lora_B)
    )
    d.bias = torch.stack([d.bias, d.bias], 1)[:, 0]
    check(d, route(5, 104, 40, 12, dtype))


def test_dx_of_a_transposed_weight() -> None:
    d = data(4, 72, 136, 9, torch.bfloat16)
    d.weight = strided(d.weight, "column")
    check(d, route(4, 72, 136, 9, torch.bfloat16, weight_layout="column"), direction="dx")


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("resident", [1, 64])
def test_every_schedule_and_residency(resident: int, splits: int) -> None:
    """Blocks wait only for what a running block has in hand: one resident block is enough."""
    shape = (6, 520, 72, 40)
    d, r = data(*shape, torch.bfloat16), route(*shape, torch.bfloat16, splits)

    def once(schedule: Schedule):
        gpu, y, _ = run_decode(d, r, schedule=schedule, resident=resident)
        gpu.check()
        return gpu.launches[0].report, y

    on_schedules(once, EVERY_SCHEDULE)


def test_flags_serve_one_launch_after_the_other() -> None:
    shape = (6, 264, 72, 40)
    d, r = data(*shape, torch.bfloat16), route(*shape, torch.bfloat16, 2)
    gpu, _, _ = run_decode(d, r, launches=3)
    gpu.check()
    assert len(gpu.launches) == 3 and len(cuda_native._words) <= 1


@pytest.mark.parametrize("arch", ["sm_90a", "sm_120"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_other_targets(schedule: Schedule, arch: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        shape = (9, 264, 72, 20)
        check(data(*shape, dtype), route(*shape, dtype, 2), arch=arch, schedule=schedule)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_weights_are_read_once_and_stores_have_no_conflicts(dtype: torch.dtype) -> None:
    M, K, N, R = 16, 512, 128, 16
    d = data(M, K, N, R, dtype)
    gpu, _, _ = run_decode(d, route(M, K, N, R, dtype), counters=True, bias=False)
    counters = gpu.launches[0].report.counters
    assert counters.shared_wavefronts <= 1.05 * counters.ideal_wavefronts
    blocks, size = N // 16, dtype.itemsize
    parts = decode_parts(route(M, K, N, R, dtype).problem, 1, "forward")
    x_reads = size * M * K * (blocks + 1)
    s_reads = blocks * parts * 4 * 16 * R + size * 256 * R * blocks
    planned = size * (N * K + R * K) + x_reads + s_reads
    assert counters.global_bytes["load"] <= 1.02 * planned


@pytest.mark.parametrize("arch", EVERY_TARGET)
def test_budget(arch: str) -> None:
    assert_budget(SOURCE, arch, registers=128, tensor="HMMA")


FAULTS = [
    Fault("the post of s releases", r"red\.release\.gpu", -1, "red.relaxed.gpu", {"global-race"}),
    Fault("the waits for s acquire", r"ld\.acquire\.gpu", -1, "ld.relaxed.gpu", {"global-race"}),
    Fault("the ticket releases", r"atom\.acq_rel(\S*inc)", 0, r"atom.relaxed\1", {"global-race"}),
    Fault("the second barrier", r"bar\.sync\s+0;", 1, "", {"race"}),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught(fault: Fault) -> None:
    shape = (6, 520, 72, 40)
    d, r = data(*shape, torch.bfloat16), route(*shape, torch.bfloat16, 2)

    def once(edit, schedule):
        gpu, y, _ = run_decode(d, r, edit=edit, schedule=schedule)
        return gpu.launches[0].report, y

    assert_caught(fault, once)
