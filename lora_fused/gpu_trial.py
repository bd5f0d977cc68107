"""The calls that are timed for a choice on a GPU: one part by one option, as autograd runs it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_fused.autograd import Saved, lora_backward, lora_forward
from lora_fused.backends import BACKENDS
from lora_fused.config import Call, Config, Mask, Member, Problem, Route
from lora_fused.gpu_choice import Option

_DROPOUT = 6554  # of 65536
_NEEDS = {
    "forward": frozenset[str](),
    "dx": frozenset({"x"}),
    "reduce": frozenset({"lora_A", "lora_B"}),
    "backward": frozenset({"x", "lora_A", "lora_B"}),
}


class Tensors(NamedTuple):
    """The arguments of the call that is tuned for, as they were given."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None


def runs_of_layer(
    problem: Problem, tensors: Tensors, part: str, candidates: list[Option]
) -> dict[str, Callable[[], object]]:
    """One call per candidate: the part as autograd runs it, on the call's own tensors."""
    where, dtype = tensors.x.device, problem.dtype
    x, weight, lora_A, lora_B, bias = (None if t is None else t.detach().to(dtype) for t in tensors)
    assert x is not None and weight is not None and lora_A is not None and lora_B is not None
    generator = torch.Generator(where).manual_seed(0)
    dy = s = None
    if part != "forward":
        dy = torch.randn(problem.M, problem.N, dtype=dtype, device=where, generator=generator)
        s = torch.randn(problem.M, problem.R, dtype=dtype, device=where, generator=generator)
    saved = Saved(x, s, weight, lora_A, lora_B)

    def run(option: Option) -> object:
        call = _call(problem, part, option, tensors, generator)
        with torch.no_grad():
            if dy is None:
                return lora_forward(call, x, weight, lora_A, lora_B, bias)
            return lora_backward(call, dy, saved)

    return {option.name: functools.partial(run, option) for option in candidates}


def _call(
    problem: Problem, part: str, option: Option, tensors: Tensors, generator: torch.Generator
) -> Call:
    config, wanted = option.config(), _NEEDS[part]
    x, where = tensors.x, tensors.x.device
    y_shape = (*x.shape[:-1], problem.N)
    dtypes = (problem.dtype,) * 4
    route = Route(problem, config, problem.dtype, False, wanted, tuple(x.shape), y_shape, dtypes)
    if not problem.dropout:
        return Call(route, 1.0)
    if option.is_library or problem.given_mask:
        keep = torch.empty(problem.M, problem.K, dtype=torch.bool, device=where)
        return Call(route, 1.0, keep=keep.bernoulli_(0.9, generator=generator))
    seed = torch.ones((), dtype=torch.int64, device=where)
    return Call(route, 1.0, Mask(1 if where.type == "cpu" else seed, _DROPOUT))


def runs_of_group(
    problem: Problem, layers: Sequence[Tensors], part: str, candidates: list[Option]
) -> dict[str, Callable[[], object]]:
    """The same for a group on one x: its launches, or its layers one after the other by torch."""
    x = layers[0].x.detach()
    where, dtype = x.device, problem.dtype
    generator = torch.Generator(where).manual_seed(0)
    singles = [
        runs_of_layer(_alone(problem, N, R), layer, part, [library])[library.name]
        for library in candidates
        if library.is_library
        for (N, R), layer in zip(problem.group, layers, strict=True)
    ]
    members = [_member(layer, problem, part) for layer in layers]
    dys = [
        torch.randn(problem.M, N, dtype=dtype, device=where, generator=generator)
        for N, _ in problem.group
        if part != "forward"
    ]
    s = torch.randn(problem.M, problem.R, dtype=dtype, device=where, generator=generator)

    def run(option: Option) -> object:
        if option.is_library:
            return [single() for single in singles]
        ops, route = BACKENDS[option.backend], _group_route(problem, part, option, x)
        with torch.no_grad(), torch.autocast(where.type, enabled=False):
            if part == "forward":
                return ops.group_forward(route, x, members)
            return ops.group_backward(route, dys, x, s, members)

    return {option.name: functools.partial(run, option) for option in candidates}


def _alone(problem: Problem, N: int, R: int) -> Problem:
    return replace(problem, N=N, R=R, group=())


def _member(layer: Tensors, problem: Problem, part: str) -> Member:
    _, weight, lora_A, lora_B, bias = (
        None if t is None else t.detach().to(problem.dtype) for t in layer
    )
    assert weight is not None and lora_A is not None and lora_B is not None
    mask = None
    if problem.dropout:
        where = weight.device
        seed = torch.ones((), dtype=torch.int64, device=where)
        mask = Mask(1 if where.type == "cpu" else seed, _DROPOUT)
    return Member(weight, lora_A, lora_B, bias, 1.0, mask, _NEEDS[part], lora_A.dtype, lora_B.dtype)


def _group_route(problem: Problem, part: str, option: Option, x: Tensor) -> Route:
    """What the part does not time runs by `split`: hooks are not called with "library"."""
    config = option.config()
    config = Config(
        config.backend,
        "split" if config.forward == "library" else config.forward,
        "split" if config.dx == "library" else config.dx,
        forward_tiles=config.forward_tiles,
        dx_tiles=config.dx_tiles,
        shrink_tiles=config.shrink_tiles,
        reduce_tiles=config.reduce_tiles,
    )
    shapes = tuple(x.shape), (*x.shape[:-1], problem.N)
    dtypes = (problem.dtype,) * 4
    return Route(problem, config, problem.dtype, False, _NEEDS[part], *shapes, dtypes)
