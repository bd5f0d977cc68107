"""The tests in interpreted/, in a process whose Triton interprets kernels instead of compiling."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def run_interpreted(marker: str) -> None:
    """pytest on interpreted/; one thread, as OpenBLAS is slower with more on small tiles."""
    threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", marker, "tests/triton/interpreted"],
        env={**os.environ, **threads, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_interpreted() -> None:
    run_interpreted("not full")


@pytest.mark.full
def test_interpreted_full() -> None:
    run_interpreted("full")
