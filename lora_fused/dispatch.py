"""Call → Problem → the backends that can run it → Config. Nothing is done at import.

LORA_FUSED_BACKEND=cpu|cuda|triton|torch replaces backend="auto", LORA_FUSED_VERBOSE=1 prints each
choice once; both are read at the first use of a kind of call and remembered with its choice.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_fused import backends, checks, gpu_choice
from lora_fused.backends import BACKENDS, cpu_layer
from lora_fused.backends import cpu as cpu_backend
from lora_fused.backends.cpu import PackedWeight
from lora_fused.backends.cpu_rule import choose_cpu
from lora_fused.choices import Choices
from lora_fused.config import (
    FUSED_STRATEGIES,
    Config,
    Problem,
    Route,
)
from lora_fused.devices import DEVICES
from lora_fused.request import facts_of, gpu_facts, problem_of

if TYPE_CHECKING:
    from lora_fused.gpu_tuning import Trial

_MAX_ROUTES = 4096
_routes = Choices[Route](_MAX_ROUTES)
_forced: list[Config] = []
_also_forget: list[Callable[[], None]] = []


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
    on_gpu = (*gpu_facts(x, weight, lora_A, lora_B), given_mask) if x.is_cuda else None
    key = (
        facts_of(x, weight, lora_A, lora_B, bias), dropout, backend,
        None if packed is None else packed.dtype, needs, cast_weight, on_gpu, modes_of(x),
    )  # fmt: skip
    route = _routes.get(key, x)
    if route is None:
        params = (weight, lora_A, lora_B, bias)
        problem = problem_of(x, params, dropout, packed, needs, cast_weight, on_gpu)
        if problem.device is None or problem.R == 0:
            config, final = choose(problem, backend), True
        else:
            trial = _trial_of(problem, x, params)
            config, final = choose_on_gpu(problem, backend, x.device, trial)
        route = _route(problem, x, params, config)
        _routes.keep(key, route, final)
    return route


def modes_of(x: Tensor) -> tuple[object, ...]:
    """The modes of torch that checks and choices depend on."""
    return (
        torch.is_grad_enabled(), torch.get_num_threads(),
        torch._C._get_deterministic_algorithms(),
        checks.compute_dtype(x) if torch._C._is_any_autocast_enabled() else None,
    )  # fmt: skip


def _route(
    problem: Problem,
    x: Tensor,
    params: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    config: Config,
) -> Route:
    dtypes = tuple(None if t is None else t.dtype for t in params)
    layers = (
        cpu_layer.layer_of(problem, config, dtypes) if config.backend == "cpu" else (None, None)
    )
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
        forward_layer=layers[0],
        backward_layer=layers[1],
    )


def _takes_wide_adapters(problem: Problem, config: Config) -> bool:
    used = {config.forward, config.dx} if "x" in problem.needs else {config.forward}
    if used <= FUSED_STRATEGIES | {"split"}:
        takes = getattr(BACKENDS[config.backend], "takes_wide_adapters", None)
        return takes is not None and bool(takes(problem))
    return False


def choose_on_gpu(
    problem: Problem, backend: str, where: torch.device, trial: Trial
) -> tuple[Config, bool]:
    """The Config for tensors on a GPU, and whether it is the last word on such calls.

    trial makes the calls to time, see gpu_tuning.Trial.
    """
    from lora_fused import gpu_tuning

    asked = resolve_backend(backend)
    names = gpu_backends_for(problem, asked)
    if _forced or not names or not gpu_choice.parts_of(problem):
        return choose(problem, backend), True
    config, provisional = gpu_tuning.choose(problem, names, where, trial)
    config = replace(config, notes=_notes(config.backend, reasons_against(problem, asked)))
    _announce(problem, config)
    return config, not provisional


def _trial_of(
    problem: Problem,
    x: Tensor,
    params: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
) -> Trial:
    """The calls to time for one layer."""
    from lora_fused import gpu_trial

    weight, lora_A, lora_B, bias = params
    assert lora_A is not None and lora_B is not None
    tensors = gpu_trial.Tensors(x, weight, lora_A, lora_B, bias)
    return functools.partial(gpu_trial.runs_of_layer, problem, tensors)


def gpu_backends_for(problem: Problem, asked: str = "auto") -> tuple[str, ...]:
    """The backends with kernels for the problem, as far as they were asked for."""
    against = reasons_against(problem, asked)
    return tuple(
        name
        for name in gpu_choice.GPU_BACKENDS
        if asked in ("auto", name)
        and name in against
        and not against[name]
        and (not problem.group or hasattr(BACKENDS[name], "group_forward"))
    )


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
    if backend == "auto" and problem.device is not None:
        config = gpu_choice.configure_by_model(problem, gpu_backends_for(problem))
        return replace(config, notes=_notes(config.backend, against))
    if backend != "auto" and against[backend]:
        raise ValueError(
            f"backend {backend!r} cannot run {problem}: {'; '.join(against[backend])}."
        )
    chosen = backend if backend != "auto" else next(n for n, why in against.items() if not why)
    config = _configure(chosen, problem, against)
    _announce(problem, config)
    return config


def _announce(problem: Problem, config: Config) -> None:
    if os.environ.get("LORA_FUSED_VERBOSE") == "1":
        print(f"lora_fused: {problem} -> {config}{_in_words(config.notes)}", file=sys.stderr)


def _configure(chosen: str, problem: Problem, against: dict[str, list[str]]) -> Config:
    if chosen == "cpu":
        return choose_cpu(problem, cpu_backend.info())
    if chosen in gpu_choice.GPU_BACKENDS:
        model = replace(problem, device=problem.device or DEVICES["H100"])
        return gpu_choice.configure_by_model(model, (chosen,))
    return Config(chosen, notes=_notes(chosen, against) or ("it was asked for",))


def _notes(chosen: str, against: dict[str, list[str]]) -> tuple[str, ...]:
    """Why it is not another backend."""
    return tuple(
        f"{name}: {reason}" for name, why in against.items() if name != chosen for reason in why
    )


def _in_words(notes: tuple[str, ...]) -> str:
    return f" ({'; '.join(notes)})" if notes else ""


def also_forget(forget: Callable[[], None]) -> None:
    """Register what forget_choices has to drop elsewhere."""
    _also_forget.append(forget)


def forget_choices() -> None:
    """Drop every remembered choice, so that environment variables are read again."""
    _routes.clear()
    for forget in _also_forget:
        forget()
    _choose.cache_clear()
    cpu_backend.isa.cache_clear()
    cpu_backend.info.cache_clear()
