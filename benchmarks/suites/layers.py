"""Single layers as contenders: the harness's providers, built, checked and called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.numerics import Checker
from benchmarks.providers import ALL_PROVIDERS, Built, Provider
from benchmarks.roofline import layer_bytes
from benchmarks.shapes import FORWARD, Case, flops
from benchmarks.suites.item import Makers, Ready, Work
from benchmarks.tensors import CaseTensors, make_tensors


def present(names: Sequence[str], device: str) -> list[Provider]:
    """Those of the named providers that can run on the device."""
    return [p for p in ALL_PROVIDERS if p.name in names and p.missing(device) is None]


def makers_of(
    case: Case, providers: Sequence[Provider], passes: Sequence[str], device: str
) -> Makers:
    """A maker per provider, on tensors and references that are made once."""
    tensors = make_tensors(case, device=device)
    checker = Checker(case, tensors)
    return {p.name: partial(ready_of, p, tensors, checker, passes) for p in providers}


def ready_of(
    provider: Provider,
    tensors: CaseTensors,
    checker: Checker,
    passes: Sequence[str],
    change: Callable[[Built], Built] = lambda built: built,
) -> Ready:
    """A provider's layer without dropout, checked against float64. change: how it is called."""
    built = change(provider.build(tensors, 0.0))
    calls = {FORWARD: built.forward, "F+B": built.forward_backward}
    rank = checker.case.R if provider.lora else 0
    return Ready(
        calls={p: calls[p] for p in passes},
        check=lambda: checker.check(provider, built, 0.0),
        work={p: layer_work(checker.case, rank, p) for p in passes},
    )


def layer_work(case: Case, R: int, pass_: str) -> Work:
    """Of a LoRA layer (R = 0: the frozen one)."""
    M, K, N = case.M, case.layer.K, case.layer.N
    moved = layer_bytes(M, K, N, R, case.dtype, pass_)
    return Work(flops(case.layer, M, R, pass_), moved)


def shape_of(case: Case) -> dict[str, int]:
    return {"M": case.M, "K": case.layer.K, "N": case.layer.N, "R": case.R}
