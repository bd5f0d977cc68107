"""docs/cuda-kernels.md says what the compiler says, for the targets that CI builds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from . import cases, matrix
from .compile import toolkit
from .emulated import BUILD


def test_the_committed_compile_matrix_is_current() -> None:
    """Another compiler allocates other registers: only the page's own is held against it."""
    fresh = matrix.rows(BUILD)
    if not fresh:
        pytest.skip("the native module was not built with its CUDA part from this checkout")
    built = {target for _, target in fresh} & set(matrix.CI_TARGETS)
    page = {key: line for key, line in matrix.committed().items() if key[1] in built}
    fresh = {key: line for key, line in fresh.items() if key[1] in built}
    assert set(page) == set(fresh), "run python -m tests.cuda.matrix"
    version = re.search(r"nvcc (\d+\.\d+\.\d+)", matrix.PAGE.read_text())
    assert version is not None
    if version[1] != toolkit().version:
        pytest.skip(f"the page was made with nvcc {version[1]}, this is {toolkit().version}")
    assert page == fresh, "run python -m tests.cuda.matrix"


def test_no_kernel_spills() -> None:
    """Of none on the page; the last but one column, and the last of these lines."""
    lines = matrix.committed().values()
    assert lines and all(line.endswith("| 0 |") for line in lines)


def test_only_passed_tests_of_these_sources_count(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "one.cu").write_text("1")
    pair = {("lora_reduce_sm80_bf16_r16", "sm_80")}
    for test in ("test_a", "test_a", "test_b", "test_fault_c"):
        cases.keep(test, pair | {("other", "sm_80")}, tmp_path)
    assert dict(cases.counts(tmp_path)) == dict.fromkeys(pair, 2)
    (tmp_path / "csrc" / "one.cu").write_text("2")
    cases.sources.cache_clear()
    assert not cases.counts(tmp_path)
