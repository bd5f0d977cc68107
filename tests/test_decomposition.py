"""What inductor makes of the operators: torch's operations for small layers, a call for others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from lora_fused import FusedLoRALinear, lora_linear
from lora_fused.decomposition import is_better_in_torch
from lora_fused.dispatch import forget_choices
from lora_fused.testing import assert_close_to_ref, make_case
from tests.native import needs_native

CALL = "torch.ops.lora_fused.lora_linear"
GRADIENTS = ("dx", "dweight", "da", "db", "dbias")


@pytest.fixture(autouse=True)
def no_compiled_code() -> Any:
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


def generated(call: Any, *operands: Tensor) -> str:
    """The code of the forward graph, and of the backward graph where there is one."""
    _, codes = run_and_get_code(call, *operands)
    return "\n".join(codes)


def linear(backend: str = "auto", **options: Any) -> Any:
    return torch.compile(
        lambda x, w, a, b: lora_linear(x, w, a, b, 2.0, backend=backend, **options), fullgraph=True
    )


def operands_of(case: Any) -> tuple[Tensor, ...]:
    return case.x, case.weight, case.lora_A, case.lora_B


@needs_native
def test_a_small_layer_is_compiled_as_torch_and_a_large_one_is_called() -> None:
    small, large = (make_case(16, width, width, 4) for width in (32, 1024))
    assert CALL not in generated(linear(), *operands_of(small))
    assert f"{CALL}_kernel" in generated(linear(), *operands_of(large))


@needs_native
def test_a_backend_that_was_asked_for_is_called() -> None:
    case = make_case(16, 32, 32, 4)
    assert f"{CALL}_kernel" in generated(linear("cpu"), *operands_of(case))
    assert CALL not in generated(linear("torch"), *operands_of(case))


def test_the_environment_asks_for_a_backend_too(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(16, 1024, 1024, 4)
    monkeypatch.setenv("LORA_FUSED_BACKEND", "torch")
    forget_choices()
    assert is_better_in_torch(case.x, case.weight, case.lora_A, None, "auto")
    monkeypatch.delenv("LORA_FUSED_BACKEND")
    forget_choices()


@needs_native
def test_dropout_keeps_its_kernels() -> None:
    case = make_case(16, 32, 32, 4)
    assert f"{CALL}_kernel" in generated(linear(dropout_p=0.5), *operands_of(case))


def test_a_dtype_without_kernels_is_compiled_as_torch() -> None:
    case = make_case(16, 64, 64, 4, torch.float64)
    assert CALL not in generated(linear(), *operands_of(case))


@pytest.mark.parametrize("backend", ["auto", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numerics_of_both(
    backend: str, rank: int, adapter_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    """Every gradient, a batch of sequences, a bias, a weight stored [in, out]."""
    case = make_case(
        6, 16, 12, rank, dtype, adapter_dtype=adapter_dtype, bias=True, fan_in_fan_out=True
    )
    leaves = {
        name: getattr(case, name).detach().clone().requires_grad_()
        for name in ("x", "weight", "lora_A", "lora_B", "bias")
    }

    @torch.compile(fullgraph=True)
    def run(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor) -> Tensor:
        rows = x.view(2, 3, 16)
        return lora_linear(rows, weight, lora_A, lora_B, case.scaling, bias, backend=backend)

    y = run(**leaves)
    assert y.shape == (2, 3, 12)
    y.view(6, 12).backward(case.dy)
    truth, baseline = case.truth(), case.baseline()
    got = {"y": y.detach().view(6, 12)}
    got |= dict(zip(GRADIENTS, (t.grad for t in leaves.values()), strict=True))
    for name, leaf in zip(GRADIENTS, leaves.values(), strict=True):
        assert got[name].dtype == leaf.dtype
    for name, value in got.items():
        assert_close_to_ref(name, value, truth[name], baseline[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_compilation_whatever_was_chosen(dtype: torch.dtype) -> None:
    """fp32 is compiled as torch at every M, bf16 is called at every M: M is no guard."""
    layer = FusedLoRALinear(32, 24, r=4, dtype=dtype)
    torch.nn.init.normal_(layer.lora_B)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (2, 5, 1000):
        x = torch.randn(tokens, 32, dtype=dtype)
        torch.testing.assert_close(compiled(x), layer(x))
    operator = torch.ops.lora_fused.lora_linear.default
    assert sum(any(n.target is operator for n in g.graph.nodes) for g in counter.graphs) == 1


def test_gradients_that_nobody_needs_are_not_computed() -> None:
    case = make_case(16, 32, 32, 4)
    leaves = [t.detach() for t in operands_of(case)]
    leaves[3].requires_grad_()

    def step(*operands: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(compiled(*operands), leaves[3], case.dy)

    compiled = linear()
    _, codes = run_and_get_code(step, *leaves)
    assert codes[-1].count("extern_kernels.") == 1  # db = dyᵀ s


def test_the_operators_in_compiled_code_are_those_of_the_graph() -> None:
    case, tail = make_case(6, 16, 8, 3, bias=True), (None, 2.0, 0.0, "auto")
    ops, given = torch.ops.lora_fused, (*operands_of(case), case.bias)
    y, s = ops.lora_linear(*given, *tail)
    for got, expected in zip(ops.lora_linear_kernel(*given, *tail), (y, s), strict=True):
        assert torch.equal(got, expected)
    backward = (case.dy, *given, s, *tail, [True] * 5)
    expected = ops.lora_linear_backward(*backward)
    for got, want in zip(ops.lora_linear_backward_kernel(*backward), expected, strict=True):
        assert torch.equal(got, want)
