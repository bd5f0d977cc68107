"""Call → Problem → the backends that can run it → Config. Nothing is done at import.

LORA_FUSED_BACKEND=torch|cpu replaces backend="auto", LORA_FUSED_VERBOSE=1 prints each choice once;
both are read at the first use of a kind of call and remembered with its choice.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from typing import Any

import torch
from torch import Tensor

from lora_fused import checks
from lora_fused.backends import BACKENDS
from lora_fused.backends import cpu as cpu_backend
from lora_fused.backends.cpu import PackedWeight
from lora_fused.backends.cpu_rule import choose_cpu
from lora_fused.config import GRADIENT_NAMES, Config, Problem, Route

_MAX_ROUTES = 4096
_routes: dict[Any, Route] = {}


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
) -> Route:
    """Check a call and choose how to run it; the answer for this metadata is remembered.

    needs overrides what gradient mode and requires_grad say. With cast_weight x has the compute
    dtype already, and the weight may have another. Raises what checks.check_call raises.
    """
    key = (
        _facts(x), _facts(weight), weight.stride(), _facts(lora_A), _facts(lora_B), _facts(bias),
        dropout, backend, None if packed is None else packed.dtype, needs, cast_weight,
        torch.is_grad_enabled(), torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        checks.compute_dtype(x) if torch._C._is_any_autocast_enabled() else None,
    )  # fmt: skip
    route = _routes.get(key)
    if route is None:
        if len(_routes) >= _MAX_ROUTES:
            _routes.clear()
        params = (weight, lora_A, lora_B, bias)
        route = _routes[key] = _find_route(x, params, dropout, backend, packed, needs, cast_weight)
    return route


def _facts(t: Tensor | None) -> Any:
    """What checks and choices depend on; computed at every call, so only cheap attributes."""
    if t is None:
        return None
    return t.shape, t.dtype, t.device, t.layout, t.requires_grad, t.is_neg(), type(t)


def _find_route(
    x: Tensor,
    params: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    dropout: bool,
    backend: str,
    packed: PackedWeight | None,
    needs: frozenset[str] | None,
    cast_weight: bool,
) -> Route:
    weight, lora_A, _, bias = params
    compute = x.dtype if cast_weight else checks.compute_dtype(x)
    checks.check_call(x, *params, compute, cast_weight or checks.autocast_is_on(x))
    if needs is None:
        tensors = zip(GRADIENT_NAMES, (x, *params), strict=True)
        wanting = (name for name, t in tensors if t is not None and t.requires_grad)
        needs = frozenset(wanting if torch.is_grad_enabled() else ())
    (N, K), stride = weight.shape, weight.stride()
    problem = Problem(
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
    )
    dtypes = tuple(None if t is None else t.dtype for t in params)
    return Route(
        problem=problem,
        config=choose(problem, backend),
        compute=compute,
        cast=any(dtype not in (None, compute) for dtype in dtypes),
        needs=needs,
        x_shape=tuple(x.shape),
        y_shape=(*x.shape[:-1], N),
        param_dtypes=dtypes,
    )


def _is_plain(t: Tensor) -> bool:
    """An ordinary tensor: data pointer and strides say all there is to know about its values."""
    return type(t) in (Tensor, torch.nn.Parameter) and not t.is_neg()


def choose(problem: Problem, backend: str = "auto") -> Config:
    """The Config for a Problem. Cached: asking again costs a dictionary look-up.

    Raises ValueError for an unknown backend, and for one that was named but cannot run the problem.
    """
    return _choose(problem, resolve_backend(backend))


def resolve_backend(backend: str) -> str:
    """The backend asked for: the argument, or LORA_FUSED_BACKEND where the argument is "auto"."""
    source = "backend"
    if backend == "auto":
        source, backend = "LORA_FUSED_BACKEND", os.environ.get("LORA_FUSED_BACKEND") or "auto"
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"{source} is {backend!r}, expected one of auto, {', '.join(BACKENDS)}.")
    return backend


def reasons_against(problem: Problem) -> dict[str, list[str]]:
    """For each backend why it cannot run the problem; an empty list where it can."""
    return {name: module.not_supported_reasons(problem) for name, module in BACKENDS.items()}


@functools.lru_cache(maxsize=8192)
def _choose(problem: Problem, backend: str) -> Config:
    against = reasons_against(problem)
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
    _choose.cache_clear()
    cpu_backend.isa.cache_clear()
    cpu_backend.info.cache_clear()
