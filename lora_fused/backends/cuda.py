"""The operations by the CUDA kernels in lora_fused._C, for NVIDIA GPUs from sm_80 on.

Everything handed over is an ordinary strided CUDA tensor; nothing is copied or transposed, whatever
its strides. Kernels run on torch's current stream, take their memory from torch's allocator and
never synchronise, so that they can be captured into CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_fused.backends import cuda_sm80, cuda_sm90, torch_ops
from lora_fused.backends.cuda_candidates import candidates, decode_parts, left_out, reasons_against
from lora_fused.backends.cuda_native import (
    Place,
    mask_words,
    math_of,
    matrix,
    native,
    output,
    output_dtype,
    place_of,
    transposed,
    workspace,
)
from lora_fused.backends.torch_ops import flatten
from lora_fused.config import Mask, Member, Problem, Route, Tiles, group_columns

__all__ = [
    "candidates", "group_backward", "group_forward", "left_out", "matmul", "not_supported_reasons",
    "reduce", "reduce_pair", "shrink", "shrink_matmul", "shrink_matmul_reduce", "shrink_reduce",
]  # fmt: skip

_ROW_ALIGNMENT = 16
"""Rows of s begin at multiples of so many bytes, for the kernels that copy them in pieces."""


def not_supported_reasons(problem: Problem) -> list[str]:
    """Why the CUDA kernels cannot run the problem; empty if they can."""
    if problem.device_type != "cuda":
        return [f"the tensors are on {problem.device_type}"]
    reasons = reasons_against(problem)
    if native() is None:
        reasons.append("the CUDA kernels are not built")
    return reasons


def shrink(route: Route, x: Tensor, a: Tensor, scale: float, mask: Mask | None = None) -> Tensor:
    """See torch_ops.shrink. Rows of s [M, R] may be padded."""
    tiles = route.config.shrink_tiles
    if tiles is None:
        return torch_ops.shrink(route, x, a, scale, mask)
    x = flatten(x)
    s = _new_s(x, a.shape[0])
    _shrink_into(s, place_of(x), x, matrix(a), scale, mask, tiles.splits)
    return s


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
    """See torch_ops.matmul, which also serves whoever adds to `out`: the kernels overwrite."""
    tiles = route.config.tiles(direction)
    fused = tiles is not None and tiles.persistent and out is None
    if fused and tiles is not None and s is not None and adapter is not None:
        y = _new_y(route, direction, x)
        mask = None if direction == "forward" else mask
        layer = cuda_sm90.Layer(x, weight, None, adapter, s, y, 0.0, bias, mask)
        _run(tiles, direction, [layer])
        return y
    return torch_ops.matmul(route, direction, x, weight, s, adapter, bias, mask, out=out)


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
    """y and s by one launch.

    "forward": x [..., K], shrink_adapter lora_A [R, K], expand_adapter lora_B [N, R];
    s = scale · (mask ⊙ x) lora_Aᵀ, y = x weightᵀ + s lora_Bᵀ + bias.
    "dx": x is dy [..., N], shrink_adapter lora_B [N, R], expand_adapter lora_A [R, K];
    s is ds = scale · dy lora_B, y is dx = dy weight + mask ⊙ (ds lora_A).
    """
    tiles = route.config.tiles(direction)
    if tiles is None or not tiles.persistent:
        return _decode(route, direction, x, weight, shrink_adapter, expand_adapter, scale, bias)
    y = _new_y(route, direction, x)
    s = _new_s(flatten(x), shrink_adapter.shape[0 if direction == "forward" else 1])
    layer = cuda_sm90.Layer(x, weight, shrink_adapter, expand_adapter, s, y, scale, bias, mask)
    _run(tiles, direction, [layer])
    return y, s


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
    """dx, da [R, K] and db [N, R] by one launch: what shrink_matmul ("dx") and reduce_pair make."""
    tiles, x, rows = route.config.tiles("dx"), flatten(x), flatten(dy)
    assert tiles is not None
    dx, ds = _new_y(route, "dx", dy), _new_s(rows, lora_A.shape[0])
    da = torch.empty(lora_A.shape, dtype=output_dtype(da_dtype), device=x.device)
    db = torch.empty(lora_B.shape, dtype=output_dtype(db_dtype), device=x.device)
    layer = cuda_sm90.Layer(dy, weight, lora_B, lora_A, ds, dx, scale)
    gradients = (cuda_sm90.Gradient(x, ds, da.t()), cuda_sm90.Gradient(rows, s, db))
    _run(tiles, "dx", [layer], gradients)
    return dx, da.to(da_dtype), db.to(db_dtype)


def group_forward(
    route: Route, x: Tensor, members: Sequence[Member]
) -> tuple[list[Tensor], Tensor]:
    """One y [..., N_i] per member and the stacked s, by one launch; see group_hook.py."""
    rows, tiles = flatten(x), route.config.tiles("forward")
    assert tiles is not None
    s, parts = _stacked_s(rows, members)
    ys = [x.new_empty(*x.shape[:-1], m.weight.shape[0]) for m in members]
    layers = [
        cuda_sm90.Layer(rows, m.weight, m.lora_A, m.lora_B, part, y, m.scale, m.bias, m.mask)
        for m, part, y in zip(members, parts, ys, strict=True)
    ]
    _run(tiles, "forward", layers)
    return ys, s


def group_backward(
    route: Route,
    dys: Sequence[Tensor],
    x: Tensor | None,
    s: Tensor | None,
    members: Sequence[Member],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """dx and every ds by one launch, then da and db of each member; see group_hook.py."""
    rows, tiles, dx = [flatten(dy) for dy in dys], route.config.tiles("dx"), None
    _, parts = _stacked_s(rows[0], members)
    if "x" in route.needs and tiles is not None:
        dx = rows[0].new_empty(route.x_shape)
        layers = [
            cuda_sm90.Layer(dy, m.weight, m.lora_B, m.lora_A, part, dx, m.scale, None, m.mask)
            for dy, m, part in zip(rows, members, parts, strict=True)
        ]
        _run(tiles, "dx", layers)
    elif "lora_A" in route.needs:
        for dy, m, part in zip(rows, members, parts, strict=True):
            part.copy_(shrink(route, dy, m.lora_B.t(), m.scale))
    das: list[Tensor | None] = []
    dbs: list[Tensor | None] = []
    offsets, _ = group_columns([m.lora_A.shape[0] for m in members])
    for dy, m, part, first in zip(rows, members, parts, offsets, strict=True):
        own_s = None if s is None else s[:, first : first + m.lora_A.shape[0]]
        da_dtype = m.da_dtype if "lora_A" in m.needs else None
        db_dtype = m.db_dtype if "lora_B" in m.needs else None
        da, db = reduce_pair(route, part, x, m.mask, da_dtype, dy, own_s, db_dtype)
        das.append(da)
        dbs.append(db)
    return dx, das, dbs


def shrink_reduce(
    route: Route,
    dy: Tensor,
    b: Tensor | None,
    scale: float,
    s: Tensor | None,
    need_ds: bool,
    db_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """See torch_ops.shrink_reduce."""
    config = route.config
    ds = db = None
    if need_ds and b is not None:
        if config.shrink_tiles is None:
            ds, _ = torch_ops.shrink_reduce(route, dy, b, scale, None, True, None)
        else:
            ds = shrink(route, dy, b.t(), scale)
    if db_dtype is not None and s is not None:
        if config.reduce_tiles is None:
            _, db = torch_ops.shrink_reduce(route, dy, None, scale, s, False, db_dtype)
        else:
            _, db = reduce_pair(route, None, None, None, None, dy, s, db_dtype)
    return ds, db


def reduce(route: Route, ds: Tensor, x: Tensor, mask: Mask | None, dtype: torch.dtype) -> Tensor:
    """See torch_ops.reduce. Accumulated in fp32 and rounded once, to dtype."""
    if route.config.reduce_tiles is None:
        return torch_ops.reduce(route, ds, x, mask, dtype)
    da, _ = reduce_pair(route, ds, x, mask, dtype, None, None, None)
    assert da is not None
    return da


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
    """da [R, K] = dsᵀ (mask ⊙ x) and db [N, R] = dyᵀ s by one launch, each if its dtype is given.

    Deterministic: parts of the tokens are summed in a fixed order, in fp32, and rounded once.
    """
    da = db = None
    jobs = []
    if da_dtype is not None and ds is not None and x is not None:
        x = flatten(x)
        da = torch.empty(ds.shape[1], x.shape[1], dtype=output_dtype(da_dtype), device=x.device)
        jobs.append(
            (x.shape[1], matrix(x), matrix(ds), mask_words(mask), output(transposed(da), da.dtype))
        )
    if db_dtype is not None and dy is not None and s is not None:
        dy = flatten(dy)
        db = torch.empty(dy.shape[1], s.shape[1], dtype=output_dtype(db_dtype), device=dy.device)
        jobs.append((dy.shape[1], matrix(dy), matrix(s), (0, 0, 0), output(matrix(db), db.dtype)))
    some = x if x is not None and da is not None else dy
    if some is not None and jobs:
        rank = da.shape[0] if da is not None else db.shape[1] if db is not None else 0
        _launch_reduce(route, some, rank, jobs)
    return (
        da if da is None or da_dtype is None else da.to(da_dtype),
        db if db is None or db_dtype is None else db.to(db_dtype),
    )


def _launch_reduce(route: Route, some: Tensor, R: int, jobs: list) -> None:
    tiles = route.config.reduce_tiles
    splits = 1 if tiles is None else tiles.splits
    place, math = place_of(some), math_of(some.dtype)
    size = native().reduce_workspace(math, [job[0] for job in jobs], R, splits)
    pointers, owners = workspace(place, *size)
    # Dependent: it may begin to start while the kernel that made ds or s ends, and waits for it.
    native().reduce(
        (place.number, place.stream, True), math, some.shape[0], R, jobs, splits, pointers
    )
    del owners


def _run(
    tiles: Tiles,
    direction: str,
    layers: Sequence[cuda_sm90.Layer],
    gradients: Sequence[cuda_sm90.Gradient] = (),
) -> None:
    """By the kernel that these tiles are of."""
    if tiles.descriptors:
        cuda_sm90.run(tiles, direction, layers, gradients)
    else:
        cuda_sm80.run(tiles, direction, layers)


def _new_y(route: Route, direction: str, x: Tensor) -> Tensor:
    """An uninitialised y (forward) or dx for x or dy."""
    return x.new_empty(route.y_shape if direction == "forward" else route.x_shape)


def _stacked_s(x: Tensor, members: Sequence[Member]) -> tuple[Tensor, list[Tensor]]:
    """The s of a group [M, R_total] with zeros between the members, and each member's columns."""
    ranks = [m.lora_A.shape[0] for m in members]
    offsets, total = group_columns(ranks)
    make = torch.empty if sum(ranks) == total else torch.zeros
    s = make(x.shape[0], total, dtype=x.dtype, device=x.device)
    return s, [s[:, at : at + rank] for at, rank in zip(offsets, ranks, strict=True)]


def _new_s(x: Tensor, R: int) -> Tensor:
    """An uninitialised s [M, R] for x [M, K], its rows beginning at multiples of 16 bytes."""
    step = _ROW_ALIGNMENT // x.element_size()
    padded = -(-R // step) * step
    s = torch.empty(x.shape[0], padded, dtype=x.dtype, device=x.device)
    return s if padded == R else s[:, :R]


def _shrink_into(
    s: Tensor,
    place: Place,
    x: Tensor,
    a: tuple[int, int, int],
    scale: float,
    mask: Mask | None,
    splits: int,
) -> None:
    """s [M, R] = scale · (mask ⊙ x) aᵀ, by one launch."""
    (M, K), R, math = x.shape, s.shape[1], math_of(x.dtype)
    pointers, owners = workspace(place, *native().shrink_workspace(math, M, R, splits))
    native().shrink(
        (place.number, place.stream, False), math, M, K, R, matrix(x), a, mask_words(mask),
        scale, output(matrix(s), s.dtype), splits, pointers,
    )  # fmt: skip
    del owners


def _decode(
    route: Route,
    direction: str,
    x: Tensor,
    weight: Tensor,
    shrink_adapter: Tensor,
    expand_adapter: Tensor,
    scale: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tiles = route.config.tiles(direction)
    splits = 1 if tiles is None else tiles.splits
    forward, x = direction == "forward", flatten(x)
    R = shrink_adapter.shape[0 if forward else 1]
    N = weight.shape[0 if forward else 1]
    see = matrix if forward else transposed
    y, s = torch.empty(x.shape[0], N, dtype=x.dtype, device=x.device), _new_s(x, R)
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()
    parts = max(1, decode_parts(route.problem, splits, direction))
    place, math = place_of(x), math_of(x.dtype)
    pointers, owners = workspace(place, *native().decode_workspace(N, R, splits, parts))
    native().decode(
        (place.number, place.stream, False), math, *x.shape, N, R, matrix(x), see(weight),
        see(shrink_adapter), see(expand_adapter), 0 if bias is None else bias.data_ptr(), scale,
        output(matrix(y), y.dtype), output(matrix(s), s.dtype), splits, parts, pointers,
    )  # fmt: skip
    del owners
    return y.view(route.y_shape if forward else route.x_shape), s
