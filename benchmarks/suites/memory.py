"""Peak memory of a layer's forward + backward, each contender in a process of its own.

The adapters are fp32, as PEFT's are by default; where a provider takes no others than the base's
dtype, its record says so. The numerics are checked on few tokens here, before
the process is started. A quick run has the contenders of the memory section, a full one all that
can run; `--providers` names others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from benchmarks.memory import SECTION_CASE, SECTION_PROVIDERS, measure_in_fresh_process
from benchmarks.numerics import Checker, Verdict
from benchmarks.providers import ALL_PROVIDERS, FROZEN, Provider, named
from benchmarks.shapes import FORWARD_BACKWARD, Case, Layer
from benchmarks.suites.item import Item, Makers, Memory, Ready, Request, Suite
from benchmarks.suites.layers import present, shape_of
from benchmarks.tensors import make_tensors

_CHECKED_TOKENS = 16
_GATE = Layer("llama-3.2-1b", "gate", 2048, 8192)
_QUICK = (
    SECTION_CASE,
    replace(SECTION_CASE, dropouts=(0.0,)),
    Case(_GATE, "bf16", 512, 16, (0.05,)),
    replace(SECTION_CASE, dtype="fp32", dropouts=(0.0,)),
)
_MORE = (
    Case(_GATE, "bf16", 2048, 16, (0.05,)),
    Case(Layer("llama-3.2-1b", "down", 8192, 2048), "bf16", 2048, 16, (0.05,)),
    Case(Layer("llama-3.2-1b", "q", 2048, 2048), "bf16", 8192, 64, (0.05,)),
    Case(Layer("llama-3.2-1b", "q", 2048, 2048), "bf16", 16, 16, (0.0,)),
)


def items(request: Request) -> Iterator[Item]:
    providers = present(names_of(request), request.device)
    for case in (*_QUICK, *_MORE) if request.full else _QUICK:
        if case.dtype not in request.dtypes:
            continue
        dropout = f", dropout {case.dropouts[0]:g}" if case.dropouts[0] else ""
        yield Item(
            name=f"{case.layer.key}{dropout}",
            shape=shape_of(case),
            dtype=case.dtype,
            passes=(FORWARD_BACKWARD,),
            base=FROZEN,
            contenders=partial(_makers, case, providers, request.device),
        )


def names_of(request: Request) -> Sequence[str]:
    """Who takes part. With fp32 adapters for all, `peft-fp32` is `peft` once more."""
    if request.providers:
        return [p.name for p in named(request.providers)]
    every = [p.name for p in ALL_PROVIDERS if p.adapter_dtype is None]
    return every if request.full else SECTION_PROVIDERS


def _makers(case: Case, providers: Sequence[Provider], device: str) -> Makers:
    few = replace(case, M=_CHECKED_TOKENS)
    tensors = make_tensors(few, device=device)
    checker = Checker(few, tensors)

    def ready(provider: Provider) -> Ready:
        built = provider.build(tensors, 0.0)

        def check() -> Verdict:
            verdict = checker.check(provider, built, 0.0)
            if provider.mixed or case.dtype == "fp32":
                return verdict
            return replace(verdict, message=verdict.message or f"adapters in {case.dtype}")

        return Ready(
            calls={},
            check=check,
            memory=partial(_measured, provider.name, case, device),
        )

    return {p.name: partial(ready, p) for p in providers}


def _measured(provider: str, case: Case, device: str) -> Memory:
    found = measure_in_fresh_process(provider, 1, case, device)
    return Memory(found.peak_bytes, found.held_bytes, found.resident_bytes)


SUITE = Suite("memory", "Peak memory of forward + backward, fp32 adapters", 120, items)
