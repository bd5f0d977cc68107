"""How the tensors of one LoRA linear layer may lie on a mesh: one table, stated once.

    layout     x           weight    lora_A    lora_B    bias      y           s
    replicate  R           R         R         R         R         R           R
    tokens     Shard(d)    R         R         R         R         Shard(d)    Shard(d)
    column     R           Shard(0)  R         Shard(0)  Shard(0)  Shard(-1)   R
    row        Shard(-1)   Shard(1)  Shard(1)  R         once      Partial     Partial

R is replicated; d is any dimension of x but the last. Column splits out_features, row splits
in_features. In a row layout every rank computes s and y of its own slice of in_features; since y
is linear in s, the partial s is never summed: one all-reduce of y is all. The bias is added on one
rank only (its placement is Partial: the other ranks hold zeros). The gradients follow:

    layout     dx          dweight   da        db        dbias
    tokens     Shard(d)    Partial   Partial   Partial   Partial
    column     Partial     Shard(0)  Partial   Shard(0)  Shard(0)
    row        Shard(-1)   Shard(1)  Shard(1)  Partial   R

A layout holds for one dimension of the mesh; on a mesh of several, each dimension has its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

import lora_fused.ops  # noqa: F401  (registers the operators)


@dataclass(frozen=True, slots=True)
class Layout:
    """The placements of a layer's tensors, and those of the gradients, on one mesh dimension."""

    x: Placement
    weight: Placement
    lora_A: Placement
    lora_B: Placement
    bias: Placement
    y: Placement
    s: Placement
    dx: Placement
    dweight: Placement
    da: Placement
    db: Placement
    dbias: Placement

    @property
    def operands(self) -> tuple[Placement, ...]:
        """Of x, weight, lora_A, lora_B and bias."""
        return self.x, self.weight, self.lora_A, self.lora_B, self.bias

    @property
    def gradients(self) -> tuple[Placement, ...]:
        """Of the same five, as one rank computes them."""
        return self.dx, self.dweight, self.da, self.db, self.dbias


_R = Replicate()
_SPLIT_LAST = -1  # in a layout, of x and y; a DTensor knows dimensions from the front only

LAYOUTS = {
    "replicate": Layout(*(_R,) * 12),
    "column": Layout(
        x=_R, weight=Shard(0), lora_A=_R, lora_B=Shard(0), bias=Shard(0),
        y=Shard(_SPLIT_LAST), s=_R,
        dx=Partial(), dweight=Shard(0), da=Partial(), db=Shard(0), dbias=Shard(0),
    ),
    "row": Layout(
        x=Shard(_SPLIT_LAST), weight=Shard(1), lora_A=Shard(1), lora_B=_R, bias=Partial(),
        y=Partial(), s=Partial(),
        dx=Shard(_SPLIT_LAST), dweight=Shard(1), da=Shard(1), db=Partial(), dbias=_R,
    ),
}  # fmt: skip


def tokens_layout(dim: int) -> Layout:
    """x, y and s split along one of the leading dimensions of x, parameters replicated."""
    split, rest = Shard(dim), (_R,) * 4
    return Layout(split, *rest, split, split, split, *(Partial(),) * 4)


def layout_of(x: Placement, weight: Placement, dims: int) -> Layout:
    """The layout that the weight's placement asks for; for a whole weight, the one x has.

    dims is x.dim(). x must be brought to the layout's placement: a replicated weight needs the
    whole rows of x.
    """
    if weight.is_shard(0):
        return LAYOUTS["column"]
    if weight.is_shard(1):
        return LAYOUTS["row"]
    if isinstance(x, Shard) and x.dim % dims < dims - 1:
        return tokens_layout(x.dim % dims)
    return LAYOUTS["replicate"]


def from_the_front(placement: Placement, dims: int) -> Placement:
    """Shard(-1) as DTensor wants it."""
    if isinstance(placement, Shard) and placement.dim < 0:
        return Shard(placement.dim + dims)
    return placement


def _layouts(dims: int) -> list[Layout]:
    return [*LAYOUTS.values(), *(tokens_layout(d) for d in range(dims - 1))]


@register_sharding(torch.ops.lora_fused.lora_linear.default)
def _forward_shardings(
    x: Any, weight: Any, lora_A: Any, lora_B: Any, bias: Any, seed: Any, *options: Any
) -> list[tuple[list[Any], list[Any]]]:
    """Every layout, for the operands that are there. The seed is replicated.

    With dropout only whole rows of x: the ranks of a split x would all draw the mask of the first
    slice. call_sharded gives each its own seed.
    """
    dims, given = len(x.shape), (x, weight, lora_A, lora_B, bias)
    layouts = _layouts(dims) if seed is None else _without_split_x(dims)
    return [
        (
            [from_the_front(layout.y, dims), from_the_front(layout.s, dims)],
            [*_given((*layout.operands, _R), (*given, seed), dims), *(None for _ in options)],
        )
        for layout in layouts
    ]


@register_sharding(torch.ops.lora_fused.lora_linear_backward.default)
def _backward_shardings(
    dy: Any, x: Any, weight: Any, lora_A: Any, lora_B: Any, bias: Any, s: Any, seed: Any,
    scaling: float, dropout_p: float, backend: str, needs: list[bool],
) -> list[tuple[list[Any], list[Any]]]:  # fmt: skip
    """The forward's layouts. dy is whole where y is Partial; the bias gives only its shape."""
    dims, given = len(x.shape), (x, weight, lora_A, lora_B, bias)
    shardings = []
    for layout in _layouts(dims) if seed is None else _without_split_x(dims):
        dy_placement = _R if layout.y.is_partial() else from_the_front(layout.y, dims)
        bias_placement = _R if layout.bias.is_partial() else layout.bias
        gradients = [
            from_the_front(g, dims) if need and t is not None else _R
            for g, need, t in zip(layout.gradients, needs, given, strict=True)
        ]
        operands = _given(
            (dy_placement, *layout.operands[:-1], bias_placement, layout.s, _R),
            (dy, *given, s, seed), dims,
        )  # fmt: skip
        shardings.append((gradients, [*operands, None, None, None, None]))
    return shardings


def _without_split_x(dims: int) -> list[Layout]:
    return [layout for layout in _layouts(dims) if layout.x.is_replicate()]


def _given(
    placements: tuple[Placement, ...], operands: tuple[Any, ...], dims: int
) -> list[Placement | None]:
    return [
        None if operand is None else from_the_front(placement, dims)
        for placement, operand in zip(placements, operands, strict=True)
    ]
