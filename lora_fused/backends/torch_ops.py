"""The operations by torch alone: any device, any floating dtype. The strategy `library`.

On the CPU y is the vendor's GEMM followed by an accumulating rank-R GEMM into the same buffer, so
that nothing of the size of y is ever made twice. Elsewhere the rank-R GEMM writes y first and the
large GEMM accumulates: y is then read in the shadow of its arithmetic, which saves a pass over y,
and the scale of s rides in its GEMM, which saves a launch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_fused.config import Mask, Problem, Route


def not_supported_reasons(problem: Problem) -> list[str]:
    """Nothing is out of reach of torch."""
    return []


def shrink(route: Route, x: Tensor, a: Tensor, scale: float, mask: Mask | None = None) -> Tensor:
    """s [M, R] = scale · (mask ⊙ x) aᵀ from x [..., K] and a [R, K]."""
    rows = _dropped(flatten(x), mask)
    if route.problem.device_type != "cpu":
        return _scaled_mm(rows, a.t(), scale)
    s = torch.mm(rows, a.t())
    return s if scale == 1.0 else s.mul_(scale)


def matmul(
    route: Route,
    direction: str,
    x: Tensor,
    weight: Tensor,
    s: Tensor | None,
    adapter: Tensor | None,
    bias: Tensor | None = None,
    mask: Mask | None = None,
    packed: object = None,
    out: Tensor | None = None,
) -> Tensor:
    """x w + mask ⊙ (s l) + bias, added to `out` if that is given.

    "forward": x [..., K], w = weightᵀ [K, N], l = adapterᵀ with adapter = lora_B [N, R].
    "dx": x is dy [..., N], w = weight [N, K], s is ds and l = adapter = lora_A [R, K].
    """
    forward = direction == "forward"
    x2, w = flatten(x), weight.t() if forward else weight
    if route.problem.device_type != "cpu" and s is not None and adapter is not None and out is None:
        y = rank_first(x2, w, s, adapter.t() if forward else adapter, bias, mask)
        return y.view(route.y_shape if forward else route.x_shape)
    if out is not None:
        y = flatten(out).addmm_(x2, w)
    else:
        y = torch.mm(x2, w) if bias is None else torch.addmm(bias, x2, w)
    if s is not None and adapter is not None:
        expand(route, direction, y, s, adapter, mask)
    return y.view(route.y_shape if forward else route.x_shape)


def expand(
    route: Route, direction: str, y: Tensor, s: Tensor, adapter: Tensor, mask: Mask | None
) -> None:
    """y [..., N] += mask ⊙ (s l), with l as in matmul. y is contiguous."""
    y2, l = flatten(y), adapter.t() if direction == "forward" else adapter
    if mask is None:
        y2.addmm_(s, l)
    else:
        y2.add_(_dropped(torch.mm(s, l), mask))


def rank_first(
    x: Tensor, w: Tensor, s: Tensor, l: Tensor, bias: Tensor | None, mask: Mask | None
) -> Tensor:
    """x w + mask ⊙ (s l) + bias; the GEMM with the long contraction comes last and accumulates."""
    if mask is not None:
        y = torch.mm(s, l)
        y.mul_(mask.keep(y.shape[0], y.shape[1], y.device))
        if bias is not None:
            y.add_(bias)
    else:
        y = torch.mm(s, l) if bias is None else torch.addmm(bias, s, l)
    return y.addmm_(x, w)


def _scaled_mm(x: Tensor, w: Tensor, scale: float) -> Tensor:
    """scale · x w in one launch; beta = 0 leaves the empty buffer unread."""
    return x.new_empty(x.shape[0], w.shape[1]).addmm_(x, w, beta=0, alpha=scale)


def shrink_reduce(
    route: Route,
    dy: Tensor,
    b: Tensor | None,
    scale: float,
    s: Tensor | None,
    need_ds: bool,
    db_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """ds [M, R] = scale · dy b (if need_ds) and db [N, R] = dyᵀ s in db_dtype (if given)."""
    dy2 = flatten(dy)
    ds = db = None
    if need_ds and b is not None:
        if route.problem.device_type != "cpu":
            ds = _scaled_mm(dy2, b, scale)
        else:
            ds = torch.mm(dy2, b)
            if scale != 1.0:
                ds.mul_(scale)
    if db_dtype is not None and s is not None:
        db = torch.mm(dy2.t(), s).to(db_dtype)
    return ds, db


def reduce(route: Route, ds: Tensor, x: Tensor, mask: Mask | None, dtype: torch.dtype) -> Tensor:
    """da [R, K] = dsᵀ (mask ⊙ x), in dtype."""
    return torch.mm(ds.t(), _dropped(flatten(x), mask)).to(dtype)


def flatten(t: Tensor) -> Tensor:
    """[..., last] as [M, last]; a view wherever the strides allow one."""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _dropped(x: Tensor, mask: Mask | None) -> Tensor:
    return x if mask is None else x * mask.keep(x.shape[0], x.shape[1], x.device)
