"""A whole group (q/k/v, gate/up) by a backend's own launches, with one stacked s.

A backend that offers both hooks runs groups of members with rank >= 1 on one x [..., K]; member i
has weight [N_i, K], lora_A [R_i, K], lora_B [N_i, R_i] and its own scale, mask and bias.

    group_forward(route, x, members) -> ys, s
        s [M, R_total]: the columns offset_i … offset_i + R_i are scale_i · (mask_i ⊙ x) A_iᵀ, with
        offsets and R_total from config.group_columns; the columns in between are zero.
        y_i = x W_iᵀ + s_i B_iᵀ + bias_i, contiguous [..., N_i].
    group_backward(route, dys, x, s, members) -> dx, das, dbs
        ds_i = scale_i · dy_i B_i                       dx   = Σ_i dy_i W_i + mask_i ⊙ (ds_i A_i)
        dA_i = ds_iᵀ (mask_i ⊙ x)  [R_i, K]             dB_i = dy_iᵀ s_i  [N_i, R_i]
        One dy_i [..., N_i] per member, never None, any strides; s as group_forward returned it.
        dx [..., K] is None unless "x" in route.needs; das and dbs have one entry per member, None
        unless its needs name lora_A or lora_B. x and s are None if no member needs what reads them.

route.problem is the group as one problem (see config.Problem); its config was chosen for that, and
the hooks are not called where a direction is "library". The operations "forward", "dx", "shrink"
and "reduce" of Candidate are those of the whole group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_fused import dispatch
from lora_fused.autograd import refuse_double_backward, weight_gradient
from lora_fused.backends import BACKENDS
from lora_fused.backends.torch_ops import flatten
from lora_fused.choices import Choices
from lora_fused.config import FUSED_STRATEGIES, Call, Member, Problem, Route, group_columns

PARAMS = 4  # of one member: weight, lora_A, lora_B, bias
_MAX_ROUTES = 1024
_routes = Choices[tuple[list[Route], Route | None]](_MAX_ROUTES)
dispatch.also_forget(_routes.clear)


def only_stacks(call: Call) -> bool:
    """Whether a member is where no group is ever run as one: on a CPU, by its own backends."""
    route = call.route
    return route.problem.device is None and route.config.backend in ("cpu", "torch")


def group_route(
    x: Tensor, calls: Sequence[Call], params: Sequence[Tensor | None], backend: str
) -> Route | None:
    """How to run the whole group at once; None where its members are run one after the other."""
    if len(calls) < 2 or any(call.route.problem.R == 0 for call in calls):
        return None
    routes = [call.route for call in calls]
    key = tuple(id(route) for route in routes)
    known = _routes.get(key, x)
    if known is not None and all(a is b for a, b in zip(known[0], routes, strict=True)):
        return known[1]
    route, final = _find_route(x, routes, params, backend)
    _routes.keep(key, (routes, route), final)
    return route


def _find_route(
    x: Tensor, routes: list[Route], params: Sequence[Tensor | None], backend: str
) -> tuple[Route | None, bool]:
    """The route of the group and whether it is the last word on it."""
    first, problem = routes[0], _group_problem([route.problem for route in routes])
    if problem.device is None:
        config, final = dispatch.choose(problem, backend), True
    else:
        from lora_fused import gpu_trial

        parts = [params[i : i + PARAMS] for i in range(0, len(params), PARAMS)]
        layers = [gpu_trial.Tensors(x, *part) for part in parts]  # type: ignore[arg-type]
        trial = partial(gpu_trial.runs_of_group, problem, layers)
        config, final = dispatch.choose_on_gpu(problem, backend, x.device, trial)
    used = (config.forward, config.dx) if "x" in problem.needs else (config.forward,)
    if "library" in used or not hasattr(BACKENDS[config.backend], "group_forward"):
        return None, final
    route = replace(
        first,
        problem=problem,
        config=config,
        needs=problem.needs,
        y_shape=(*first.x_shape[:-1], problem.N),
        wide_adapters=False,
        forward_layer=None,
        backward_layer=None,
    )
    return route, final


def _group_problem(problems: list[Problem]) -> Problem:
    """The members as one problem."""
    layouts = {problem.weight_layout for problem in problems}
    return replace(
        problems[0],
        N=sum(problem.N for problem in problems),
        R=group_columns([problem.R for problem in problems])[1],
        has_bias=any(problem.has_bias for problem in problems),
        dropout=any(problem.dropout for problem in problems),
        needs=frozenset[str]().union(*(problem.needs for problem in problems)),
        weight_layout=layouts.pop() if len(layouts) == 1 else "strided",
        plain=all(problem.plain for problem in problems),
        aligned=all(problem.aligned for problem in problems),
        group=tuple((problem.N, problem.R) for problem in problems),
    )


def runs_alone(call: Call) -> bool:
    """Whether no stack of members can take this one.

    It has a launch of its own that makes s as well, or (on a GPU, by torch) a mask of its own.
    """
    config, problem = call.route.config, call.route.problem
    if config.forward in FUSED_STRATEGIES or config.dx in FUSED_STRATEGIES:
        return True
    return call.mask is not None and problem.device is not None and config.backend == "torch"


class FusedGroupFunction(torch.autograd.Function):
    """The formulas above. Saved: x once, the stacked s, and the parameters themselves."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, route: Route, calls: tuple[Call, ...], *params: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.route, ctx.calls = route, calls
        ys, s = forward(route, calls, x, params)
        needs = route.needs
        saved_x = x if "lora_A" in needs or "weight" in needs else None
        ctx.save_for_backward(saved_x, s if "lora_B" in needs else None, *params)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if all(dy is None for dy in dys):
            return (None,) * len(ctx.needs_input_grad)
        x, s, *params = ctx.saved_tensors
        dx, gradients = _backward(ctx.route, ctx.calls, x, s, params, dys)
        return (dx, None, None, *gradients)


def forward(
    route: Route, calls: Sequence[Call], x: Tensor, params: Sequence[Tensor | None]
) -> tuple[list[Tensor], Tensor]:
    """The y of each member, and the stacked s."""
    with torch.autocast(route.problem.device_type, enabled=False):
        members = _members(calls, params, route.compute)
        ops = BACKENDS[route.config.backend]
        ys, s = ops.group_forward(route, x, members)
        return ys, s


def _members(
    calls: Sequence[Call], params: Sequence[Tensor | None], dtype: torch.dtype
) -> list[Member]:
    members = []
    for i, call in enumerate(calls):
        weight, lora_A, lora_B, bias = params[PARAMS * i : PARAMS * (i + 1)]
        assert weight is not None and lora_A is not None and lora_B is not None
        member = Member(
            weight.to(dtype),
            lora_A.to(dtype),
            lora_B.to(dtype),
            None if bias is None else bias.to(dtype),
            call.scale,
            call.mask,
            call.route.needs,
            lora_A.dtype,
            lora_B.dtype,
        )
        members.append(member)
    return members


def _backward(
    route: Route,
    calls: Sequence[Call],
    x: Tensor | None,
    s: Tensor | None,
    params: Sequence[Tensor | None],
    dys: Sequence[Tensor | None],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx and, member by member, the gradients of weight, lora_A, lora_B and bias."""
    present = next(dy for dy in dys if dy is not None)
    shape = route.x_shape[:-1]
    sizes = [N for N, _ in route.problem.group]
    filled = [
        present.new_zeros(*shape, N) if dy is None else dy for dy, N in zip(dys, sizes, strict=True)
    ]
    gradients: list[Tensor | None] = []
    with torch.autocast(route.problem.device_type, enabled=False):
        members = _members(calls, params, route.compute)
        ops = BACKENDS[route.config.backend]
        dx, das, dbs = ops.group_backward(route, filled, x, s, members)
        for dy, call, da, db in zip(dys, calls, das, dbs, strict=True):
            if dy is None:
                gradients += [None] * PARAMS
                continue
            needs, dtypes = call.route.needs, call.route.param_dtypes
            dweight = dbias = None
            if "weight" in needs and x is not None:
                dweight = weight_gradient(dy, x, dtypes[0])
            if "bias" in needs:
                dbias = flatten(dy).sum(0, dtype=dtypes[3])
            gradients += [dweight, da, db, dbias]
    return dx, gradients
