"""docs/cuda-kernels.md says what the compiler says, for the targets that CI builds."""

from __future__ import annotations

import re

import pytest

from . import matrix
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
    """Of none on the page, but for the matmul of sm80 on sm_90a, where it is a fallback."""
    for (kernel, target), line in matrix.committed().items():
        fallback = target == "sm_90a" and kernel.startswith("lora_matmul_sm80_")
        assert fallback or line.endswith("| 0 |"), line
