"""lora_linear_group: several LoRA layers on one input (q/k/v, gate/up), which is read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_fused import checks, group_hook
from lora_fused.autograd import refuse_double_backward, shrink_gradients, weight_gradient
from lora_fused.backends import BACKENDS
from lora_fused.backends.torch_ops import flatten
from lora_fused.config import Call
from lora_fused.dispatch import route_for
from lora_fused.functional import call_layer, draw_seed, is_distributed, is_traced, make_mask
from lora_fused.group_hook import PARAMS
from lora_fused.reference import dropout_threshold, effective_scaling


@dataclass(frozen=True, slots=True)
class LoRAWeights:
    """One member of a group; the fields mean what they mean for lora_linear.

    Members have independent dropout masks, as separate layers have, unless they are given one seed.
    """

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    bias: Tensor | None = None
    dropout_p: float = 0.0
    seed: int | Tensor | None = None

    @property
    def params(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.weight, self.lora_A, self.lora_B, self.bias


def lora_linear_group(
    x: Tensor, members: Sequence[LoRAWeights], training: bool = True, backend: str = "auto"
) -> list[Tensor]:
    """[lora_linear(x, …) for each member], computed together.

    Members with the same scaling and the same mask (or none) share one shrink of x with their
    stacked lora_A, and one reduction of x for their lora_A gradients; dx is accumulated in one
    buffer; x is saved once. x: [..., K]; member i has weight [N_i, K], lora_A [R_i, K] and
    lora_B [N_i, R_i].

    Returns one y [..., N_i] per member. Raises what lora_linear raises.
    """
    ps = [m.dropout_p if training else 0.0 for m in members]
    if torch._C._are_functorch_transforms_active() or is_traced() or is_distributed(x):
        return [
            call_layer(x, *m.params, m.scaling, p, m.seed, backend)
            for m, p in zip(members, ps, strict=True)
        ]
    calls = tuple(_call(x, m, p, backend) for m, p in zip(members, ps, strict=True))
    if not calls:
        return []
    x = x.to(calls[0].route.compute)
    params = [t for m in members for t in m.params]
    if not group_hook.only_stacks(calls[0]):
        route = group_hook.group_route(x, calls, backend)
        if route is not None and route.needs:
            return list(group_hook.FusedGroupFunction.apply(x, route, calls, *params))
        if route is not None:
            return group_hook.forward(route, calls, x, params)[0]
        if any(group_hook.runs_alone(call) for call in calls):
            return [
                call_layer(x, *m.params, m.scaling, p, m.seed, backend)
                for m, p in zip(members, ps, strict=True)
            ]
    if any(call.route.needs for call in calls):
        return list(LoRALinearGroupFunction.apply(x, calls, *params))
    return _group_forward(x, calls, _stacks(calls), params)[0]


class LoRALinearGroupFunction(torch.autograd.Function):
    """y_i = x W_iᵀ + s_i B_iᵀ + bias_i, [s_1 | s_2 | …] = scale · (mask ⊙ x) [A_1; A_2; …]ᵀ.

    Backward, from the dy_i:

        ds_i = scale · dy_i B_i                dB_i = dy_iᵀ s_i
        dx   = Σ_i dy_i W_i + mask ⊙ (ds_i A_i)
        [dA_1; dA_2; …] = [ds_1 | ds_2 | …]ᵀ (mask ⊙ x)
        dW_i = dy_iᵀ x,   dbias_i = Σ_m dy_i

    Saved: x once, the stacked s, and the parameters themselves.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, calls: tuple[Call, ...], *params: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.calls, ctx.stacks = calls, _stacks(calls)
        ys, stacked_s = _group_forward(x, calls, ctx.stacks, params)
        wanted = frozenset[str]().union(*(call.route.needs for call in calls))
        saved_x = x if wanted & {"weight", "lora_A"} else None
        saved_s = stacked_s if "lora_B" in wanted else [None] * len(stacked_s)
        ctx.save_for_backward(saved_x, *saved_s, *params)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        x, *rest = ctx.saved_tensors
        stacked_s, params = rest[: len(ctx.stacks)], rest[len(ctx.stacks) :]
        with torch.autocast(ctx.calls[0].route.problem.device_type, enabled=False):
            dx, gradients = _group_backward(x, ctx.calls, ctx.stacks, stacked_s, params, dys)
        return (dx, None, *gradients)


def _call(x: Tensor, member: LoRAWeights, dropout_p: float, backend: str) -> Call:
    checks.check_scaling(member.scaling)
    checks.check_dropout(dropout_p, member.seed)
    mask, scale = None, float(member.scaling)
    if dropout_threshold(dropout_p) > 0:
        seed = draw_seed(x.device) if member.seed is None else member.seed
        mask, scale = make_mask(seed, dropout_p), effective_scaling(scale, dropout_p)
    return Call(route_for(x, *member.params, mask is not None, backend), scale, mask)


def _stacks(calls: Sequence[Call]) -> list[list[int]]:
    """The members whose adapters go together: same scale, mask, dtype and backend."""
    stacks: dict[Any, list[int]] = {}
    for i, call in enumerate(calls):
        seed, threshold = (None, 0) if call.mask is None else call.mask
        seed = id(seed) if isinstance(seed, Tensor) else seed
        key = (call.scale, seed, threshold, call.route.param_dtypes[1], call.route.config.backend)
        stacks.setdefault(key, []).append(i)
    return list(stacks.values())


def _cast(
    params: Sequence[Tensor | None], i: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The parameters of member i in the compute dtype."""
    weight, lora_A, lora_B, bias = params[PARAMS * i : PARAMS * (i + 1)]
    assert weight is not None and lora_A is not None and lora_B is not None
    return (
        weight.to(dtype), lora_A.to(dtype), lora_B.to(dtype),
        None if bias is None else bias.to(dtype),
    )  # fmt: skip


def _columns(s: Tensor | None, stack: list[int], calls: Sequence[Call]) -> Sequence[Tensor | None]:
    """The columns [M, R_i] of a stacked s, as views; None for a member of rank 0."""
    if s is None:
        return [None] * len(stack)
    ranks = [calls[i].route.problem.R for i in stack]
    return [part if part.shape[1] > 0 else None for part in s.split(ranks, dim=1)]


def _group_forward(
    x: Tensor, calls: Sequence[Call], stacks: list[list[int]], params: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """One y per member and one stacked s per stack (None if all its ranks are 0)."""
    ys: dict[int, Tensor] = {}
    stacked_s: list[Tensor | None] = []
    with torch.autocast(x.device.type, enabled=False):
        for stack in stacks:
            call = calls[stack[0]]
            ops = BACKENDS[call.route.config.backend]
            cast = [_cast(params, i, x.dtype) for i in stack]
            a = torch.cat([lora_A for _, lora_A, _, _ in cast])
            s = ops.shrink(call.route, x, a, call.scale, call.mask) if a.shape[0] > 0 else None
            stacked_s.append(s)
            for i, part, (weight, _, lora_B, bias) in zip(
                stack, _columns(s, stack, calls), cast, strict=True
            ):
                ys[i] = ops.matmul(calls[i].route, "forward", x, weight, part, lora_B, bias)
    return [ys[i] for i in range(len(calls))], stacked_s


def _group_backward(
    x: Tensor | None,
    calls: Sequence[Call],
    stacks: list[list[int]],
    stacked_s: Sequence[Tensor | None],
    params: Sequence[Tensor | None],
    dys: Sequence[Tensor | None],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx and, member by member, the gradients of weight, lora_A, lora_B and bias."""
    gradients: list[Tensor | None] = [None] * len(params)
    dx: Tensor | None = None
    for stack, s in zip(stacks, stacked_s, strict=True):
        ds_of: dict[int, Tensor] = {}
        for i, part in zip(stack, _columns(s, stack, calls), strict=True):
            dy = dys[i]
            if dy is None:
                continue
            at = slice(PARAMS * i, PARAMS * (i + 1))
            dx, ds, gradients[at] = _member_backward(calls[i], params, i, dx, dy, x, part)
            if "lora_A" in calls[i].route.needs and ds is not None:
                ds_of[i] = ds
        if ds_of and x is not None:
            for i, da in _stacked_da(calls, ds_of, x).items():
                gradients[PARAMS * i + 1] = da
    return dx, gradients


def _member_backward(
    call: Call,
    params: Sequence[Tensor | None],
    i: int,
    dx: Tensor | None,
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """dx with this member added, ds, and the member's gradients but da (unless that is empty)."""
    route = call.route
    weight, lora_A, lora_B, _ = _cast(params, i, dy.dtype)
    dweight = da = dbias = None
    ds, db = shrink_gradients(call, dy, None if s is None else s.contiguous(), lora_B)
    if "x" in route.needs:
        ops = BACKENDS[route.config.backend]
        dx = ops.matmul(route, "dx", dy, weight, ds, lora_A, mask=call.mask, out=dx)
    if "weight" in route.needs and x is not None:
        dweight = weight_gradient(dy, x, route.param_dtypes[0])
    if "lora_A" in route.needs and ds is None:
        da = torch.zeros_like(lora_A, dtype=route.param_dtypes[1])
    if "bias" in route.needs:
        dbias = flatten(dy).sum(0, dtype=route.param_dtypes[3])
    return dx, ds, [dweight, da, db, dbias]


def _stacked_da(calls: Sequence[Call], ds_of: dict[int, Tensor], x: Tensor) -> dict[int, Tensor]:
    """da of every member of a stack by one reduction over x."""
    call, columns = calls[next(iter(ds_of))], list(ds_of.values())
    ds = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
    ops = BACKENDS[call.route.config.backend]
    da = ops.reduce(call.route, ds, x, call.mask, call.route.param_dtypes[1])
    parts = da.split([column.shape[1] for column in columns])
    return dict(zip(ds_of, parts, strict=True))
