"""All operations of the Triton backend on one case, held against the reference."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lora_fused.backends import triton
from lora_fused.backends.triton.candidates import default_tiles
from lora_fused.config import FUSED_STRATEGIES, Config, Mask, Problem, Route, Tiles
from lora_fused.reference import dropout_threshold, effective_scaling
from lora_fused.testing import Case, assert_close_to_ref

OPERATIONS = ("forward", "dx", "shrink", "reduce")


def problem_of(case: Case) -> Problem:
    """The Problem of a case."""
    (M, K), (N, R) = case.x.shape, case.lora_B.shape
    return Problem(
        M, K, N, R, case.x.dtype, adapter_dtype=case.lora_A.dtype, has_bias=case.bias is not None,
        dropout=case.dropout_p > 0, needs=frozenset({"x", "lora_A", "lora_B"}),
    )  # fmt: skip


def route_of(case: Case, strategy: str = "split", **tiles: Tiles) -> Route:
    """A Route with one strategy for both directions, and tiles by operation."""
    problem = problem_of(case)
    chosen = {f"{name}_tiles": tiles.get(name, default_tiles(problem, name)) for name in OPERATIONS}
    return Route(
        problem=problem,
        config=Config("triton", strategy, strategy, **chosen),
        compute=problem.dtype,
        cast=False,
        needs=problem.needs,
        x_shape=tuple(case.x.shape),
        y_shape=(problem.M, problem.N),
        param_dtypes=(problem.dtype, case.lora_A.dtype, case.lora_B.dtype, problem.dtype),
    )


def run_operations(case: Case, route: Route) -> dict[str, Tensor]:
    """y, s, dx, da and db of a case, as autograd would ask for them."""
    scale, mask = case.scaling, None
    if case.dropout_p > 0:
        scale = effective_scaling(case.scaling, case.dropout_p)
        mask = Mask(case.seed, dropout_threshold(case.dropout_p))
    x, w, a, b, dy = case.x, case.weight, case.lora_A, case.lora_B, case.dy
    if route.config.forward in FUSED_STRATEGIES:
        y, s = triton.shrink_matmul(route, "forward", x, w, a, b, scale, case.bias)
        dx, ds = triton.shrink_matmul(route, "dx", dy, w, b, a, scale)
    else:
        s = triton.shrink(route, x, a, scale, mask)
        y = triton.matmul(route, "forward", x, w, s, b, case.bias)
        found, _ = triton.shrink_reduce(route, dy, b, scale, s, True, None)
        assert found is not None
        ds = found
        dx = triton.matmul(route, "dx", dy, w, ds, a, mask=mask)
    da, db = triton.reduce_pair(route, ds, x, mask, a.dtype, dy, s, b.dtype)
    assert da is not None and db is not None
    return {"y": y, "s": s, "dx": dx, "da": da, "db": db}


def check_operations(case: Case, route: Route) -> None:
    """Every output against the numerics contract."""
    truth, baseline = case.truth(), case.baseline()
    for name, got in run_operations(case, route).items():
        assert_close_to_ref(name, got, truth[name], baseline[name])


def spread(case: Case) -> Case:
    """The same case with tensors that are not contiguous: every other column of wider ones."""

    def apart(t: Tensor) -> Tensor:
        return torch.stack((t, torch.full_like(t, torch.nan)), dim=-1)[..., 0]

    return replace(
        case, x=apart(case.x), weight=apart(case.weight), lora_A=apart(case.lora_A),
        lora_B=apart(case.lora_B), dy=apart(case.dy),
        bias=None if case.bias is None else apart(case.bias),
    )  # fmt: skip
