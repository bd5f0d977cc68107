"""torch.compile over the layers of torch, of PEFT and ours, eager beside compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.numerics import Checker
from benchmarks.providers import FROZEN, NAIVE, OURS, PEFT, Built, Provider
from benchmarks.shapes import PASSES, Case, Layer
from benchmarks.suites.item import Item, Makers, Request, Suite
from benchmarks.suites.layers import present, ready_of, shape_of
from benchmarks.tensors import make_tensors

CONTENDERS = (FROZEN, NAIVE, PEFT, OURS)
_LAYER = Layer("llama-3.2-1b", "q", 2048, 2048)
_BIASED = Layer("roberta-large", "query", 1024, 1024, bias=True)
_QUICK = {
    "bf16": (Case(_LAYER, "bf16", 128, 16), Case(_BIASED, "bf16", 16, 8)),
    "fp32": (Case(_BIASED, "fp32", 128, 8),),
    "fp16": (),
}


def items(request: Request) -> Iterator[Item]:
    providers = present(CONTENDERS, request.device)
    for case in _cases(request):
        yield Item(
            name=case.layer.key,
            shape=shape_of(case),
            dtype=case.dtype,
            passes=PASSES,
            base=FROZEN,
            contenders=partial(_makers, case, providers, request.device),
        )


def _cases(request: Request) -> list[Case]:
    if not request.full:
        return [case for dtype in request.dtypes for case in _QUICK[dtype]]
    return [
        Case(layer, dtype, M, 16)
        for dtype in request.dtypes
        for layer in (_LAYER, _BIASED)
        for M in (1, 16, 128, 512, 2048)
    ]


def _makers(case: Case, providers: Sequence[Provider], device: str) -> Makers:
    torch.compiler.reset()  # what was compiled for the item before, and its count of recompilations
    tensors = make_tensors(case, device=device)
    checker = Checker(case, tensors)
    eager = {p.name: partial(ready_of, p, tensors, checker, PASSES) for p in providers}
    compiled = {
        f"compile-{p.name}": partial(ready_of, p, tensors, checker, PASSES, _compiled)
        for p in providers
    }
    return eager | compiled


def _compiled(built: Built) -> Built:
    """One graph for these very shapes, or an error: nothing falls back to eager."""
    return replace(built, call=torch.compile(built.call, fullgraph=True, dynamic=False))


SUITE = Suite("compile", "The layer eager and under torch.compile", 180, items)
