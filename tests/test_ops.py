"""The registered operators: opcheck, torch.compile, torch.export, dispatch modes, tracing."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lora_fused import FusedLoRALinear
from lora_fused.testing import make_case

NAMESPACE = torch.ops.lora_fused


def layer_with_adapter(**options: object) -> FusedLoRALinear:
    layer = FusedLoRALinear(16, 8, r=4, **options)  # type: ignore[arg-type]
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_opcheck(dtype: torch.dtype, dropout: bool, rank: int, bias: bool, batched: bool) -> None:
    case = make_case(6, 16, 8, rank, dtype, bias=bias)
    seed = torch.tensor(5) if dropout else None
    x, dy = (t.view(2, 3, -1) if batched else t for t in (case.x, case.dy))
    params = [case.weight, case.lora_A, case.lora_B, case.bias]
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, *params)]
    torch.library.opcheck(NAMESPACE.lora_linear.default, (*leaves, seed, 2.0, 0.5, "auto"))
    s = torch.randn(*x.shape[:-1], rank, dtype=dtype)
    needs = [True, False, True, True, bias]
    args = (dy, x, *params, s, seed, 2.0, 0.5, "auto", needs)
    torch.library.opcheck(NAMESPACE.lora_linear_backward.default, args)
    torch.library.opcheck(NAMESPACE.lora_linear_backward_kernel.default, args)
    operands = (x, *params, seed, 2.0, 0.5, "auto")
    torch.library.opcheck(NAMESPACE.lora_linear_kernel.default, operands)


def test_every_registered_operator_is_checked_above() -> None:
    names = {
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lora_fused::")
    }
    stems = ("lora_linear", "lora_linear_backward")
    assert names == {f"lora_fused::{stem}{end}" for stem in stems for end in ("", "_kernel")}


def test_double_backward_through_the_operator_is_refused() -> None:
    case = make_case(6, 16, 8, 3)
    x = case.x.clone().requires_grad_()
    y = NAMESPACE.lora_linear(
        x, case.weight, case.lora_A, case.lora_B, None, None, 2.0, 0.0, "auto"
    )
    with pytest.raises(RuntimeError, match="lora_linear has no double backward"):
        torch.autograd.grad(y[0].sum(), x, create_graph=True)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_compile_fullgraph_forward_and_backward(dynamic: bool, fan_in_fan_out: bool) -> None:
    torch._dynamo.reset()
    layer = layer_with_adapter(fan_in_fan_out=fan_in_fan_out)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (3, 7, 9):
        results = []
        for run in (layer, compiled):
            x = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(tokens))
            x.requires_grad_()
            layer.zero_grad()
            y = run(x)
            y.square().sum().backward()
            results.append((y, x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(eager, traced)


def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    layer, x = layer_with_adapter(), torch.randn(5, 16)
    compiled = torch.compile(nn.Sequential(layer, nn.GELU()), fullgraph=True)
    torch.testing.assert_close(compiled(x), nn.functional.gelu(layer(x)))


def test_compile_dropout_uses_one_mask_in_both_passes() -> None:
    torch._dynamo.reset()
    layer = layer_with_adapter(lora_dropout=0.5, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.fill_(1.0)
    x = torch.rand(5, 16).add_(1).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    y.backward(torch.ones_like(y))
    kept = x.grad != 0
    assert 0 < kept.sum() < kept.numel()
    s = 2 * layer.scaling * (x * kept).sum(1, keepdim=True)  # 1 / (1 - p) = 2
    torch.testing.assert_close(y, s * layer.lora_B.sum(1))
    assert not torch.equal(compiled(x), y)


def test_compile_sees_a_changed_scaling() -> None:
    torch._dynamo.reset()
    layer, x = layer_with_adapter(), torch.randn(5, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for scaling in (1.0, 2.0, 3.5, 0.0):
        layer.scaling = scaling
        torch.testing.assert_close(compiled(x), layer(x))


def test_compile_under_autocast() -> None:
    torch._dynamo.reset()
    layer, x = layer_with_adapter(), torch.randn(5, 16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    y = run(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.lora_A.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(y, layer(x))


def test_compile_of_a_packed_layer_is_right() -> None:
    torch._dynamo.reset()
    layer, x = layer_with_adapter(), torch.randn(5, 16)
    before = layer(x)
    if not layer.prepack().prepacked:
        pytest.skip("this CPU runs no native kernels")
    compiled = torch.compile(nn.Sequential(layer, nn.GELU()), backend="aot_eager")
    torch.testing.assert_close(compiled(x), nn.functional.gelu(before))
    layer.weight.data.add_(1.0)
    torch.testing.assert_close(compiled(x), nn.functional.gelu(layer(x)))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_export(strict: bool) -> None:
    layer, x = layer_with_adapter(), torch.randn(5, 16)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: tokens},), strict=strict)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert NAMESPACE.lora_linear.default in calls
    other = torch.randn(11, 16)
    torch.testing.assert_close(program.module()(other), layer(other))


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_does_not_record_a_constant() -> None:
    layer, x = layer_with_adapter().requires_grad_(False), torch.randn(5, 16)
    traced = torch.jit.trace(layer, (x,))
    other = torch.randn(5, 16)
    torch.testing.assert_close(traced(other), layer(other))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        layer = FusedLoRALinear(16, 8, r=4, lora_dropout=0.5)
        y = layer(torch.empty(2, 3, 16))
        y.sum().backward()
    assert y.shape == (2, 3, 8) and layer.lora_A.grad.shape == (4, 16)


def test_flops_are_counted_once() -> None:
    layer, x = layer_with_adapter(), torch.randn(5, 16)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 5 * (16 * 8 + 4 * (16 + 8))


def test_selective_checkpointing_can_name_the_operator() -> None:
    from functools import partial

    from torch.utils.checkpoint import (
        CheckpointPolicy,
        checkpoint,
        create_selective_checkpoint_contexts,
    )

    layer, x = layer_with_adapter(lora_dropout=0.5), torch.randn(5, 16, requires_grad=True)
    context = partial(
        create_selective_checkpoint_contexts,
        lambda ctx, op, *args, **kw: (
            CheckpointPolicy.MUST_SAVE
            if op is NAMESPACE.lora_linear.default
            else CheckpointPolicy.PREFER_RECOMPUTE
        ),
    )
    torch.manual_seed(1)
    y = checkpoint(lambda t: layer(t).square(), x, use_reentrant=False, context_fn=context)
    y.sum().backward()
    got, x.grad = x.grad, None
    torch.manual_seed(1)
    layer(x).square().sum().backward()
    torch.testing.assert_close(got, x.grad)


def test_direct_calls_are_checked_before_any_pointer_is_read() -> None:
    case = make_case(6, 16, 8, 3)
    tail = (None, 2.0, 0.0, "auto")
    with pytest.raises(ValueError, match="lora_B has shape"):
        NAMESPACE.lora_linear(case.x, case.weight, case.lora_A, case.lora_B[:4], None, *tail)
    good = (case.x, case.weight, case.lora_A, case.lora_B, None)
    s, needs = torch.randn(6, 3), [True] * 4 + [False]
    with pytest.raises(ValueError, match=r"dy has shape \[5, 8\], expected \[6, 8\]"):
        NAMESPACE.lora_linear_backward(case.dy[:5], *good, s, *tail, needs)
    with pytest.raises(ValueError, match=r"s has shape \[6, 2\], expected \[6, 3\]"):
        NAMESPACE.lora_linear_backward(case.dy, *good, s[:, :2], *tail, needs)
    with pytest.raises(TypeError, match=r"dy is torch.float64 on cpu, expected torch.float32"):
        NAMESPACE.lora_linear_backward(case.dy.double(), *good, s, *tail, needs)
