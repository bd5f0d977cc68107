"""The CUDA kernels on a real GPU: numerics, determinism, graphs, streams, compute-sanitizer.

Skipped where there is none; `make gpu-test` runs them on a machine that has one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from lora_fused import lora_linear
from lora_fused.backends import cuda_native
from lora_fused.testing import check_case, make_case, run_case

from .compile import ROOT


def reason_to_skip() -> str:
    """Why nothing here can run; empty on a machine with a GPU that the kernels serve."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is not NVIDIA's sm_80 or later"
    return "" if cuda_native.native() is not None else "the CUDA kernels are not built"


pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [
    (1, 4096, 4096, 16), (16, 1024, 3072, 8), (77, 520, 1000, 5), (512, 4096, 1024, 64),
    (2048, 1000, 4096, 128), (4097, 768, 776, 30),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_every_output(p: float, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    case = make_case(*shape, dtype, bias=True, dropout_p=p, device="cuda")
    check_case(case, backend="cuda")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_every_time(shape: tuple[int, int, int, int]) -> None:
    case = make_case(*shape, torch.bfloat16, dropout_p=0.1, device="cuda")
    first = run_case(case, "cuda")
    for _ in range(3):
        for name, tensor in run_case(case, "cuda").items():
            assert torch.equal(tensor, first[name]), name


def test_a_graph_replays_beside_eager_calls() -> None:
    case = make_case(5, 1024, 2048, 16, torch.bfloat16, device="cuda")
    tensors = (case.x, case.weight, case.lora_A, case.lora_B, case.scaling)
    with torch.no_grad():
        expected = lora_linear(*tensors, backend="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = lora_linear(*tensors, backend="cuda")
        for _ in range(5):
            y.zero_()
            graph.replay()
            assert torch.equal(lora_linear(*tensors, backend="cuda"), expected)
            assert torch.equal(y, expected)


def test_streams_side_by_side() -> None:
    case = make_case(8, 2048, 2048, 16, torch.bfloat16, device="cuda")
    tensors = (case.x, case.weight, case.lora_A, case.lora_B, case.scaling)
    streams = [torch.cuda.Stream() for _ in range(4)]
    with torch.no_grad():
        expected = lora_linear(*tensors, backend="cuda")
        torch.cuda.synchronize()
        results = []
        for i in range(64):
            with torch.cuda.stream(streams[i % 4]):
                results.append(lora_linear(*tensors, backend="cuda"))
        torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in results)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    if os.environ.get("LORA_FUSED_UNDER_SANITIZER"):
        pytest.skip("this run is under compute-sanitizer already")
    python = [sys.executable, "-m", "pytest", "-q", "-k", "every_output and 77", __file__]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *python]
    environment = {**os.environ, "LORA_FUSED_UNDER_SANITIZER": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
