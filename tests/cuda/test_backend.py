"""A whole layer through the CUDA backend, from autograd's calls to the kernels in the emulator."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lora_fused import backends, devices
from lora_fused.autograd import Saved, lora_backward, lora_forward
from lora_fused.backends import cuda, cuda_candidates, cuda_native, cuda_sm80
from lora_fused.config import Call, Config, Mask, Problem, Route
from lora_fused.reference import dropout_threshold
from lora_fused.testing import assert_close_to_ref, make_case

from .emulated import EmulatedGpu
from .matrix import dynamic_shared

NEEDS = frozenset({"x", "lora_A", "lora_B", "bias"})
SM80 = cuda_sm80._tiles(cuda_sm80._TILES[torch.bfloat16][3])
GENERATIONS = ("A100", "H100", "RTX 4090", "RTX 5090", "B200")


def route_of(case, strategy: str, splits: int = 2) -> Route:
    (M, K), N, R = case.x.shape, case.weight.shape[0], case.lora_A.shape[0]
    dtype, dropout = case.x.dtype, case.dropout_p > 0
    problem = Problem(M, K, N, R, dtype, "cuda", has_bias=True, dropout=dropout, needs=NEEDS)
    config = Config(
        "cuda", forward=strategy, dx="library" if strategy == "decode" else strategy,
        forward_tiles=cuda_candidates.decode_tiles(splits) if strategy == "decode" else SM80,
        dx_tiles=None if strategy == "decode" else SM80,
        shrink_tiles=cuda_candidates.shrink_tiles(R, dtype, splits),
        reduce_tiles=cuda_candidates.reduce_tiles(R, dtype, splits),
    )  # fmt: skip
    return Route(problem, config, dtype, False, NEEDS, (M, K), (M, N), (dtype,) * 4)


@pytest.mark.parametrize(
    ("strategy", "shape", "p", "launches"),
    [
        ("decode", (5, 136, 72, 12), 0.0, 3),
        ("split", (40, 136, 72, 12), 0.0, 5),
        ("split", (40, 136, 72, 12), 0.25, 5),
        ("s_first", (40, 136, 72, 12), 0.25, 3),
    ],
)
def test_forward_and_backward(
    strategy: str, shape: tuple[int, int, int, int], p: float, launches: int
) -> None:
    case = make_case(*shape, torch.bfloat16, bias=True, dropout_p=p)
    backends.load("cuda")
    mask = Mask(case.seed, dropout_threshold(p)) if p else None
    scale = case.scaling / (1 - dropout_threshold(p) / 65536)
    call = Call(route_of(case, strategy), scale, mask)
    with EmulatedGpu() as gpu:
        gpu.see(case.x, case.weight, case.lora_A, case.lora_B, case.bias, case.dy)
        y, s = lora_forward(call, case.x, case.weight, case.lora_A, case.lora_B, case.bias)
        saved = Saved(case.x, s, case.weight, case.lora_A, case.lora_B)
        gradients = lora_backward(call, case.dy, saved)
    gpu.check()
    assert len(gpu.launches) == launches
    for launch in gpu.launches:  # what the compile matrix lists; decode's grows with the rank
        listed = dynamic_shared(launch.kernel)
        assert launch.shared == listed or launch.kernel.startswith(("lora_shrink", "lora_decode"))
        assert launch.shared <= listed
    got = {"y": y, "s": s, **gradients._asdict()}
    truth, baseline = case.truth(), case.baseline()
    for name in ("y", "s", "dx", "da", "db", "dbias"):
        assert_close_to_ref(name, got[name], truth[name], baseline[name])


def test_matmul_adds_to_out() -> None:
    """Groups accumulate dx over their members."""
    case = make_case(40, 136, 72, 12, torch.bfloat16)
    ds = torch.randn(40, 12).bfloat16()
    before = torch.randn(40, 136).bfloat16()
    route, out = route_of(case, "split"), before.clone()
    with EmulatedGpu() as gpu:
        gpu.see(case.dy, case.weight, case.lora_A, ds, out)
        got = cuda.matmul(route, "dx", case.dy, case.weight, ds, case.lora_A, out=out)
    truth = before.double() + case.dy.double() @ case.weight.double()
    truth = truth + ds.double() @ case.lora_A.double()
    baseline = torch.addmm(before, case.dy, case.weight).addmm_(ds, case.lora_A)
    assert_close_to_ref("dx", got, truth, baseline)
    assert got.data_ptr() == out.data_ptr()


def test_reasons() -> None:
    problem = Problem(8, 64, 64, 8, torch.bfloat16, "cpu")
    assert cuda.not_supported_reasons(problem) == ["the tensors are on cpu"]
    double = Problem(8, 64, 64, 8, torch.float64, "cuda")
    assert "there are no CUDA kernels for float64" in cuda.not_supported_reasons(double)
    wide = Problem(8, 64, 64, 513, torch.bfloat16, "cuda")
    assert "rank 513 is beyond 512" in cuda.not_supported_reasons(wide)
    amd = Problem(
        8, 64, 64, 8, torch.bfloat16, "cuda", device=devices.DEVICES["MI300X"]
    )  # fmt: skip
    assert "the device is not NVIDIA's" in cuda.not_supported_reasons(amd)


@pytest.mark.parametrize("name", GENERATIONS)
@pytest.mark.parametrize("dtype", cuda_candidates.DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 16, 17, 500, 8192])
def test_candidates_are_legal_and_shipped(M: int, dtype: torch.dtype, name: str) -> None:
    device = devices.DEVICES[name]
    shipped = set(cuda_candidates.SHIPPED)
    for R in (1, 16, 17, 70, 200, 512):
        problem = Problem(M, 4096, 1024, R, dtype, "cuda", device=device)
        for operation in ("forward", "dx", "shrink", "reduce"):
            found = cuda_candidates.candidates(problem, device, operation)
            assert found == cuda_candidates.candidates(problem, device, operation)
            for c in found:
                assert c.shared_bytes <= device.shared_bytes_per_block
                assert (operation, c.strategy, c.tiles, device.capability) in shipped
        assert cuda_candidates.candidates(problem, device, "shrink")
        assert cuda_candidates.candidates(problem, device, "reduce")


def test_decode_is_for_few_tokens_and_weights_along_the_contraction() -> None:
    device = devices.DEVICES["H100"]

    def strategies(operation: str, **changes) -> set[str]:
        facts = {"M": 16, "K": 1024, "N": 1024, "R": 8, "dtype": torch.bfloat16, **changes}
        problem = Problem(device_type="cuda", device=device, **facts)
        return {c.strategy for c in cuda_candidates.candidates(problem, device, operation)}

    assert "decode" in strategies("forward")
    assert "decode" in strategies("dx", weight_layout="column")
    for operation, changes in (
        ("forward", {"M": 17}), ("forward", {"dropout": True}), ("dx", {}),
        ("forward", {"weight_layout": "column"}), ("forward", {"given_mask": True}),
    ):  # fmt: skip
        assert "decode" not in strategies(operation, **changes)


def test_fp32_is_multiplied_as_torch_is_set() -> None:
    setting = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert cuda_native.math_of(torch.float32) == 0
        torch.set_float32_matmul_precision("high")
        assert cuda_native.math_of(torch.float32) == cuda_native.TF32
        assert cuda_native.math_of(torch.bfloat16) == 1
    finally:
        torch.set_float32_matmul_precision(before)
    if hasattr(setting, "fp32_precision"):
        code = (
            "import torch; from lora_fused.backends.cuda_native import math_of;"
            "torch.backends.cuda.matmul.fp32_precision = 'tf32'; print(math_of(torch.float32))"
        )
        told = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert told.stdout.strip() == str(cuda_native.TF32)
