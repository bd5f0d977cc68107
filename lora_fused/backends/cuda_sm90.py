"""The Hopper kernel csrc/cuda/sm90: x weightᵀ with the rank as more steps of the contraction.

Runs the strategies "s_first" (one launch makes s and y) and "split" (s is given) in both
directions, for single layers and for groups of up to three on one x. Names in the tuples for the
native module are those of the forward pass in both directions: dx has dy for x, ds for s, lora_B
for a (the adapter that shrinks) and lora_A for b (the one that expands).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_fused.backends.cuda_native import (
    mask_words,
    math_of,
    matrix,
    native,
    output,
    place_of,
    workspace,
)
from lora_fused.backends.torch_ops import flatten
from lora_fused.config import Candidate, Mask, Problem, Tiles, group_columns
from lora_fused.devices import Device

CAPABILITY = 90
MAX_MEMBERS = 3
_ROW = 8
"""Elements of 16 bits between the 16-byte boundaries at which tensor copies need rows to begin."""

NOT_OFFERED = {"split": "it takes single layers"}
"""Why a strategy has no candidate where the kernel can run the problem."""

_BLOCK_M, _BLOCK_K = 128, 64
_STAGES = {256: 4, 128: 6}
_REGISTERS = 168
_SHRINK_GROUPS = (1, 2, 3, 4)
_REDUCE_N = 256  # the tiles whose kernel sums up da and db as well
_REDUCE_PARTS = (2, 4, 8)
_MAX_REDUCE_RANK = 64
_NARROW = {256: 128, 128: 64}
"""Up to so many ranks S tiles of 64 columns are faster than one of block_n: less to multiply."""


class Layer(NamedTuple):
    """One layer of a launch, as the table in csrc/cuda/sm90/arguments.h has it."""

    x: Tensor
    weight: Tensor
    shrink: Tensor | None
    expand: Tensor
    s: Tensor
    y: Tensor
    scale: float = 0.0
    bias: Tensor | None = None
    mask: Mask | None = None


class Gradient(NamedTuple):
    """out [P, R] = zᵀ t of z [M, P] and t [M, R], to be summed up by a dx launch."""

    z: Tensor
    t: Tensor
    out: Tensor


def tiles(block_n: int, shrink_group: int = 1, reduce_parts: int = 0) -> Tiles:
    """The tiles of csrc/cuda/sm90/tile.cuh."""
    return Tiles(
        block_m=_BLOCK_M, block_n=block_n, block_k=_BLOCK_K, num_warps=12,
        num_stages=_STAGES[block_n], descriptors=True, persistent=True, shrink_group=shrink_group,
        reduce_parts=reduce_parts,
    )  # fmt: skip


def shared_bytes(block_n: int) -> int:
    """Alignment, the ring of stages, two staging buffers for each of 8 warps, control words."""
    stages = _STAGES[block_n]
    return 1024 + stages * (_BLOCK_M + block_n) * 2 * _BLOCK_K + 8 * 2 * 2048 + stages * 32


def _choices() -> list[tuple[str, Tiles]]:
    """Strategies and their tiles; without S tiles there is nothing to hand out together."""
    s_first = [("s_first", tiles(n, group)) for n in _STAGES for group in _SHRINK_GROUPS]
    return s_first + [("split", tiles(n)) for n in _STAGES]


def _backward_choices() -> list[tuple[str, Tiles]]:
    """The same for dx, da and db together."""
    pairs = itertools.product(_SHRINK_GROUPS, _REDUCE_PARTS)
    return [("s_first", tiles(_REDUCE_N, group, parts)) for group, parts in pairs]


SHIPPED = [
    *((operation, *choice, CAPABILITY) for operation in ("forward", "dx") for choice in _choices()),
    *(("backward", *choice, CAPABILITY) for choice in _backward_choices()),
]
"""Every (operation, strategy, tiles, target) that can be chosen."""


def reasons_against(problem: Problem) -> list[str]:
    """Why this kernel cannot run "forward" and "dx" of the problem; empty if it can."""
    device, reasons = problem.device, []
    if device is not None and device.capability != CAPABILITY:
        reasons.append(f"the Hopper kernel needs sm_90, the device is sm_{device.capability}")
    if problem.dtype not in (torch.bfloat16, torch.float16):
        reasons.append("the Hopper kernel multiplies bfloat16 and float16")
    if problem.weight_layout != "row":
        reasons.append("the Hopper kernel needs weights with unit stride along in_features")
    columns = [problem.N, *(N for N, _ in problem.group)]
    # NOTE: adapters with R no multiple of 8 are copied to longer rows; nothing else is.
    bad = not problem.aligned and (problem.R % _ROW == 0 or bool(problem.group))
    if bad or problem.K % _ROW or any(N % _ROW for N in columns):
        reasons.append("rows do not begin at multiples of 16 bytes")
    if len(problem.group) > MAX_MEMBERS:
        reasons.append(f"a launch takes {MAX_MEMBERS} layers, the group has {len(problem.group)}")
    if problem.given_mask:
        reasons.append("the caller drew the dropout mask")
    return reasons


def candidates(problem: Problem, device: Device, operation: str) -> list[Candidate]:
    """Every legal way to run "forward", "dx" or "backward" on a device."""
    if operation not in ("forward", "dx", "backward") or device.capability != CAPABILITY:
        return []
    if problem.R == 0 or reasons_against(problem):
        return []
    choices = _choices()
    if operation == "backward":
        few = problem.R <= _MAX_REDUCE_RANK and not problem.dropout and not problem.group
        choices = _backward_choices() if few else []
        blocks = -(-problem.M // _BLOCK_M)
        choices = [choice for choice in choices if choice[1].reduce_parts <= blocks]
    return [
        Candidate(strategy, chosen, shared_bytes(chosen.block_n), _REGISTERS)
        for strategy, chosen in choices
        if strategy == "s_first" or not problem.group
    ]


def run(
    chosen: Tiles, direction: str, layers: Sequence[Layer], gradients: Sequence[Gradient] = ()
) -> None:
    """One launch over the layers: y of each (forward) or of the first (dx), and s where shrink is.

    Layers with one scale and no dropout whose s stand side by side have it computed together.
    gradients: of lora_A and of lora_B, which a dx of one layer sums up in chosen.reduce_parts.
    """
    x, dx = flatten(layers[0].x), direction == "dx"
    place, M = place_of(x), x.shape[0]
    cluster = 2 if M > _BLOCK_M else 1
    entries, widest = _entries(layers, dx)
    masked = any(layer.mask is not None for layer in layers) and not dx
    wide = not masked and widest > _NARROW[chosen.block_n]
    columns = sum(-(-g.out.shape[0] // 16) * 16 for g in gradients)
    sums = 0
    if gradients:
        sums = native().matmul_sm90_partials(M, layers[0].s.shape[1], columns, chosen.reduce_parts)
    size = native().matmul_sm90_words(M, cluster, columns)
    pointers, owners = workspace(place, sums, size)
    rows = [(aligned(g.z), aligned(g.t), g.out) for g in gradients]
    s_given = layers[0].shrink is None  # split: dependent on the launch that makes s, just before
    native().matmul_sm90(
        (place.number, place.stream, s_given), math_of(x.dtype), dx, M, [e.words for e in entries],
        (chosen.block_n, cluster, chosen.block_n // 64 if wide else 1, chosen.shrink_group,
         chosen.reduce_parts if gradients else 0),
        [(o.shape[0], matrix(z), matrix(t), (0, 0, 0), output(matrix(o), o.dtype))
         for z, t, o in rows],
        pointers,
    )  # fmt: skip
    del owners, entries, rows


class _Entry(NamedTuple):
    words: tuple
    owners: tuple


def _entries(layers: Sequence[Layer], dx: bool) -> tuple[list[_Entry], int]:
    """What the native module is told about each layer, and the most ranks S tiles cover at once."""
    stacked = None if dx else _stacked(layers)
    entries, widest = [], 0
    for i, layer in enumerate(layers):
        shrink, target = layer.shrink, layer.s
        if stacked is not None:
            shrink, target = stacked if i == 0 else (None, layer.s)
        rank = 0 if shrink is None else shrink.shape[1 if dx else 0]
        widest = max(widest, rank)
        entries.append(_entry(layer, shrink, target, rank, dx))
    return entries, widest


def _entry(layer: Layer, shrink: Tensor | None, target: Tensor, rank: int, dx: bool) -> _Entry:
    x = aligned(flatten(layer.x))
    weight, expand = aligned(layer.weight), aligned(layer.expand)
    s = aligned(layer.s) if layer.shrink is None else layer.s
    a = expand if shrink is None else aligned(shrink)
    y, bias = flatten(layer.y), layer.bias
    if bias is not None and (bias.stride(0) != 1 or bias.data_ptr() % 4):
        bias = bias.clone(memory_format=torch.contiguous_format)
    words = (
        matrix(x), matrix(weight), matrix(a), matrix(expand),
        output(matrix(s), s.dtype), output(matrix(y), y.dtype),
        0 if bias is None else bias.data_ptr(), mask_words(layer.mask),
        y.shape[1], x.shape[1], s.shape[1], layer.scale,
        output(matrix(target), target.dtype), rank,
    )  # fmt: skip
    return _Entry(words, (x, weight, a, expand, s, bias))


def _stacked(layers: Sequence[Layer]) -> tuple[Tensor, Tensor] | None:
    """The adapters of a forward group one below the other, and the s of all, if one S tile may do
    them together: one scale, no dropout, ranks that leave no gaps between the columns of s."""
    first = layers[0]
    if len(layers) == 1 or any(layer.shrink is None or layer.mask for layer in layers):
        return None
    ranks = [layer.s.shape[1] for layer in layers]
    offsets, total = group_columns(ranks)
    if sum(ranks) != total or any(layer.scale != first.scale for layer in layers):
        return None
    s = first.s
    starts = [layer.s.storage_offset() - s.storage_offset() for layer in layers]
    if starts != offsets or any(layer.s.stride() != s.stride() for layer in layers):
        return None
    shrink = torch.cat([layer.shrink for layer in layers if layer.shrink is not None])
    return shrink, s.as_strided((s.shape[0], total), s.stride())


def aligned(t: Tensor) -> Tensor:
    """A matrix whose rows have unit stride and begin at multiples of 16 bytes: itself or a copy."""
    good = t.stride(1) == 1 or t.shape[1] == 1
    if good and t.data_ptr() % 16 == 0 and (t.shape[0] == 1 or t.stride(0) % _ROW == 0):
        return t
    beyond = -t.shape[1] % _ROW
    if beyond:
        return torch.nn.functional.pad(t, (0, beyond))[:, : t.shape[1]]
    return t.clone(memory_format=torch.contiguous_format)
