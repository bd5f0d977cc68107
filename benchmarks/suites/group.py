"""Layers that share their input (q, k, v; gate, up): lora_linear_group against separate layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.numerics import Expected, judge
from benchmarks.providers import FROZEN, NAIVE, OURS, PEFT, SMART, Provider
from benchmarks.shapes import FORWARD, FORWARD_BACKWARD, PASSES, Case, Layer, flops
from benchmarks.suites.item import Item, Makers, Ready, Request, Suite, Work
from benchmarks.suites.layers import present
from benchmarks.tensors import TORCH_DTYPES, CaseTensors, make_tensors
from lora_fused import LoRAWeights, lora_linear_group
from lora_fused.reference import lora_linear_ref

CONTENDERS = (FROZEN, NAIVE, SMART, PEFT, OURS)
GROUPED = "ours-group"
R = 16


@dataclass(frozen=True)
class Group:
    """Layers K in_features to each of `widths` on one input."""

    name: str
    K: int
    widths: tuple[int, ...]
    bias: bool = False

    def cases(self, dtype: str, M: int) -> list[Case]:
        """Each member's own; the names differ, and so do their values."""
        return [
            Case(Layer(self.name, str(i), self.K, N, self.bias), dtype, M, R)
            for i, N in enumerate(self.widths)
        ]


GROUPS = (
    Group("llama-3.2-1b.qkv", 2048, (2048, 512, 512)),
    Group("llama-3.2-1b.gate_up", 2048, (8192, 8192)),
    Group("roberta-large.qkv", 1024, (1024, 1024, 1024), bias=True),
    Group("qwen2.5-7b.qkv", 3584, (3584, 512, 512), bias=True),
    Group("llama-3.1-8b.qkv", 4096, (4096, 1024, 1024)),
    Group("llama-3.1-8b.gate_up", 4096, (14336, 14336)),
)
# In the order in which they run: group, M.
_QUICK_GPU = ((4, 8192), (5, 8192), (4, 512), (0, 2048), (4, 1), (5, 1))
_QUICK: dict[str, tuple[tuple[int, int], ...]] = {
    "bf16": ((0, 512), (1, 128), (2, 2048), (0, 16), (0, 1), (3, 128)),
    "fp32": ((0, 512), (2, 128), (0, 1)),
    "fp16": (),
}


def items(request: Request) -> Iterator[Item]:
    providers = present(CONTENDERS, request.device)
    for dtype in request.dtypes:
        for g, M in _sizes(request, dtype):
            group = GROUPS[g]
            sizes = {f"N{i}": N for i, N in enumerate(group.widths)}
            yield Item(
                name=group.name,
                shape={"M": M, "K": group.K, **sizes, "R": R},
                dtype=dtype,
                passes=PASSES,
                base=FROZEN,
                contenders=partial(_makers, group.cases(dtype, M), providers, request.device),
            )


def _sizes(request: Request, dtype: str) -> Sequence[tuple[int, int]]:
    on_gpu = request.device != "cpu"
    if request.full:
        tokens = (1, 16, 512, 2048, 8192) if on_gpu else (1, 16, 128, 512, 2048)
        return [(g, M) for M in tokens for g in range(len(GROUPS))]
    if on_gpu:
        return _QUICK_GPU if dtype == "bf16" else ()
    return _QUICK[dtype]


def _makers(cases: Sequence[Case], providers: Sequence[Provider], device: str) -> Makers:
    tensors = [make_tensors(case, device=device) for case in cases]
    x = tensors[0].x
    tensors = [replace(t, x=x) for t in tensors]
    expected = functools.cache(partial(_expected, tensors))
    separate = {p.name: partial(_separate, p, tensors, cases, expected) for p in providers}
    return {**separate, GROUPED: partial(_grouped, tensors, cases, expected)}


def _separate(
    provider: Provider,
    tensors: Sequence[CaseTensors],
    cases: Sequence[Case],
    expected: Callable[[bool], Expected],
) -> Ready:
    built = [provider.build(t, 0.0) for t in tensors]
    adapters = tuple(p for b in built for p in b.adapters)
    return _ready(
        lambda x: [b.call(x) for b in built], adapters, tensors, cases, expected(provider.lora)
    )


def _grouped(
    tensors: Sequence[CaseTensors], cases: Sequence[Case], expected: Callable[[bool], Expected]
) -> Ready:
    own = [t.copy_of_parameters() for t in tensors]
    members = [LoRAWeights(t.w, t.a, t.b, t.scaling, t.bias) for t in own]
    adapters = tuple(p for t in own for p in (t.a, t.b))
    return _ready(lambda x: lora_linear_group(x, members), adapters, tensors, cases, expected(True))


def _ready(
    call: Callable[[Tensor], list[Tensor]],
    adapters: tuple[Tensor, ...],
    tensors: Sequence[CaseTensors],
    cases: Sequence[Case],
    expected: Expected,
) -> Ready:
    x, dys = tensors[0].x, [t.dy for t in tensors]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return call(x)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(x), (x, *adapters), dys)

    def outputs() -> list[tuple[str, Tensor]]:
        names = _names(len(cases), bool(adapters))
        ys = [(f"y{i}", y) for i, y in enumerate(forward())]
        return [*ys, *zip(names, forward_backward(), strict=True)]

    rank = R if adapters else 0
    return Ready(
        calls={FORWARD: forward, FORWARD_BACKWARD: forward_backward},
        check=lambda: judge(outputs(), expected),
        work={p: _work(cases, rank, p) for p in PASSES},
    )


def _names(members: int, lora: bool) -> list[str]:
    """Of the gradients, in their order."""
    return ["dx", *(f"{name}{i}" for i in range(members) for name in ("da", "db") if lora)]


def _expected(tensors: Sequence[CaseTensors], lora: bool) -> Expected:
    dtype = tensors[0].x.dtype
    return Expected(_reference(tensors, lora, torch.float64), _reference(tensors, lora, dtype))


def _reference(tensors: Sequence[CaseTensors], lora: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """y, da, db of each member and the dx that is theirs together, by plain torch in `dtype`."""
    x = tensors[0].x.detach().to(dtype).requires_grad_()
    ys, adapters = [], []
    for t in tensors:
        w, bias = t.w.to(dtype), None if t.bias is None else t.bias.to(dtype)
        if lora:
            a, b = (p.detach().to(dtype).requires_grad_() for p in (t.a, t.b))
            adapters += [a, b]
            ys.append(lora_linear_ref(x, w, a, b, t.scaling, bias)[0])
        else:
            ys.append(torch.nn.functional.linear(x, w, bias))
    gradients = torch.autograd.grad(ys, (x, *adapters), [t.dy.to(dtype) for t in tensors])
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    return found | dict(zip(_names(len(ys), lora), gradients, strict=True))


def _work(cases: Sequence[Case], rank: int, pass_: str) -> Work:
    """As of the members, but x is read once a pass and dx is written once."""
    M, K = cases[0].M, cases[0].layer.K
    outputs = sum(M * c.layer.N + c.layer.N * K + rank * (K + c.layer.N) for c in cases)
    elements = M * K + outputs
    if pass_ == FORWARD_BACKWARD:
        adapters = sum(rank * (K + c.layer.N) for c in cases)
        elements = 2 * elements + (M * K + adapters if rank else 0)
    total = sum(flops(c.layer, M, rank, pass_) for c in cases)
    return Work(total, elements * TORCH_DTYPES[cases[0].dtype].itemsize)


SUITE = Suite("group", "Layers on one input (q/k/v, gate/up): one read of x", 90, items)
