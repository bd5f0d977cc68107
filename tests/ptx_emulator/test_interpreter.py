"""Triton's own interpreter on the kernels it can run: the same results as their compiled PTX."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from . import Uninitialised, run
from .testing import bits, fixture, launch_of

SCRIPT = """
import sys, numpy as np, torch
from {package}.kernels import triton_kernels as k
x = torch.from_numpy(np.load(f"{{sys.argv[1]}}/x.npy"))
kept = torch.zeros(x.numel())
k.dropout_kernel[(-(-x.numel() // 512),)](x.flatten(), kept, 77, x.numel(), 0.3, BLOCK=512)
np.save(f"{{sys.argv[1]}}/kept.npy", kept.numpy())
"""


@pytest.mark.full
def test_random_numbers_equal_the_interpreters(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    x = torch.randn(40, 48)
    np.save(tmp_path / "x.npy", x.numpy())
    subprocess.run(
        [sys.executable, "-c", SCRIPT.format(package=__package__), str(tmp_path)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        check=True,
    )
    text = fixture("dropout_fp32_80")
    shared, threads = launch_of(text)
    kept = torch.zeros(x.numel())
    args = [bits(x.flatten()), Uninitialised(bits(kept)), 77, x.numel(), 0.3]
    run(text, "dropout_kernel", -(-x.numel() // 512), threads, args, shared=shared).check()
    np.testing.assert_array_equal(kept.numpy() != 0, np.load(tmp_path / "kept.npy") != 0)
    np.testing.assert_allclose(kept.numpy(), np.load(tmp_path / "kept.npy"), rtol=1e-6)
