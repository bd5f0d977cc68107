"""The hooks of lora_fused/group_hook.py: q/k/v or gate/up on one x, each step in one launch.

Forward: one launch that makes the stacked s (the blocks of all members on the same rows of x are
neighbours, so that memory is read once) and one for all y; or one launch for everything.
Backward: one for the ds, one for dx (summed over the members in registers), one for all da and db.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_fused.backends.torch_ops import flatten
from lora_fused.backends.triton import launch
from lora_fused.backends.triton.candidates import default_tiles
from lora_fused.config import FUSED_STRATEGIES, Mask, Member, Route, Tiles, group_columns


def group_forward(
    route: Route, x: Tensor, members: Sequence[Member]
) -> tuple[list[Tensor], Tensor]:
    """One y [..., N_i] per member, and the stacked s [M, R_total]."""
    rows, strategy = flatten(x), route.config.forward
    s, parts = _stacked(rows, members)
    shape = x.shape[:-1]
    ys = [x.new_empty(*shape, m.weight.shape[0]) for m in members]
    if strategy not in FUSED_STRATEGIES:
        _shrink(route, [(rows, m.lora_A, p, m.scale, m.mask) for m, p in _zip(members, parts)])
    if strategy == "library":
        for m, p, y in zip(members, parts, ys, strict=True):
            y2 = flatten(y)
            if m.bias is None:
                torch.mm(rows, m.weight.t(), out=y2)
            else:
                torch.addmm(m.bias, rows, m.weight.t(), out=y2)
            y2.addmm_(p, m.lora_B.t())
        return ys, s
    packed = []
    for m, p, y in zip(members, parts, ys, strict=True):
        a = m.lora_A if strategy in FUSED_STRATEGIES else None
        operands = rows, m.weight.t(), flatten(y), p, m.lora_B.t(), a
        packed.append(launch.matmul_member(*operands, m.scale, m.bias))
    launch.matmul(_tiles(route, "forward"), packed, summed=False)
    return ys, s


def group_backward(
    route: Route,
    dys: Sequence[Tensor],
    x: Tensor | None,
    s: Tensor | None,
    members: Sequence[Member],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """dx [..., K] if "x" in route.needs; da and db of the members that need them."""
    rows, strategy = [flatten(dy) for dy in dys], route.config.dx
    needs_dx = "x" in route.needs
    ds, parts = _stacked(rows[0], members)
    fused = needs_dx and strategy in FUSED_STRATEGIES
    if not fused and (needs_dx or "lora_A" in route.needs):
        made = zip(rows, members, parts, strict=True)
        _shrink(route, [(dy, m.lora_B.t(), p, m.scale, None) for dy, m, p in made])
    dx = _input_gradient(route, rows, members, parts) if needs_dx else None
    das, dbs = _adapter_gradients(route, rows, x, s, ds, members)
    return dx, das, dbs


def _input_gradient(
    route: Route, dys: Sequence[Tensor], members: Sequence[Member], parts: Sequence[Tensor]
) -> Tensor:
    """dx = Σ_i dy_i W_i + mask_i ⊙ (ds_i A_i); a fused strategy writes the ds_i as well."""
    strategy = route.config.dx
    dx = dys[0].new_empty(route.x_shape)
    library = strategy == "library"
    if library:
        torch.mm(dys[0], members[0].weight, out=flatten(dx))
        for dy, m in zip(dys[1:], members[1:], strict=True):
            flatten(dx).addmm_(dy, m.weight)
        if all(m.mask is None for m in members):
            for m, p in _zip(members, parts):
                flatten(dx).addmm_(p, m.lora_A)
            return dx
    packed = []
    for dy, m, p in zip(dys, members, parts, strict=True):
        a = m.lora_B.t() if strategy in FUSED_STRATEGIES else None
        operands = None if library else dy, m.weight, flatten(dx), p, m.lora_A, a
        packed.append(launch.matmul_member(*operands, m.scale, None, m.mask))
    launch.matmul(_tiles(route, "dx"), packed, summed=True, accumulate=library)
    return dx


def _adapter_gradients(
    route: Route,
    dys: Sequence[Tensor],
    x: Tensor | None,
    s: Tensor | None,
    ds: Tensor,
    members: Sequence[Member],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """da and db of the members that need them, in one launch.

    With one mask for all (or none) x is read once, against the stacked ds.
    """
    das: list[Tensor | None] = [None] * len(members)
    dbs: list[Tensor | None] = [None] * len(members)
    offsets, _ = group_columns([m.lora_A.shape[0] for m in members])
    wanted: list[tuple[Tensor, Tensor, Mask | None, bool, torch.dtype]] = []
    places: list[tuple[list[Tensor | None], int]] = []
    together = _same_reduction(members)
    if x is not None and together:
        wanted.append((flatten(x), ds, members[0].mask, True, members[0].da_dtype))
    for i, (m, dy) in enumerate(zip(members, dys, strict=True)):
        columns = slice(offsets[i], offsets[i] + m.lora_A.shape[0])
        if "lora_A" in m.needs and x is not None and not together:
            wanted.append((flatten(x), ds[:, columns], m.mask, True, m.da_dtype))
            places.append((das, i))
        if "lora_B" in m.needs and s is not None:
            wanted.append((dy, s[:, columns], None, False, m.db_dtype))
            places.append((dbs, i))
    found = _reduce(route, wanted)
    if x is not None and together:
        stacked, *found = found
        das = [stacked[o : o + m.lora_A.shape[0]] for o, m in zip(offsets, members, strict=True)]
    for (gradients, i), gradient in zip(places, found, strict=True):
        gradients[i] = gradient
    return das, dbs


def _same_reduction(members: Sequence[Member]) -> bool:
    """Whether all da are rows of one reduction of x: the same mask, and all of them are wanted."""
    first = members[0]
    return all(
        "lora_A" in m.needs and m.da_dtype == first.da_dtype and _is_same(m.mask, first.mask)
        for m in members
    )


def _is_same(mask: Mask | None, other: Mask | None) -> bool:
    if mask is None or other is None:
        return mask is other
    seeds = mask.seed, other.seed
    if any(isinstance(seed, Tensor) for seed in seeds):
        return seeds[0] is seeds[1] and mask.threshold == other.threshold
    return mask == other


def _reduce(
    route: Route, wanted: Sequence[tuple[Tensor, Tensor, Mask | None, bool, torch.dtype]]
) -> list[Tensor]:
    if not wanted:
        return []
    if route.config.reduce_tiles is None and all(mask is None for _, _, mask, _, _ in wanted):
        return [launch.library_reduce(*each) for each in wanted]
    return launch.reduce(_tiles(route, "reduce"), wanted)


def _shrink(
    route: Route, wanted: Sequence[tuple[Tensor, Tensor, Tensor, float, Mask | None]]
) -> None:
    """Every s_i = scale_i · (mask_i ⊙ x_i) a_iᵀ."""
    if route.config.shrink_tiles is None and all(each[4] is None for each in wanted):
        for x, a, s, scale, _ in wanted:
            s.copy_(torch.mm(x, a.t())).mul_(scale)
    else:
        launch.shrink(_tiles(route, "shrink"), wanted)


def _stacked(x: Tensor, members: Sequence[Member]) -> tuple[Tensor, list[Tensor]]:
    """A stacked s [M, R_total] for the members, and its columns as views."""
    ranks = [m.lora_A.shape[0] for m in members]
    offsets, width = group_columns(ranks)
    make = x.new_empty if sum(ranks) == width else x.new_zeros
    s = make(x.shape[0], width)
    return s, [s[:, offset : offset + R] for offset, R in zip(offsets, ranks, strict=True)]


def _tiles(route: Route, operation: str) -> Tiles:
    return route.config.tiles(operation) or default_tiles(route.problem, operation)


def _zip(members: Sequence[Member], parts: Sequence[Tensor]) -> list[tuple[Member, Tensor]]:
    return list(zip(members, parts, strict=True))
