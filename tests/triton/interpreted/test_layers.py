"""Layers with backend="triton" in the interpreter: the public functions with their autograd."""

from __future__ import annotations

import pytest
import torch

from lora_fused import FusedLoRALinear, LoRAWeights, lora_linear, lora_linear_group
from lora_fused.backends.triton import not_supported_reasons
from lora_fused.config import GRADIENT_NAMES, Problem
from lora_fused.testing import check_case, make_case


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(20, 24, 32, 4), (1, 40, 24, 16), (33, 17, 19, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_layer(dtype: torch.dtype, shape: tuple[int, ...], dropout_p: float) -> None:
    check_case(make_case(*shape, dtype, bias=True, dropout_p=dropout_p), "triton")


@pytest.mark.parametrize("name", GRADIENT_NAMES)
def test_one_gradient(name: str) -> None:
    case = make_case(20, 24, 32, 4, torch.bfloat16, bias=True)
    check_case(case, "triton", frozenset({name}))


def test_fp32_adapters_and_fan_in_fan_out() -> None:
    case = make_case(
        20, 24, 32, 4, torch.bfloat16, adapter_dtype=torch.float32, fan_in_fan_out=True
    )
    check_case(case, "triton")


def test_module_and_batch_dimensions() -> None:
    torch.manual_seed(0)
    layer = FusedLoRALinear(24, 32, r=4, lora_alpha=8, backend="triton", dtype=torch.float32)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 3, 24, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    update = layer.scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(
        y, torch.nn.functional.linear(x, layer.weight + update, layer.bias), rtol=1e-4, atol=1e-5
    )
    assert x.grad is not None and x.grad.shape == x.shape


def test_group() -> None:
    torch.manual_seed(0)
    x = torch.randn(10, 24, requires_grad=True)
    members = [
        LoRAWeights(
            torch.randn(N, 24), torch.randn(4, 24, requires_grad=True),
            torch.randn(N, 4, requires_grad=True), 0.5, dropout_p=0.2, seed=N,
        )
        for N in (32, 16, 16)
    ]  # fmt: skip
    leaves = [x, *(t for m in members for t in (m.lora_A, m.lora_B))]

    def outputs(backend: str) -> list[torch.Tensor]:
        ys = lora_linear_group(x, members, backend=backend)
        gradients = torch.autograd.grad(sum(y.square().sum() for y in ys), leaves)
        return [*ys, *gradients]

    for got, want in zip(outputs("triton"), outputs("torch"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)


def test_no_tokens() -> None:
    case = make_case(0, 24, 32, 4, torch.float32)
    y = lora_linear(case.x, case.weight, case.lora_A, case.lora_B, 1.0, backend="triton")
    assert y.shape == (0, 32)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Problem(4, 8, 8, 2, torch.float64), "no Triton kernels for float64"),
        (Problem(4, 8, 8, 513, torch.float32), "the rank is 513"),
        (Problem(4, 0, 8, 2, torch.float32), "empty"),
        (Problem(1 << 31, 8, 8, 2, torch.float32), "a size is beyond"),
        (Problem(4, 8, 8, 2, torch.float32, device_type="mps"), "on mps"),
        (Problem(4, 8, 8, 2, torch.float32, plain=False), "ordinary"),
    ],
)
def test_reasons(problem: Problem, reason: str) -> None:
    assert reason in "; ".join(not_supported_reasons(problem))
    assert not_supported_reasons(Problem(4, 8, 8, 2, torch.float32)) == []
