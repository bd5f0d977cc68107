"""A GPU backend in plain torch, on any device: what a backend may offer, as code that runs.

Test only. Installed under the name of a real one, it shows which operations autograd calls, with
what, and what it does with the answers; `calls` lists them. The values are those of the formulas in
lora_fused/backends/__init__.py and lora_fused/group_hook.py, computed in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_fused.backends.torch_ops import flatten
from lora_fused.config import (
    FUSED_STRATEGIES,
    Candidate,
    Mask,
    Member,
    Problem,
    Route,
    Tiles,
    group_columns,
)
from lora_fused.devices import Device

calls: list[str] = []
offers_backward = False  # as part "backward": set by the tests of it


def not_supported_reasons(problem: Problem) -> list[str]:
    """Everything but float64 and the empty problem."""
    reasons = ["there are no kernels for float64"] if problem.dtype == torch.float64 else []
    if 0 in (problem.M, problem.K, problem.N):
        reasons.append("the problem is empty")
    return reasons


def takes_wide_adapters(problem: Problem) -> bool:
    """fp32 adapters beside a bf16 weight need no cast."""
    return problem.adapter_dtype == torch.float32


def candidates(problem: Problem, device: Device, operation: str) -> list[Candidate]:
    """One candidate for every strategy, whatever the problem."""
    if operation in ("shrink", "reduce"):
        return [Candidate(operation, Tiles(block_m=64, block_k=64, num_warps=4), 32768, 64)]
    tiles = Tiles(128, 256, 64, num_warps=8, num_stages=3, persistent=True, shrink_group=3)
    if operation == "backward":
        one = Candidate("s_first", replace(tiles, reduce_parts=2), 147456, 168)
        return [one] if offers_backward and not problem.dropout and not problem.group else []
    names = ["split", "s_first", "one_pass"]
    found = [Candidate(name, tiles, 147456, 168) for name in names]
    if problem.M <= 16:
        found.append(Candidate("decode", Tiles(16, 16, 128, num_warps=8, splits=2), 16384, 108))
    return found


def shrink(route: Route, x: Tensor, a: Tensor, scale: float, mask: Mask | None = None) -> Tensor:
    """s [M, R] = scale · (mask ⊙ x) aᵀ."""
    calls.append("shrink")
    return (scale * (_dropped(x, mask) @ a.float().t())).to(x.dtype)


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
    """x w + mask ⊙ (s l) + bias, added to `out` if that is given."""
    forward = direction == "forward"
    strategy = route.config.forward if forward else route.config.dx
    assert strategy not in FUSED_STRATEGIES, f"{strategy} does not go through matmul"
    calls.append(f"matmul {direction}")
    assert packed is None
    y = flatten(x).float() @ (weight.t() if forward else weight).float()
    if s is not None and adapter is not None:
        update = s.float() @ (adapter.t() if forward else adapter).float()
        y += _dropped(update, mask)
    if bias is not None:
        y += bias.float()
    if out is not None:
        return flatten(out).add_(y).view(out.shape)
    return y.to(x.dtype).view(route.y_shape if forward else route.x_shape)


def shrink_matmul(
    route: Route,
    direction: str,
    x: Tensor,
    weight: Tensor,
    shrink_adapter: Tensor,
    expand_adapter: Tensor,
    scale: float,
    bias: Tensor | None = None,
    mask: Mask | None = None,
) -> tuple[Tensor, Tensor]:
    """y and s, or dx and ds, by one launch."""
    forward = direction == "forward"
    strategy = route.config.forward if forward else route.config.dx
    assert strategy in FUSED_STRATEGIES, f"{strategy} is not one launch"
    calls.append(f"shrink_matmul {direction}")
    first = shrink_adapter.float().t() if forward else shrink_adapter.float()
    operand = _dropped(x, mask) if forward else flatten(x).float()
    s = (scale * (operand @ first)).to(x.dtype)
    y = flatten(x).float() @ (weight.t() if forward else weight).float()
    update = s.float() @ (expand_adapter.t() if forward else expand_adapter).float()
    y += update if forward else _dropped(update, mask)
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).view(route.y_shape if forward else route.x_shape), s


def shrink_reduce(
    route: Route,
    dy: Tensor,
    b: Tensor | None,
    scale: float,
    s: Tensor | None,
    need_ds: bool,
    db_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """ds = scale · dy b and db = dyᵀ s, each only if it is wanted."""
    calls.append("shrink_reduce")
    rows, ds, db = flatten(dy).float(), None, None
    if need_ds and b is not None:
        ds = (scale * (rows @ b.float())).to(dy.dtype)
    if db_dtype is not None and s is not None:
        db = (rows.t() @ s.float()).to(db_dtype)
    return ds, db


def reduce(route: Route, ds: Tensor, x: Tensor, mask: Mask | None, dtype: torch.dtype) -> Tensor:
    """da [R, K] = dsᵀ (mask ⊙ x)."""
    calls.append("reduce")
    return (ds.float().t() @ _dropped(x, mask)).to(dtype)


def reduce_pair(
    route: Route,
    ds: Tensor | None,
    x: Tensor | None,
    mask: Mask | None,
    da_dtype: torch.dtype | None,
    dy: Tensor | None,
    s: Tensor | None,
    db_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """da = dsᵀ (mask ⊙ x) and db = dyᵀ s by one launch, each only if its dtype is given."""
    calls.append("reduce_pair")
    da = db = None
    if da_dtype is not None:
        assert ds is not None and x is not None
        da = (ds.float().t() @ _dropped(x, mask)).to(da_dtype)
    if db_dtype is not None:
        assert dy is not None and s is not None
        db = (flatten(dy).float().t() @ s.float()).to(db_dtype)
    return da, db


def shrink_matmul_reduce(
    route: Route,
    dy: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    x: Tensor,
    s: Tensor,
    da_dtype: torch.dtype,
    db_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, da and db by one launch."""
    made = len(calls)
    dx, ds = shrink_matmul(route, "dx", dy, weight, lora_B, lora_A, scale)
    da, db = reduce_pair(route, ds, flatten(x), None, da_dtype, dy, s, db_dtype)
    calls[made:] = ["shrink_matmul_reduce"]
    assert da is not None and db is not None
    return dx, da, db


def group_forward(
    route: Route, x: Tensor, members: Sequence[Member]
) -> tuple[list[Tensor], Tensor]:
    """See lora_fused/group_hook.py."""
    calls.append("group_forward")
    ranks = [member.lora_A.shape[0] for member in members]
    offsets, width = group_columns(ranks)
    rows = flatten(x).float()
    s = x.new_zeros(rows.shape[0], width)
    ys = []
    for member, offset, rank in zip(members, offsets, ranks, strict=True):
        part = member.scale * (_dropped(x, member.mask) @ member.lora_A.float().t())
        s[:, offset : offset + rank] = part
        y = rows @ member.weight.float().t()
        y += s[:, offset : offset + rank].float() @ member.lora_B.float().t()
        if member.bias is not None:
            y += member.bias.float()
        ys.append(y.to(x.dtype).view(*x.shape[:-1], -1))
    return ys, s


def group_backward(
    route: Route,
    dys: Sequence[Tensor],
    x: Tensor | None,
    s: Tensor | None,
    members: Sequence[Member],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """See lora_fused/group_hook.py."""
    calls.append("group_backward")
    offsets, _ = group_columns([member.lora_A.shape[0] for member in members])
    dtype = dys[0].dtype
    dx = torch.zeros(route.problem.M, route.problem.K, device=dys[0].device)
    das: list[Tensor | None] = []
    dbs: list[Tensor | None] = []
    for dy, member, offset in zip(dys, members, offsets, strict=True):
        rows = flatten(dy).float()
        ds = (member.scale * (rows @ member.lora_B.float())).to(dtype).float()
        dx += rows @ member.weight.float() + _dropped(ds @ member.lora_A.float(), member.mask)
        da = db = None
        if "lora_A" in member.needs:
            assert x is not None
            da = (ds.t() @ _dropped(x, member.mask)).to(member.da_dtype)
        if "lora_B" in member.needs:
            assert s is not None
            columns = s[:, offset : offset + member.lora_A.shape[0]].float()
            db = (rows.t() @ columns).to(member.db_dtype)
        das.append(da)
        dbs.append(db)
    needed = "x" in route.needs
    return dx.to(dtype).view(route.x_shape) if needed else None, das, dbs


def _dropped(x: Tensor, mask: Mask | None) -> Tensor:
    rows = flatten(x).float()
    return rows if mask is None else rows * mask.keep(rows.shape[0], rows.shape[1], x.device)
