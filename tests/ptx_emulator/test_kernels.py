"""Compiled kernels give the right numbers under every schedule, without findings."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import EVERY_SCHEDULE, Schedule, Uninitialised, run
from .cases import Case, matrix_cases, other_cases
from .testing import bits, fixture, module, on_schedules

CASES = matrix_cases() + other_cases()
QUICK = (Schedule("together", "early"), Schedule("forward", "late"))


def check(case: Case, schedule: Schedule, text: str | None = None) -> None:
    outcome = case.run(schedule, text)
    unexpected = [f for f in outcome.report.findings if f.kind not in case.known]
    assert not unexpected, "\n".join(map(str, unexpected))
    assert outcome.error <= case.tolerance


@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_numbers_and_no_findings(case: Case) -> None:
    for schedule in QUICK:
        check(case, schedule)


@pytest.mark.full
@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_schedule(case: Case, schedule: Schedule) -> None:
    check(case, schedule)


@pytest.mark.parametrize("name", ["hopper_gemm", "tile_gemm", "relay", "specialised_bf16_120"])
def test_schedules_give_the_same_bits(name: str) -> None:
    case = next(c for c in CASES if name in (c.fixture, c.options.get("kernel")))

    def outcome(schedule: Schedule):
        done = case.run(schedule)
        return done.report, done.result

    on_schedules(outcome)


@pytest.mark.full
def test_freshly_compiled_kernels(tmp_path) -> None:
    """The compilers of this machine, rather than the fixtures."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    command = [sys.executable, "-m", f"{__package__}.kernels.compile", str(tmp_path)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    for case in CASES:
        file = tmp_path / f"{case.fixture}.ptx"
        if file.exists():
            check(case, Schedule(), file.read_text())


def test_blocks_that_wait_for_each_other_must_be_resident() -> None:
    """Four blocks exchange flags: with room for one of them the design deadlocks."""
    case = Case("blocks", {"tiles": 6}, 0.0, {"kernel": "relay", "resident": 1})
    assert case.run().report.kinds() == {"deadlock"}
    enough = Case("blocks", {"tiles": 6}, 0.0, {"kernel": "relay", "resident": 4})
    assert enough.run().report.ok


def test_fixtures_name_their_sources() -> None:
    assert ".loc" in fixture("tile_gemm") and "tile_gemm.cu" in fixture("tile_gemm")


def test_transpose_through_ldmatrix() -> None:
    x = torch.randn(32, 48).bfloat16()
    y = torch.zeros(48, 32).bfloat16()
    args = [bits(x), Uninitialised(bits(y)), 32, 48]
    for schedule in QUICK:
        run(module("tile_gemm"), "transpose", (4, 6), 32, args, schedule=schedule).check()
        assert torch.equal(y, x.T)
