"""The self-check on the real Triton kernels, interpreted: right ones are not demoted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

_CODE = """
import torch
from lora_fused import gpu_choice, selfcheck, small_check
from lora_fused.config import Problem
from lora_fused.devices import DEVICES

NEEDS = frozenset({"x", "lora_A", "lora_B"})
kernels = {}
for M, group in ((1, ()), (128, ()), (128, ((4096, 16), (1024, 16)))):
    N, R = (5120, 32) if group else (4096, 16)
    problem = Problem(
        M, 4096, N, R, torch.float16, "cpu", torch.float16, needs=NEEDS,
        device=DEVICES["RTX 4090"], group=group,
    )
    for part in ("forward", "dx", "reduce"):
        for option in gpu_choice.options(problem, part, ("triton",))[:3]:
            kernels.update(dict.fromkeys(selfcheck.kernels_of(problem, option)))
strategies = {kernel.strategy for kernel in kernels}
assert {"split", "decode", "shrink", "reduce"} <= strategies, strategies
for kernel in kernels:
    why = small_check.run_check(kernel, torch.device("cpu"))
    assert not why, f"{kernel}: {why}"
    print(kernel)

from lora_fused.backends.triton import launch
matmul = launch.matmul
def off_by_a_little(tiles, members, *args, **kwargs):
    matmul(tiles, members, *args, **kwargs)
    members[0].y[-1, -1] += 0.5
launch.matmul = off_by_a_little
kernel = next(kernel for kernel in kernels if kernel.part == "forward" and not kernel.grouped)
assert "wrong result, y" in small_check.run_check(kernel, torch.device("cpu"))
"""


def test_right_kernels_pass_and_a_wrong_one_does_not() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CODE],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "group" in done.stdout and "decode" in done.stdout
