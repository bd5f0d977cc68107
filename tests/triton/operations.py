"""All operations of the Triton backend on one case, held against the reference."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lora_fused.backends import triton
from lora_fused.backends.triton.candidates import default_tiles
from lora_fused.config import (
    FUSED_STRATEGIES,
    Config,
    Mask,
    Member,
    Problem,
    Route,
    Tiles,
    group_columns,
)
from lora_fused.reference import dropout_threshold, effective_scaling
from lora_fused.testing import Case, assert_close_to_ref, make_case

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


def group_case(
    M: int, K: int, sizes: list[tuple[int, int]], dtype: torch.dtype, dropout: str
) -> list[Case]:
    """One case per (N, R), all on the x of the first. dropout: "none", "one mask", "own masks"."""
    p = 0.0 if dropout == "none" else 0.3
    cases = []
    for i, (N, R) in enumerate(sizes):
        made = make_case(M, K, N, R, dtype, bias=i == 1, dropout_p=p, scaling=1.0 + i, seed=i)
        seed = made.seed if dropout == "own masks" else 77
        cases.append(replace(made, x=cases[0].x if cases else made.x, seed=seed))
    return cases


def group_route_of(cases: list[Case], strategy: str = "split", **tiles: Tiles) -> Route:
    """A Route of the whole group."""
    sizes = tuple((case.lora_B.shape[0], case.lora_B.shape[1]) for case in cases)
    single = problem_of(cases[0])
    problem = replace(
        single, N=sum(N for N, _ in sizes), R=group_columns([R for _, R in sizes])[1], group=sizes
    )
    route = route_of(cases[0], strategy, **tiles)
    if strategy == "library":
        route = replace(route, config=Config("triton"))
    return replace(route, problem=problem)


def check_group(cases: list[Case], route: Route) -> dict[str, Tensor]:
    """Every output of a group against the numerics contract; returns them by name and member."""
    members, dys = [], [case.dy for case in cases]
    for case in cases:
        mask, scale = None, case.scaling
        if case.dropout_p > 0:
            mask = Mask(case.seed, dropout_threshold(case.dropout_p))
            scale = effective_scaling(case.scaling, case.dropout_p)
        dtypes = case.lora_A.dtype, case.lora_B.dtype
        weights = case.weight, case.lora_A, case.lora_B, case.bias
        members.append(Member(*weights, scale, mask, route.needs, *dtypes))
    ys, s = triton.group_forward(route, cases[0].x, members)
    dx, das, dbs = triton.group_backward(route, dys, cases[0].x, s, members)
    truths, baselines = [c.truth() for c in cases], [c.baseline() for c in cases]
    offsets, width = group_columns([case.lora_A.shape[0] for case in cases])
    assert s.shape == (cases[0].x.shape[0], width)
    found: dict[str, Tensor] = {}
    for i, (case, offset) in enumerate(zip(cases, offsets, strict=True)):
        R = case.lora_A.shape[0]
        outputs = {"y": ys[i], "s": s[:, offset : offset + R], "da": das[i], "db": dbs[i]}
        for name, got in outputs.items():
            if got is not None:
                assert_close_to_ref(name, got, truths[i][name], baselines[i][name])
                found[f"{name}{i}"] = got
        assert not s[:, offset + R : -(-(offset + R) // 16) * 16].any()
    if dx is not None:
        truth = sum(t["dx"] for t in truths)
        assert isinstance(truth, Tensor)
        low = sum(b["dx"].float() for b in baselines)
        assert isinstance(low, Tensor)
        assert_close_to_ref("dx", dx, truth, low.to(dx.dtype))
        found["dx"] = dx
    return found
