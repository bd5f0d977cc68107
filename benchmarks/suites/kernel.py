"""Each operation of the library alone, against its roof and against the same work by torch.

The operations are those of lora_fused.backends, called as the layer calls them. `ours` is the
dispatcher's choice, `ours-cpu-…` one strategy of the CPU's, `ours-triton` and `ours-cuda` what a
backend of GPUs takes for itself; `torch` is the backend made of torch's own products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.numerics import Expected, judge
from benchmarks.providers import FROZEN, OURS
from benchmarks.shapes import FORWARD, GPU_LAYERS, LAYERS, Case
from benchmarks.suites import operations
from benchmarks.suites.item import Item, Makers, Ready, Request, Suite, Work
from benchmarks.suites.operations import OPERATIONS, Operands, Operation, Outputs, plain_s
from benchmarks.tensors import CaseTensors, make_tensors
from lora_fused.backends import cpu
from lora_fused.config import FUSED_STRATEGIES, Route
from lora_fused.dispatch import gpu_backends_for, route_for

TORCH = "torch"
BACKWARD = "B"
CPU_STRATEGIES = ("own", "hybrid", "packed")
_GPU = (
    ("llama-3.1-8b.q", 8192, 16), ("llama-3.1-8b.q", 1, 16), ("llama-3.1-8b.gate", 2048, 16),
    ("llama-3.1-8b.kv", 8192, 64), ("gpt2.c_attn", 2048, 8),
)  # fmt: skip
_QUICK: dict[str, tuple[tuple[str, int, int], ...]] = {
    "bf16": (
        ("llama-3.2-1b.q", 512, 16), ("llama-3.2-1b.q", 1, 16), ("llama-3.2-1b.q", 16, 16),
        ("gpt2.c_attn", 512, 8), ("llama-3.2-1b.gate", 128, 16),
    ),
    "fp32": (("llama-3.2-1b.q", 512, 16), ("llama-3.2-1b.q", 16, 16)),
    "fp16": (("roberta-large.query", 128, 16),),
}  # fmt: skip


def items(request: Request) -> Iterator[Item]:
    for case in _cases(request):
        for operation in OPERATIONS:
            yield Item(
                name=f"{operation.name}, {case.layer.key}",
                shape={"M": case.M, "K": case.layer.K, "N": case.layer.N, "R": case.R},
                dtype=case.dtype,
                passes=(_pass(operation),),
                base=FROZEN if operation.matmul else TORCH,
                contenders=partial(_makers, operation, case, request.device),
            )


def _cases(request: Request) -> list[Case]:
    own = LAYERS if request.device == "cpu" else GPU_LAYERS
    if request.full:
        tokens = (1, 16, 128, 512, 2048) if request.device == "cpu" else (1, 16, 512, 2048, 8192)
        return [
            Case(layer, dtype, M, R)
            for dtype in request.dtypes
            for layer in own
            for M in tokens
            for R in (8, 16, 64)
        ]
    layers = {layer.key: layer for layer in own}
    quick = _QUICK if request.device == "cpu" else {"bf16": _GPU}
    return [
        Case(layers[key], dtype, M, R)
        for dtype in request.dtypes
        for key, M, R in quick.get(dtype, ())
    ]


def _makers(operation: Operation, case: Case, device: str) -> Makers:
    t = make_tensors(case, device=device)
    with torch.no_grad():
        ds = t.scaling * (t.dy @ t.b)
        operands = Operands(t, plain_s(Operands(t, ds, ds)), ds)
        truth = operation.plain(operands.to(torch.float64))
        expected = Expected(truth, operation.plain(operands.to(t.x.dtype)))
    makers = {
        name: partial(_ready, operation, route, operands, expected, packed)
        for name, route, packed in _routes(operation, t)
    }
    if operation.matmul:
        makers[FROZEN] = partial(_bare_product, operation, t)
    return makers


def _routes(
    operation: Operation, t: CaseTensors
) -> Iterator[tuple[str, Route, cpu.PackedWeight | None]]:
    """Who runs the operation: torch, the dispatcher's choice, and what it chose among."""
    params = (t.w, t.a, t.b, t.bias)
    chosen = route_for(t.x, *params, False, "auto")
    yield TORCH, route_for(t.x, *params, False, TORCH), None
    others = [(OURS, chosen)]
    if chosen.problem.device is None:
        yield from _cpu_routes(operation, chosen, t)
    else:
        others += [
            (f"ours-{name}", route_for(t.x, *params, False, name))
            for name in gpu_backends_for(chosen.problem)
        ]
    for name, route in others:
        config = route.config
        strategy = config.forward if operation.direction == operations.FORWARD else config.dx
        # NOTE: strategies of one launch have no matmul of their own.
        if strategy not in FUSED_STRATEGIES or not operation.matmul or operation.shrinks:
            yield name, route, None


def _cpu_routes(
    operation: Operation, chosen: Route, t: CaseTensors
) -> Iterator[tuple[str, Route, cpu.PackedWeight | None]]:
    """Every strategy of the native kernels; those without the big product know only one."""
    if cpu.not_supported_reasons(chosen.problem):
        return
    for strategy in CPU_STRATEGIES if operation.matmul else CPU_STRATEGIES[:1]:
        config = replace(chosen.config, backend="cpu", forward=strategy, dx=strategy, isa=cpu.isa())
        packed = cpu.pack(t.w, chosen.problem.threads) if strategy == "packed" else None
        yield f"ours-cpu-{strategy}", replace(chosen, config=config), packed


def _ready(
    operation: Operation,
    route: Route,
    operands: Operands,
    expected: Expected,
    packed: cpu.PackedWeight | None,
) -> Ready:
    own = replace(operands, t=operands.t.copy_of_parameters())

    def call() -> Outputs:
        with torch.no_grad():
            return operation.run(route, own, packed)

    return _checked_by(operation, call, expected, _work(operation, operands.t, route.problem.R))


def _bare_product(operation: Operation, t: CaseTensors) -> Ready:
    """x wᵀ + bias, or dy w, by torch: what the layer would take without its adapter."""
    own = t.copy_of_parameters()

    def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        if operation.direction == operations.DX:
            return own.dy.to(dtype), own.w.to(dtype), None
        bias = None if own.bias is None else own.bias.to(dtype)
        return own.x.detach().to(dtype), own.w.t().to(dtype), bias

    mine = operands(t.x.dtype)
    expected = Expected(_product(*operands(torch.float64)), _product(*mine))
    return _checked_by(operation, lambda: _product(*mine), expected, _work(operation, t, 0))


def _product(x: Tensor, w: Tensor, bias: Tensor | None) -> Outputs:
    return {"y": torch.mm(x, w) if bias is None else torch.addmm(bias, x, w)}


def _checked_by(
    operation: Operation, call: Callable[[], Outputs], expected: Expected, work: Work
) -> Ready:
    return Ready(
        calls={_pass(operation): call},
        check=lambda: judge(call().items(), expected),
        work={_pass(operation): work},
    )


def _pass(operation: Operation) -> str:
    return FORWARD if operation.direction == operations.FORWARD else BACKWARD


def _work(operation: Operation, t: CaseTensors, R: int) -> Work:
    flops, elements = operation.work(t.x.shape[0], t.w.shape[1], t.w.shape[0], R)
    return Work(flops, elements * t.x.dtype.itemsize)


SUITE = Suite("kernel", "Each operation alone, against its roof and torch's own product", 90, items)
