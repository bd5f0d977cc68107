"""The sm_80 matmul on every target: budgets, machine code, memory traffic, bank conflicts."""

from __future__ import annotations

import re

import pytest

from lora_fused.testing import make_case

from .compile import compiler_log, resources, sass
from .sm80 import MATHS, SHIPPED, Variant, check, variant

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_120")
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_120": 99 * 1024}
SHARED_PER_SM = {
    "sm_80": 164 * 1024,
    "sm_86": 100 * 1024,
    "sm_89": 100 * 1024,
    "sm_120": 100 * 1024,
}
RESERVED = 1024  # of each resident block, by the driver
HMMA = {"bf16": "HMMA.16816.F32.BF16", "f16": "HMMA.16816.F32", "tf32": "HMMA.1688.F32.TF32"}


def files(full: bool) -> list:
    """(math, target): one of each by default, all of them in the full run.

    Not on sm_90a, where these kernels are a fallback that nothing chooses, and may spill."""
    default = {("bf16", "sm_80"), ("tf32", "sm_80")}
    pairs = [(m, t) for m in MATHS.values() for t in (*TARGETS, "sm_100")]
    return [p if p in default else pytest.param(*p, marks=pytest.mark.full) for p in pairs]


@pytest.mark.parametrize(("math", "target"), files(full=True))
def test_no_spills_and_registers_for_the_resident_blocks(math: str, target: str) -> None:
    found = resources(f"csrc/cuda/sm80/matmul_{math}.cu", target)
    shipped = [v for v in SHIPPED if v.math == math]
    assert set(found) == {v.name for v in shipped}
    for v in shipped:
        usage = found[v.name]
        assert (usage.spill_stores, usage.spill_loads, usage.stack) == (0, 0, 0), v
        assert usage.registers <= 255, v
        assert -(-usage.registers // 8) * 8 * v.threads * v.resident <= 65536, v
    assert "warning" not in compiler_log(f"csrc/cuda/sm80/matmul_{math}.cu", target).lower()


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_fits_the_device(target: str) -> None:
    """All but the tile of 144 KB fit everywhere, and `resident` blocks at a time."""
    for v in SHIPPED:
        static = 256  # the works of three tiles and a flag, rounded up
        total = v.shared_bytes + static
        if v.block_k * v.element_bytes == 128 and v.block_n == 256:
            assert SHARED_BYTES["sm_86"] < total <= SHARED_BYTES["sm_80"]
            continue
        assert total <= SHARED_BYTES[target], v
        assert min(v.resident, 2) * (total + RESERVED) <= SHARED_PER_SM[target], v


@pytest.mark.parametrize(("math", "target"), files(full=True))
def test_tensor_instructions_and_no_local_memory(math: str, target: str) -> None:
    code = sass(f"csrc/cuda/sm80/matmul_{math}.cu", target)
    for v in SHIPPED:
        if v.math != math:
            continue
        text = code[v.name]
        assert text.count(HMMA[math]) >= main_loop_mmas(v), v
        assert "LDGSTS" in text and "LDSM" in text, v
        assert not re.search(r"\b(LDL|STL)\b", text), v


def main_loop_mmas(v: Variant) -> int:
    """Tensor instructions of one k block of a warp."""
    steps = v.block_k * v.element_bytes // 32
    return v.block_m // v.warps_m // 16 * (v.block_n // v.warps_n // 8) * steps


COUNTED = [
    "bf16_128x256x32_k_major", "bf16_128x128x32_mn_major", "bf16_64x128x32_k_major",
    "bf16_32x64x64_mn_major", "tf32_128x128x16_mn_major",
]  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_traffic_is_the_plan_and_no_bank_is_met_twice(name: str) -> None:
    """Each tile reads its rows of x and w once, each S tile x and shrink; y and s are written once.
    The wavefronts of shared memory are the fewest that the accesses allow."""
    v = variant(name)
    forward = v.layout == "k_major"
    dtype = {m: d for d, m in MATHS.items()}[v.math]
    M, outputs, inner, R = v.block_m, 2 * v.block_n, 4 * v.block_k, 16
    case = make_case(M, *((inner, outputs) if forward else (outputs, inner)), R, dtype)
    _, report = check(case, "forward" if forward else "dx", v, grid=3, counters=True)
    counters, size = report.counters, v.element_bytes
    tiles = outputs // v.block_n
    loads = tiles * (M + v.block_n) * (inner + R) + (M + R) * inner
    stores = M * outputs + M * R
    assert counters.global_bytes["store"] <= 1.02 * stores * size
    assert counters.global_bytes["load"] <= 1.02 * loads * size
    assert counters.shared_wavefronts <= 1.05 * counters.ideal_wavefronts
    step = 32 // size
    mmas = 2 * M * (inner + -(-R // step) * step) * outputs + 2 * M * inner * 16
    assert counters.tensor_flops == mmas
