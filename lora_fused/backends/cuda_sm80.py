"""The mma.sync kernel csrc/cuda/sm80: x weightᵀ with the rank as more steps of the contraction.

Runs the strategies "s_first" (one launch makes s and y) and "split" (s is given) in both
directions, for single layers and for groups of up to three on one x. Offered where mma.sync is the
tensor cores' fast path: sm_80, 86, 89 and 120; it runs on sm_90 and sm_100 too, at a part of their
speed. Any strides: nothing is copied; operands whose rows do not begin at multiples of 16 bytes are
read by elements, slowly.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_fused.backends.cuda_native import (
    TF32,
    mask_words,
    math_of,
    matrix,
    native,
    output,
    place_of,
    transposed,
    workspace,
)
from lora_fused.backends.cuda_sm90 import Layer
from lora_fused.backends.torch_ops import flatten
from lora_fused.config import Candidate, Problem, Tiles, group_columns
from lora_fused.devices import Device

MAX_MEMBERS = 3
_MAX_CHUNKS = 24  # pieces of the ranks of all members, of the S tiles of one row of tiles

_STRATEGIES = {"s_first": (1, 2, 3, 4), "split": (1,)}
"""How many S tiles a ticket may hand out; without S tiles there is nothing to hand out together."""

NOT_OFFERED = {"s_first": f"the ranks would be more than {_MAX_CHUNKS} tiles of S in a row"}
"""Why a strategy has no candidate where the kernel can run the problem."""

_STATIC_SHARED = 256  # what is known of three tiles, and a flag
_SHARED_LIMITS = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    120: 99 << 10,
}  # by target, bytes of a block
_SLOW = range(90, 120)  # wgmma and tcgen05 are the fast paths there


class _Tile(NamedTuple):
    """One line of csrc/cuda/sm80/variants.h; registers: the most that ptxas gives on any target."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    registers: int


_TILES_16BIT = (
    _Tile(128, 256, 32, 8, 4, 255),
    _Tile(128, 128, 64, 8, 3, 192),
    _Tile(128, 128, 32, 4, 3, 255),
    _Tile(64, 128, 32, 4, 4, 255),
    _Tile(32, 64, 64, 4, 4, 168),
)
_TILES = {
    torch.bfloat16: (*_TILES_16BIT, _Tile(128, 256, 64, 8, 3, 255)),
    torch.float16: _TILES_16BIT,
    torch.float32: (_Tile(128, 128, 16, 8, 4, 255), _Tile(32, 64, 32, 4, 4, 168)),
}


def _tiles(tile: _Tile, shrink_group: int = 1) -> Tiles:
    return Tiles(
        block_m=tile.block_m, block_n=tile.block_n, block_k=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages, persistent=True,
        shrink_group=shrink_group,
    )  # fmt: skip


def shared_bytes(tiles: Tiles, itemsize: int) -> int:
    """Shared memory of one block."""
    stage = (tiles.block_m + tiles.block_n) * tiles.block_k * itemsize
    return tiles.num_stages * stage + _STATIC_SHARED


def _shipped() -> list[tuple[str, str, Tiles, int]]:
    found = [
        (operation, strategy, _tiles(tile, group), target)
        for operation in ("forward", "dx")
        for strategy, groups in _STRATEGIES.items()
        for dtype, tiles in _TILES.items()
        for tile, group in itertools.product(tiles, groups)
        for target, limit in _SHARED_LIMITS.items()
        if shared_bytes(_tiles(tile), dtype.itemsize) <= limit
    ]
    return list(dict.fromkeys(found))


SHIPPED = _shipped()
"""Every (operation, strategy, tiles, target) that can be chosen."""


def reasons_against(problem: Problem) -> list[str]:
    """Why this kernel cannot run "forward" and "dx" of the problem; empty if it can."""
    reasons = []
    if problem.device is not None and problem.device.capability in _SLOW:
        reasons.append(f"mma.sync is not the fast path of sm_{problem.device.capability}")
    if problem.dtype not in _TILES:
        reasons.append("the mma.sync kernel multiplies bfloat16, float16 and float32 as TF32")
    elif problem.dtype == torch.float32 and math_of(problem.dtype) != TF32:
        reasons.append("the mma.sync kernel multiplies float32 as TF32, which torch forbids")
    if not _in_chunks(problem):
        reasons.append("rows that are not multiples of 16 bytes are read by elements, slowly")
    if len(problem.group) > MAX_MEMBERS:
        reasons.append(f"a launch takes {MAX_MEMBERS} layers, the group has {len(problem.group)}")
    if problem.given_mask:
        reasons.append("the caller drew the dropout mask")
    return reasons


def _in_chunks(problem: Problem) -> bool:
    """The large operands are read 16 bytes at a time, if x and dy are as contiguous as usual."""
    step = 16 // problem.dtype.itemsize
    sizes = [problem.K, problem.N, *(N for N, _ in problem.group)]
    return problem.weight_layout != "strided" and all(size % step == 0 for size in sizes)


def candidates(problem: Problem, device: Device, operation: str) -> list[Candidate]:
    """Every legal way to run "forward" or "dx" on a device."""
    if operation not in ("forward", "dx") or device.capability in _SLOW:
        return []
    if problem.R == 0 or reasons_against(problem):
        return []
    found = []
    for strategy, groups in _STRATEGIES.items():
        for tile, group in itertools.product(_TILES[problem.dtype], groups):
            chosen = _tiles(tile, group)
            if strategy == "s_first" and _chunks(problem, operation, tile) > _MAX_CHUNKS:
                continue
            shared = shared_bytes(chosen, problem.dtype.itemsize)
            found.append(Candidate(strategy, chosen, shared, tile.registers))
    return found


def _chunks(problem: Problem, operation: str, tile: _Tile) -> int:
    """S tiles per row of tiles if no two members share one: the most there can be."""
    ranks = [R for _, R in problem.group] if operation == "forward" else []
    width = min(tile.block_n, 128)
    return sum(-(-R // width) for R in ranks or [problem.R])


def run(chosen: Tiles, direction: str, layers: Sequence[Layer]) -> None:
    """y of each layer (forward, one launch) or their sum in the y of the first (dx, one launch
    after the other), and s of those with `shrink`."""
    if direction == "forward":
        _launch(chosen, layers, dx=False, accumulate=False)
        return
    for i, layer in enumerate(layers):
        _launch(chosen, [layer._replace(y=layers[0].y)], dx=True, accumulate=i > 0)


def _launch(chosen: Tiles, layers: Sequence[Layer], dx: bool, accumulate: bool) -> None:
    first = layers[0]
    x, place = flatten(first.x), place_of(first.x)
    offsets, s = _stacked(layers)
    see = transposed if dx else matrix
    entries, owners = [], []
    for layer, offset in zip(layers, offsets, strict=True):
        y, bias = flatten(layer.y), layer.bias
        bias = bias.contiguous() if bias is not None else None
        owners.append(bias)
        shrink = (0, 0, 0) if layer.shrink is None else see(layer.shrink)
        # Forward masks x where s is made; with s given there is nothing left to mask.
        mask = layer.mask if dx or layer.shrink is not None else None
        entries.append(
            (
                see(layer.weight), shrink, see(layer.expand), output(matrix(y), y.dtype),
                0 if bias is None else bias.data_ptr(), mask_words(mask),
                y.shape[1], layer.s.shape[1], offset, layer.scale,
            )
        )  # fmt: skip
    size = native().matmul_sm80_words(x.shape[0], chosen.block_m)
    pointers, words = workspace(place, 0, size)
    s_given = first.shrink is None  # split: dependent on the launch that makes s, just before
    native().matmul_sm80(
        (place.number, place.stream, s_given), math_of(x.dtype), *x.shape, matrix(x),
        output(matrix(s), s.dtype), entries,
        (chosen.block_m, chosen.block_n, chosen.block_k, chosen.shrink_group),
        (s_given, dx, accumulate), pointers,
    )  # fmt: skip
    del owners, words


def _stacked(layers: Sequence[Layer]) -> tuple[list[int], Tensor]:
    """The first columns of each layer's s in the s of all, which stand side by side."""
    offsets, total = group_columns([layer.s.shape[1] for layer in layers])
    first = layers[0].s
    if len(layers) == 1:
        return [0], first
    starts = [layer.s.storage_offset() - first.storage_offset() for layer in layers]
    assert starts == offsets and all(layer.s.stride() == first.stride() for layer in layers)
    return offsets, first.as_strided((first.shape[0], total), first.stride())
