"""Triton's own interpreter on the same kernels and inputs: a second opinion on their compiled PTX.

Matrix products in bf16, fp16 and fp32 (compiled as TF32), with tensor descriptors made by the
kernel and by the host, warp-specialised, reductions, fp32 atomics, random numbers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from .cases import Case, matrix_cases, other_cases

TRITON = [c for c in matrix_cases() + other_cases() if c.fixture[-2:].isdigit()]
# One rounding of the result at most, relative to the largest value; of TF32 that of the inputs.
TOLERANCE = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-9}
EXACT = ("gradient", "dropout")  # stored in fp32 without a rounding that could fall either way


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("interpreted")
    subprocess.run(
        [sys.executable, "-m", f"{__package__}.kernels.interpret", str(folder)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        check=True,
    )
    return folder


@pytest.mark.parametrize("case", TRITON, ids=str)
def test_compiled_and_interpreted_agree(case: Case, interpreted: Path) -> None:
    want = np.load(interpreted / f"{case.fixture}.npy")
    got = case.run().result.float().numpy()
    kernel, kind = case.fixture.split("_")[:2]
    largest = np.abs(want).max()
    assert largest > 0
    tolerance = 1e-6 if kernel in EXACT else TOLERANCE[kind]
    assert np.abs(got - want).max() <= tolerance * largest


def test_random_numbers_equal_the_interpreters(interpreted: Path) -> None:
    case = next(c for c in TRITON if c.fixture.startswith("dropout"))
    kept = np.load(interpreted / f"{case.fixture}.npy") != 0
    np.testing.assert_array_equal(case.run().result.numpy() != 0, kept)
    assert 0 < kept.mean() < 1
