"""The functions of csrc/cuda/ptx.cuh, flags.cuh and numeric.cuh, executed one by one."""

from __future__ import annotations

import pytest
import torch

from tests.ptx_emulator import EVERY_SCHEDULE, Report, Schedule, Uninitialised

from .compile import CompilationFailed, launch, ptx, resources, sass

SOURCE = "tests/cuda/instructions.cu"
TARGETS = ("sm_80", "sm_90a", "sm_120")


def execute(kernel: str, *args, grid: int = 1, block: int = 32, arch: str = "sm_80", **options):
    return launch(
        ptx(SOURCE, arch, options.pop("defines", None)), kernel, grid, block, args, **options
    )


@pytest.mark.parametrize("landing", ["early", "late"])
@pytest.mark.parametrize("arch", TARGETS)
def test_every_copy_moves_its_bytes_and_fills_with_zero(arch: str, landing: str) -> None:
    rows = 19
    source = torch.randint(0, 1 << 29, (rows, 4), dtype=torch.int32)
    got = torch.empty(32, 4, dtype=torch.int32)
    schedule = Schedule("together", landing)
    execute("copies", source, Uninitialised(got), rows, arch=arch, schedule=schedule).check()
    low = torch.stack([source[:, 0], source[:, 0] & 0xFFFF, source[:, 1], source[:, 3]], 1)
    assert torch.equal(got[:rows], 3 * source + low)
    first = torch.tensor([source[0, 0], source[0, 0] & 0xFFFF, source[0, 1], source[0, 3]])
    assert torch.equal(got[rows:], first.expand(32 - rows, 4).int())


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize(
    ("kernel", "dtype", "depth"),
    [
        ("multiply_bf16", torch.bfloat16, 16),
        ("multiply_fp16", torch.float16, 16),
        ("multiply_fp32", torch.float32, 8),
    ],
)
def test_mma_multiplies_a_by_b_transposed(kernel, dtype, depth: int, arch: str) -> None:
    a, b = (torch.randint(-8, 8, (n, depth)).to(dtype) for n in (16, 8))
    c = torch.empty(16, 8)
    execute(kernel, a, b, Uninitialised(c), arch=arch).check()
    assert torch.equal(c, a.float() @ b.float().T)


def test_transposing_ldmatrix() -> None:
    source = torch.randint(0, 1 << 15, (16, 16), dtype=torch.int16)
    got = torch.empty_like(source)
    execute("transposes", source, Uninitialised(got)).check()
    assert torch.equal(got, source.T)


@pytest.mark.parametrize("arch", TARGETS)
def test_conversions_round_to_nearest_even(arch: str) -> None:
    values = torch.randn(64)
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 1e-40, -0.0])
    values[: len(ties)] = ties
    values[-2], values[-1] = float("inf"), float("nan")
    as_bf16, as_fp16, tf32 = (torch.empty(n, dtype=torch.int32) for n in (32, 32, 64))
    back = torch.empty(64, 2)
    outputs = [Uninitialised(t) for t in (as_bf16, as_fp16, back, tf32)]
    execute("rounding", values, *outputs, arch=arch).check()
    for got, dtype in ((as_bf16, torch.bfloat16), (as_fp16, torch.float16)):
        expected = values.to(dtype)
        assert torch.equal(got.view(dtype).nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))
    back = back.view(32, 2, 2)
    for i, dtype in enumerate((torch.bfloat16, torch.float16)):
        expected = values.to(dtype).float().view(32, 2)
        assert torch.equal(back[:, i].nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))
    away = torch.tensor([1 + 2**-10, 1 + 2 * 2**-10])
    assert torch.equal(tf32[2:4].view(torch.float32), away)
    assert not (tf32[:-1] & 0x1FFF).any() and tf32[-1:].view(torch.float32).isnan()


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=str)
def test_handover_between_blocks_and_reset(schedule: Schedule) -> None:
    workspace = torch.zeros(4, dtype=torch.int32)
    for _ in range(2):
        data, out = (torch.empty(n, dtype=torch.int32) for n in (64, 5 * 64))
        args = (workspace, Uninitialised(data), Uninitialised(out))
        execute("handover", *args, grid=5, block=64, schedule=schedule).check()
        assert torch.equal(out.view(5, 64), (7 * torch.arange(64)).int().expand(5, 64))
        assert not workspace.any()


def forsaken(workspace: torch.Tensor, limit: str) -> Report:
    return execute("forsaken", workspace, defines={"LORA_FUSED_SPIN_NANOSECONDS": limit})


def test_a_flag_that_never_comes_traps_and_says_why() -> None:
    workspace = torch.zeros(2, dtype=torch.int32)
    report = forsaken(workspace, "9000")
    assert report.kinds() == {"trap"}
    assert workspace.tolist() == [0, 1]


def test_the_emulator_calls_a_long_spin_a_deadlock() -> None:
    assert forsaken(torch.zeros(2, dtype=torch.int32), "2000000000ull").kinds() == {"deadlock"}


@pytest.mark.parametrize("arch", TARGETS)
def test_resources_and_machine_code_are_read(arch: str) -> None:
    found = resources(SOURCE, arch)
    code = sass(SOURCE, arch)
    assert set(found) == set(code) and "multiply_bf16" in found
    assert 0 < found["copies"].registers < 64 and found["copies"].spill_stores == 0
    assert found["multiply_bf16"].shared_bytes == 24 * 32
    assert "HMMA.16816.F32.BF16" in code["multiply_bf16"]


def test_a_compiler_error_is_shown() -> None:
    with pytest.raises(CompilationFailed, match="expected an identifier"):
        ptx(SOURCE, "sm_80", {"copies": 5})
