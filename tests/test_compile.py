"""torch.compile and torch.export in depth: whole models, recompiles, saved programs, autocast."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from lora_fused import FusedLoRALinear, LoRAWeights, lora_linear, lora_linear_group
from lora_fused.testing import assert_close_to_ref, make_case

OPERATOR = torch.ops.lora_fused.lora_linear.default
BACKENDS = ["aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def no_compiled_code() -> None:
    torch._dynamo.reset()


def network(**options: Any) -> nn.Sequential:
    layers = FusedLoRALinear(16, 24, r=4, **options), FusedLoRALinear(24, 8, r=4, **options)
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.1)
    return nn.Sequential(layers[0], nn.GELU(), layers[1])


def outputs(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """y, dx and every gradient."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = run(x)
    y.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    return [t.clone() for t in (y.detach(), x.grad, *gradients) if t is not None]


def assert_all_close(got: list[Tensor], expected: list[Tensor]) -> None:
    for compiled, eager in zip(got, expected, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def compilations(counter: CompileCounterWithBackend) -> int:
    """The graphs that hold our operator."""
    return sum(any(n.target is OPERATOR for n in g.graph.nodes) for g in counter.graphs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_compilation_serves_every_number_of_tokens(backend: str) -> None:
    model = network()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (2, 3, 17, 64, 5, 250):
        x = torch.randn(tokens, 16)
        assert_all_close(outputs(compiled, model, x), outputs(model, model, x))
    assert compilations(counter) == 1


def test_a_second_number_of_tokens_compiles_the_last_time() -> None:
    """Without dynamic=True torch specialises on the first shape, and generalises at the second."""
    model = network()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for tokens in (4, 9, 33, 7, 129):
        compiled(torch.randn(2, tokens, 16))
    assert compilations(counter) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_with_every_gradient(backend: str) -> None:
    case = make_case(7, 16, 12, 3, bias=True)

    @torch.compile(fullgraph=True, backend=backend)
    def run(*operands: Tensor) -> Tensor:
        x, weight, lora_A, lora_B, bias = operands
        return lora_linear(x, weight, lora_A, lora_B, case.scaling, bias)

    leaves = [
        t.detach().requires_grad_()
        for t in (case.x, case.weight, case.lora_A, case.lora_B, case.bias)
        if t is not None
    ]
    y = run(*leaves)
    y.backward(case.dy)
    truth, baseline = case.truth(), case.baseline()
    names = ("dx", "dweight", "da", "db", "dbias")
    for name, got in {"y": y, **dict(zip(names, (t.grad for t in leaves), strict=True))}.items():
        assert got is not None
        assert_close_to_ref(name, got.detach(), truth[name], baseline[name])


def test_group() -> None:
    case = make_case(7, 16, 12, 3)
    members = [LoRAWeights(*(t.detach() for t in (case.weight, case.lora_A, case.lora_B)), s)
               for s in (1.0, 2.0)]  # fmt: skip
    run = torch.compile(
        lambda x: lora_linear_group(x, members), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(run(case.x), lora_linear_group(case.x, members))


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_tokens_and_one(tokens: int) -> None:
    model, x = network(), torch.randn(tokens, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_all_close(outputs(compiled, model, x), outputs(model, model, x))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_whole_peft_model(backend: str, dropout: float) -> None:
    pytest.importorskip("peft")
    from lora_fused.integrations.peft import accelerate
    from tests.peft_models import LLAMA_LAYERS, adapted, llama, tokens

    model = adapted(llama(), lora_dropout=dropout)
    accelerate(model, verbose=False)
    model(tokens())  # the first pass teaches which layers receive one input
    seen: list[str] = []

    def spy(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=spy)
    ids = tokens()
    loss = compiled(input_ids=ids, labels=ids).loss
    loss.backward()
    assert sum("lora_linear" in name for name in seen) == LLAMA_LAYERS
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == 2 * LLAMA_LAYERS
    if dropout > 0:
        assert loss != compiled(input_ids=ids, labels=ids).loss
        return
    model.zero_grad()
    eager = model(input_ids=ids, labels=ids).loss
    eager.backward()
    torch.testing.assert_close(loss, eager)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"fan_in_fan_out": True}, {"lora_dropout": 0.5}])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_exported_program_saved_and_loaded(options: dict[str, Any], tmp_path: Path) -> None:
    model = network(**options).eval()
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    program = torch.export.export(model, (torch.randn(5, 16),), dynamic_shapes=({0: tokens},))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    calls = [node.target for node in loaded.graph.nodes if node.target is OPERATOR]
    assert len(calls) == 2
    for count in (1, 11, 1000):
        x = torch.randn(count, 16)
        torch.testing.assert_close(loaded.module()(x), model(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_exported_for_training() -> None:
    """run_decompositions reaches the operator, which has no decomposition, and keeps it."""
    program = torch.export.export(network(), (torch.randn(5, 16),)).run_decompositions()
    assert sum(node.target is OPERATOR for node in program.graph.nodes) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_operator_follows_the_autocast_dtype_of_the_user(dtype: torch.dtype) -> None:
    case = make_case(6, 16, 8, 3)
    operands = [
        t.detach().requires_grad_() for t in (case.x, case.weight, case.lora_A, case.lora_B)
    ]
    with torch.autocast("cpu", dtype):
        y = OPERATOR(*operands, None, None, 2.0, 0.0, "auto")[0]
        expected = lora_linear(*operands, 2.0)
    assert y.dtype == expected.dtype == dtype
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in operands)
    wide = [t.detach().double() for t in operands]
    with torch.autocast("cpu", dtype):
        assert OPERATOR(*wide, None, None, 2.0, 0.0, "auto")[0].dtype == torch.float64


M, K, N, R = 5, 16, 8, 4
FLOPS = {
    # Multiply-adds per token of each gradient, with what it needs.
    "adapters": (("lora_A", "lora_B"), N * R + N * R + K * R),
    "adapters and input": (("x", "lora_A", "lora_B"), N * K + 2 * N * R + 2 * K * R),
    "lora_B": (("lora_B",), N * R),
    "everything": (("x", "weight", "lora_A", "lora_B"), 2 * N * K + 2 * N * R + 2 * K * R),
}


@pytest.mark.parametrize(("names", "per_token"), FLOPS.values(), ids=FLOPS)
def test_flops_of_both_passes(names: tuple[str, ...], per_token: int) -> None:
    """What FlopCounterMode counts for the operators is what it counts for plain torch."""
    case = make_case(M, K, N, R)
    operands = {n: getattr(case, n).detach() for n in ("x", "weight", "lora_A", "lora_B")}
    for name in names:
        operands[name].requires_grad_()
    counted = []
    for plain in (False, True):
        with FlopCounterMode(display=False) as counter:
            y = (plain_formula if plain else lora_linear)(*operands.values(), 2.0)
            y.backward(case.dy)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] == 2 * M * (N * K + R * (K + N) + per_token)


def plain_formula(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    linear = nn.functional.linear
    return linear(x, w) + scaling * linear(linear(x, a), b)


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE])
@pytest.mark.parametrize("compiled", [False, True])
def test_selective_checkpointing(policy: CheckpointPolicy, compiled: bool) -> None:
    """A policy sees our operator, and gradients are the same whatever it says."""
    model = network(lora_dropout=0.5)
    runs: list[bool] = []

    def decide(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op is OPERATOR:
            runs.append(ctx.is_recompute)
            return policy
        return CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, decide)

    def run(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
        return y

    x = torch.randn(5, 16)
    torch.manual_seed(1)
    expected = outputs(model, copy.deepcopy(model), x)[:2]
    model.zero_grad()
    torch.manual_seed(1)
    got = outputs(torch.compile(run, backend="aot_eager") if compiled else run, model, x)[:2]
    assert runs
    for tensor, want in zip(got, expected, strict=True):
        torch.testing.assert_close(tensor, want)
