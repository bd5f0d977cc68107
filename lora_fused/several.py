"""Several adapters on one layer, each with a scale and a dropout mask of its own.

    y = x Wᵀ + [s_1 | s_2 | …] [B_1 | B_2 | …]ᵀ + bias,    s_i = scale_i · (mask_i ⊙ x) A_iᵀ

for x [..., K], A_i [R_i, K], B_i [N, R_i] and y [..., N]: the ranks are concatenated, so that the
large product still runs once, its contraction Σ R_i steps longer. Adapters without dropout need
none of this: their A_i can be stacked, which makes one adapter of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_fused.autograd import (
    Saved,
    input_gradient,
    kept,
    refuse_double_backward,
    shrink_gradients,
    weight_gradient,
)
from lora_fused.backends import BACKENDS, torch_ops
from lora_fused.backends.torch_ops import flatten
from lora_fused.config import Call, Mask, Route
from lora_fused.dispatch import also_forget, modes_of, route_for
from lora_fused.functional import call_layer, draw_seeds, drawn_mask, is_traced
from lora_fused.reference import dropout_threshold, effective_scaling
from lora_fused.request import facts_of

_MAX_ROUTES = 1024
_known: dict[Any, tuple[Route, list[Route]]] = {}
also_forget(_known.clear)


class Adapter(NamedTuple):
    """lora_A [R, K], lora_B [N, R], R > 0, and how they are applied.

    keep [..., K], bool: the dropout mask, drawn by the caller with probability dropout_p. Not where
    calls are recorded or transformed.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float = 0.0
    keep: Tensor | None = None


def call_several(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], backend: str
) -> Tensor:
    """y [..., N] of two or more adapters, their masks drawn independently. Not for DTensors.

    Raises what lora_linear raises.
    """
    if torch._C._are_functorch_transforms_active() or is_traced():
        return _composed(x, weight, bias, adapters, backend)
    route, own = _routes_of(x, weight, bias, adapters, backend)
    x = _as(x, route.compute)
    calls = _calls(route, own, x, adapters)
    params = [t for adapter in adapters for t in adapter[:2]]
    if route.needs:
        y: Tensor = SeveralAdaptersFunction.apply(x, weight, bias, route, calls, *params)
        return y
    return _forward(x, weight, bias, route, calls, params)[0]


class SeveralAdaptersFunction(torch.autograd.Function):
    """The formula above. Backward, from dy:

        ds_i = scale_i · dy B_i                dB_i = dyᵀ s_i
        dx   = dy W + Σ_i mask_i ⊙ (ds_i A_i)  dA_i = ds_iᵀ (mask_i ⊙ x)
        dW   = dyᵀ x,   dbias = Σ_m dy

    Saved: x, every s_i and the parameters themselves; the masks are regenerated where the backend
    does that (see functional.drawn_mask), else kept as bytes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        route: Route,
        calls: tuple[Call, ...],
        *params: Tensor,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.route, ctx.calls = route, calls
        y, s = _forward(x, weight, bias, route, calls, params)
        reads_x = not route.needs.isdisjoint(("weight", "lora_A"))
        saved_s = (t if "lora_B" in call.route.needs else None
                   for t, call in zip(s, calls, strict=True))  # fmt: skip
        ctx.save_for_backward(x if reads_x else None, weight, *saved_s, *params)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        calls: tuple[Call, ...] = ctx.calls
        if dy is None:
            return (None,) * (5 + 2 * len(calls))
        x, weight, *rest = ctx.saved_tensors
        s, params = rest[: len(calls)], rest[len(calls) :]
        if torch._C._is_any_autocast_enabled():
            with torch.autocast(dy.device.type, enabled=False):
                return _backward(ctx.route, calls, dy, x, weight, s, params)
        return _backward(ctx.route, calls, dy, x, weight, s, params)


def _routes_of(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], backend: str
) -> tuple[Route, list[Route]]:
    """The route of all together, and that of each; remembered on the CPU, where they are final."""
    if x.device.type != "cpu":
        return _find_routes(x, weight, bias, adapters, backend)
    facts = (facts_of(x, weight, *adapter[:2], bias) for adapter in adapters)
    key = (backend, modes_of(x), *facts)
    known = _known.get(key)
    if known is None:
        known = _find_routes(x, weight, bias, adapters, backend)
        if len(_known) >= _MAX_ROUTES:
            _known.clear()
        _known[key] = known
    return known


def _find_routes(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], backend: str
) -> tuple[Route, list[Route]]:
    """The route of one adapter as wide as all together; its masks cannot be a launch's own."""
    first = adapters[0]
    R = sum(adapter.lora_A.shape[0] for adapter in adapters)
    lora_A = first.lora_A.new_empty(R, first.lora_A.shape[1])
    lora_B = first.lora_B.new_empty(first.lora_B.shape[0], R)
    needs = set()
    if torch.is_grad_enabled():
        everything = [("x", x), ("weight", weight), ("bias", bias)]
        everything += [("lora_A", adapter.lora_A) for adapter in adapters]
        everything += [("lora_B", adapter.lora_B) for adapter in adapters]
        needs = {name for name, t in everything if t is not None and t.requires_grad}
    params = (weight, lora_A, lora_B, bias)
    route = route_for(x, *params, True, backend, needs=frozenset(needs), given_mask=True)
    return route, [_own_route(route, adapter) for adapter in adapters]


def _own_route(route: Route, adapter: Adapter) -> Route:
    """The route of all with the rank, the dtypes and the needs of one adapter."""
    lora_A, lora_B = adapter[:2]
    needs = route.needs
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        needs = needs if tensor.requires_grad else needs - {name}
    weight_dtype, _, _, bias_dtype = route.param_dtypes
    return replace(
        route,
        problem=replace(route.problem, R=lora_A.shape[0]),
        needs=needs,
        param_dtypes=(weight_dtype, lora_A.dtype, lora_B.dtype, bias_dtype),
        forward_layer=None,
        backward_layer=None,
    )


def _calls(
    route: Route, own: Sequence[Route], x: Tensor, adapters: Sequence[Adapter]
) -> tuple[Call, ...]:
    """What the adapters carry from forward to backward."""
    regenerates = route.problem.device is None and route.config.backend != "torch"
    drawing = [a.keep is None and dropout_threshold(a.dropout_p) > 0 for a in adapters]
    seeds = iter(draw_seeds(sum(drawing)) if regenerates and any(drawing) else ())
    calls = []
    for call_route, (_, _, scaling, p, keep), draws in zip(own, adapters, drawing, strict=True):
        mask, scale = None, scaling
        if keep is not None:
            keep, scale = flatten(keep), scaling / (1 - p) if p < 1 else 0.0
        elif draws:
            scale, mask = effective_scaling(scaling, p), Mask(0, dropout_threshold(p))
            if regenerates:
                mask = Mask(next(seeds), mask.threshold)
            else:
                keep, mask = drawn_mask(route, mask, x.device), None
        calls.append(Call(call_route, scale, mask, keep=keep))
    return tuple(calls)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    route: Route,
    calls: Sequence[Call],
    params: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """y [..., N] and every s_i [M, R_i]. params: lora_A and lora_B of each adapter in turn."""
    if torch._C._is_any_autocast_enabled():
        with torch.autocast(route.problem.device_type, enabled=False):
            return _forward(x, weight, bias, route, calls, params)
    ops, dtype = BACKENDS[route.config.backend], x.dtype
    s = [
        ops.shrink(call.route, kept(x, call.keep), _as(lora_A, dtype), call.scale, call.mask)
        for call, lora_A in zip(calls, params[::2], strict=True)
    ]
    lora_B = torch.cat([_as(t, dtype) for t in params[1::2]], dim=1)
    if bias is not None:
        bias = _as(bias, dtype)
    stacked = torch.cat(s, dim=1)
    y = ops.matmul(route, "forward", x, _as(weight, dtype), stacked, lora_B, bias)
    return y, s


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter in the compute dtype; asking first is cheaper than a cast that does nothing."""
    return t if t.dtype == dtype else t.to(dtype)


def _backward(
    route: Route,
    calls: Sequence[Call],
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    s: Sequence[Tensor | None],
    params: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """What SeveralAdaptersFunction.backward returns."""
    dweight = dbias = None
    if "weight" in route.needs and x is not None:
        dweight = weight_gradient(dy, x, route.param_dtypes[0])
    if "bias" in route.needs:
        dbias = flatten(dy).sum(0, dtype=route.param_dtypes[3])
    dx, gradients = _adapter_gradients(route, calls, dy, x, weight, s, params)
    return (dx, dweight, dbias, None, None, *gradients)


def _adapter_gradients(
    route: Route,
    calls: Sequence[Call],
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    s: Sequence[Tensor | None],
    params: Sequence[Tensor],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx, and da and db of each adapter in turn."""
    ops, weight = BACKENDS[route.config.backend], _as(weight, dy.dtype)
    dx: Tensor | None = None
    gradients: list[Tensor | None] = []
    for i, call in enumerate(calls):
        lora_A, lora_B = (_as(t, dy.dtype) for t in params[2 * i : 2 * i + 2])
        ds, db = shrink_gradients(call, dy, s[i], lora_B)
        da = None
        if "lora_A" in call.route.needs and x is not None and ds is not None:
            a_dtype = call.route.param_dtypes[1]
            da = ops.reduce(call.route, ds, kept(x, call.keep), call.mask, a_dtype)
        if "x" in route.needs and dx is None:
            dx = input_gradient(call, dy, ds, Saved(None, None, weight, lora_A, lora_B))
        elif dx is not None and ds is not None:
            _add_through_adapter(call, dx, ds, lora_A)
        gradients += [da, db]
    return dx, gradients


def _add_through_adapter(call: Call, dx: Tensor, ds: Tensor, lora_A: Tensor) -> None:
    """dx += mask ⊙ (ds A)."""
    if call.keep is not None:
        flatten(dx).add_(torch.mm(ds, lora_A).mul_(call.keep))
        return
    expand = getattr(BACKENDS[call.route.config.backend], "expand", torch_ops.expand)
    expand(call.route, "dx", dx, ds, lora_A, call.mask)


def _composed(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], backend: str
) -> Tensor:
    """The call as torch can record or transform it: the first adapter fused, the others added."""
    first, *others = adapters
    p = first.dropout_p
    params = (first.lora_A, first.lora_B, bias)
    y = call_layer(x, weight, *params, first.scaling, p, None, backend)
    for adapter in others:
        dropped = F.dropout(x, adapter.dropout_p).to(y.dtype)
        s = F.linear(dropped, adapter.lora_A.to(y.dtype))
        y = y + F.linear(s, adapter.lora_B.to(y.dtype)) * adapter.scaling
    return y
