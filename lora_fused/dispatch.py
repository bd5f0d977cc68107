"""Call → Problem → the backends that can run it → Config. Nothing is done at import.

LORA_FUSED_BACKEND=cpu|cuda|triton|torch replaces backend="auto", LORA_FUSED_VERBOSE=1 prints each
choice once; both are read at the first use of a kind of call and remembered with its choice.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_fused import backends, checks
from lora_fused.backends import BACKENDS
from lora_fused.backends import cpu as cpu_backend
from lora_fused.backends.cpu import PackedWeight
from lora_fused.backends.cpu_rule import choose_cpu
from lora_fused.config import (
    FUSED_STRATEGIES,
    GRADIENT_NAMES,
    Config,
    Problem,
    Route,
    group_columns,
)
from lora_fused.devices import device_of

_MAX_ROUTES = 4096
_routes: dict[Any, Route] = {}
_group_routes: dict[tuple[int, ...], tuple[list[Route], Route | None]] = {}
_forced: list[Config] = []


def route_for(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    dropout: bool,
    backend: str,
    packed: PackedWeight | None = None,
    needs: frozenset[str] | None = None,
    cast_weight: bool = False,
    given_mask: bool = False,
) -> Route:
    """Check a call and choose how to run it; the answer for this metadata is remembered.

    needs overrides what gradient mode and requires_grad say. With cast_weight x has the compute
    dtype already, and the weight may have another. given_mask: the caller drew the dropout mask.
    Raises what checks.check_call raises.
    """
    aligned = not x.is_cuda or _are_aligned(x, weight, lora_A, lora_B)
    key = (
        _facts(x), _facts(weight), weight.stride(), _facts(lora_A), _facts(lora_B), _facts(bias),
        dropout, backend, None if packed is None else packed.dtype, needs, cast_weight,
        given_mask, aligned,
        torch.is_grad_enabled(), torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        checks.compute_dtype(x) if torch._C._is_any_autocast_enabled() else None,
    )  # fmt: skip
    route = _routes.get(key)
    if route is None:
        if len(_routes) >= _MAX_ROUTES:
            _routes.clear()
        params = (weight, lora_A, lora_B, bias)
        problem = _problem(x, params, dropout, packed, needs, cast_weight, given_mask, aligned)
        route = _routes[key] = _route(problem, x, params, choose(problem, backend))
    return route


def _facts(t: Tensor | None) -> Any:
    """What checks and choices depend on; computed at every call, so only cheap attributes."""
    if t is None:
        return None
    return t.shape, t.dtype, t.device, t.layout, t.requires_grad, t.is_neg(), type(t)


def _are_aligned(*tensors: Tensor | None) -> bool:
    """Whether every row begins at a multiple of 16 bytes, as wide loads and TMA want it."""
    for t in tensors:
        if t is not None and t.numel() > 0:
            strides = [stride for stride in t.stride() if stride != 1]
            if any((stride * t.element_size()) % 16 for stride in strides) or t.data_ptr() % 16:
                return False
    return True


def _problem(
    x: Tensor,
    params: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    dropout: bool,
    packed: PackedWeight | None,
    needs: frozenset[str] | None,
    cast_weight: bool,
    given_mask: bool,
    aligned: bool,
) -> Problem:
    """Check the call and say what it asks for."""
    weight, lora_A, _, bias = params
    compute = x.dtype if cast_weight else checks.compute_dtype(x)
    checks.check_call(x, *params, compute, cast_weight or checks.autocast_is_on(x))
    if needs is None:
        tensors = zip(GRADIENT_NAMES, (x, *params), strict=True)
        wanting = (name for name, t in tensors if t is not None and t.requires_grad)
        needs = frozenset(wanting if torch.is_grad_enabled() else ())
    (N, K), stride = weight.shape, weight.stride()
    return Problem(
        M=math.prod(x.shape[:-1]),
        K=K,
        N=N,
        R=0 if lora_A is None else lora_A.shape[0],
        dtype=compute,
        device_type=x.device.type,
        adapter_dtype=None if lora_A is None else lora_A.dtype,
        has_bias=bias is not None,
        dropout=dropout,
        needs=needs,
        prepacked=packed is not None and packed.dtype == compute,
        weight_layout="row" if stride[1] == 1 else "column" if stride[0] == 1 else "strided",
        plain=all(t is None or _is_plain(t) for t in (x, *params)),
        threads=torch.get_num_threads(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        device=device_of(x.device) if x.is_cuda else None,
        aligned=aligned,
        given_mask=given_mask,
    )


def _route(
    problem: Problem,
    x: Tensor,
    params: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    config: Config,
) -> Route:
    dtypes = tuple(None if t is None else t.dtype for t in params)
    return Route(
        problem=problem,
        config=config,
        compute=problem.dtype,
        cast=any(dtype not in (None, problem.dtype) for dtype in dtypes),
        needs=problem.needs,
        x_shape=tuple(x.shape),
        y_shape=(*x.shape[:-1], problem.N),
        param_dtypes=dtypes,
        wide_adapters=_takes_wide_adapters(problem, config),
    )


def _takes_wide_adapters(problem: Problem, config: Config) -> bool:
    if {config.forward, config.dx} <= FUSED_STRATEGIES | {"split"}:
        takes = getattr(BACKENDS[config.backend], "takes_wide_adapters", None)
        return takes is not None and bool(takes(problem))
    return False


def group_route_for(routes: list[Route], backend: str) -> Route | None:
    """How to run the members with these routes in one go; None where no backend can."""
    key = tuple(id(route) for route in routes)
    known = _group_routes.get(key)
    if known is None or any(a is not b for a, b in zip(known[0], routes, strict=True)):
        if len(_group_routes) >= _MAX_ROUTES:
            _group_routes.clear()
        known = _group_routes[key] = routes, _find_group_route(routes, backend)
    return known[1]


def _find_group_route(routes: list[Route], backend: str) -> Route | None:
    first, problems = routes[0], [route.problem for route in routes]
    layouts = {problem.weight_layout for problem in problems}
    needs = frozenset[str]().union(*(problem.needs for problem in problems))
    problem = replace(
        first.problem,
        N=sum(problem.N for problem in problems),
        R=group_columns([problem.R for problem in problems])[1],
        has_bias=any(problem.has_bias for problem in problems),
        dropout=any(problem.dropout for problem in problems),
        needs=needs,
        weight_layout=layouts.pop() if len(layouts) == 1 else "strided",
        plain=all(problem.plain for problem in problems),
        aligned=all(problem.aligned for problem in problems),
        group=tuple((problem.N, problem.R) for problem in problems),
    )
    config = choose(problem, backend)
    if not hasattr(BACKENDS[config.backend], "group_forward"):
        return None
    return replace(
        first,
        problem=problem,
        config=config,
        needs=needs,
        y_shape=(*first.x_shape[:-1], problem.N),
        wide_adapters=False,
    )


def _is_plain(t: Tensor) -> bool:
    """An ordinary tensor: data pointer and strides say all there is to know about its values."""
    return type(t) in (Tensor, torch.nn.Parameter) and not t.is_neg()


def choose(problem: Problem, backend: str = "auto") -> Config:
    """The Config for a Problem. Cached: asking again costs a dictionary look-up.

    Raises ValueError for an unknown backend, and for one that was named but cannot run the problem.
    """
    return _choose(problem, resolve_backend(backend))


@contextmanager
def forcing(config: Config) -> Iterator[None]:
    """Every choice is this Config while the context lasts. For tests and checks of kernels."""
    forget_choices()
    _forced.append(config)
    try:
        yield
    finally:
        _forced.pop()
        forget_choices()


def resolve_backend(backend: str) -> str:
    """The backend asked for: the argument, or LORA_FUSED_BACKEND where the argument is "auto"."""
    source = "backend"
    if backend == "auto":
        source, backend = "LORA_FUSED_BACKEND", os.environ.get("LORA_FUSED_BACKEND") or "auto"
    if backend != "auto" and backend not in backends.NAMES:
        names = ", ".join(backends.NAMES)
        raise ValueError(f"{source} is {backend!r}, expected one of auto, {names}.")
    return backend


def reasons_against(problem: Problem, asked: str = "auto") -> dict[str, list[str]]:
    """For each backend why it cannot run the problem; an empty list where it can.

    Backends for GPUs are looked at for tensors on a GPU, and where they were asked for.
    """
    names = [
        name
        for name in backends.NAMES
        if name in ("cpu", "torch", asked) or problem.device is not None
    ]
    return {name: _reasons(name, problem) for name in names}


def _reasons(name: str, problem: Problem) -> list[str]:
    module = backends.load(name)
    if module is None:
        return [backends.why_missing(name)]
    reasons: list[str] = module.not_supported_reasons(problem)
    return reasons


@functools.lru_cache(maxsize=8192)
def _choose(problem: Problem, backend: str) -> Config:
    if _forced:
        backends.load(_forced[-1].backend)
        return _forced[-1]
    against = reasons_against(problem, backend)
    if backend != "auto" and against[backend]:
        raise ValueError(
            f"backend {backend!r} cannot run {problem}: {'; '.join(against[backend])}."
        )
    chosen = backend if backend != "auto" else next(n for n, why in against.items() if not why)
    config = _configure(chosen, problem, against)
    if os.environ.get("LORA_FUSED_VERBOSE") == "1":
        print(f"lora_fused: {problem} -> {config}{_in_words(config.notes)}", file=sys.stderr)
    return config


def _configure(chosen: str, problem: Problem, against: dict[str, list[str]]) -> Config:
    if chosen == "cpu":
        return choose_cpu(problem, cpu_backend.info())
    notes = tuple(
        f"{name}: {reason}" for name, why in against.items() if name != chosen for reason in why
    )
    return Config(chosen, notes=notes or ("it was asked for",))


def _in_words(notes: tuple[str, ...]) -> str:
    return f" ({'; '.join(notes)})" if notes else ""


def forget_choices() -> None:
    """Drop every remembered choice, so that environment variables are read again."""
    _routes.clear()
    _group_routes.clear()
    _choose.cache_clear()
    cpu_backend.isa.cache_clear()
    cpu_backend.info.cache_clear()
