"""Which tiles may be used where: every legal choice for a Problem, its limits stated once.

Pure functions: no GPU, no Triton. `SHIPPED` is everything that can ever be chosen; the tests
compile all of it for all targets and run it in the PTX emulator. What it needs (registers, shared
memory) was read from the compiled code and stands in `resources.py`.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import torch

from lora_fused.backends.triton.resources import RESOURCES
from lora_fused.config import Candidate, Problem, Tiles
from lora_fused.devices import Device, tf32_is_allowed

DECODE_TOKENS = 16
MAX_PARTS = 16
_WAVES = 2
_MIN_STEPS = 4

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx942", "gfx950")
TARGETS = (*NVIDIA, *AMD)


class Shipped(NamedTuple):
    """One choice. kind is "half" (bf16 and fp16), "tf32" or "ieee" (fp32 without TF32)."""

    operation: str
    strategy: str
    tiles: Tiles
    target: str
    kind: str

    def __str__(self) -> str:
        t = self.tiles
        flags = "d" * t.descriptors + "p" * t.persistent
        size = f"{t.block_m}x{t.block_n}x{t.block_k}r{t.block_r}w{t.num_warps}s{t.num_stages}"
        return f"{self.target} {self.kind} {self.operation} {self.strategy} {size}{flags}"


def _tile(m: int, n: int, k: int, warps: int, stages: int, flags: str = "", r: int = 0) -> Tiles:
    return Tiles(m, n, k, r, warps, stages, descriptors="d" in flags, persistent="p" in flags)


_STAND_IN = _tile(64, 128, 64, 4, 3)  # shipped wherever descriptors are
_SQUARE = _tile(128, 128, 64, 8, 4)

# mma.sync: the accumulators live in registers, 128x256 is the most that 255 of them hold.
_SYNC = [
    _tile(128, 256, 32, 8, 4),
    _tile(128, 128, 32, 8, 4),
    _STAND_IN,
    _tile(64, 64, 64, 4, 3),
]
_MFMA = [_tile(256, 128, 32, 8, 2), _tile(128, 128, 64, 8, 2), _tile(64, 64, 64, 4, 2)]
_SPLIT = {
    "sm_80": _SYNC,
    "sm_86": _SYNC,
    "sm_89": _SYNC,
    "sm_120": [*_SYNC, _tile(128, 128, 32, 8, 4, "d")],
    # wgmma: persistent blocks overlap the store of a tile with the loads of the next.
    "sm_90": [
        _tile(128, 256, 64, 8, 3, "dp"),
        _tile(128, 128, 64, 8, 4, "dp"),
        _tile(64, 128, 64, 4, 4, "d"),
        _SQUARE,
        _STAND_IN,
    ],
    # tcgen05; with 4 warps a 128x256 tile spills.
    "sm_100": [
        _tile(128, 256, 64, 8, 3, "d"),
        _tile(128, 128, 64, 8, 4, "d"),
        _tile(64, 128, 64, 4, 4, "d"),
        _SQUARE,
        _STAND_IN,
    ],
    "gfx942": _MFMA,
    "gfx950": _MFMA,
}
_ONE_PASS = {
    **{target: (_tile(128, 128, 32, 8, 3),) for target in ("sm_80", "sm_86", "sm_89", "sm_120")},
    **{target: (_tile(128, 128, 64, 8, 3, "d"), _STAND_IN) for target in ("sm_90", "sm_100")},
    **{target: (_tile(64, 64, 64, 4, 2),) for target in AMD},
}
_FUSED_RANKS = (16, 64)
_SKINNY_RANKS = (16, 64, 128)


def _half(target: str) -> list[Shipped]:
    """Everything for bf16 and fp16."""
    stages = 2 if target in AMD else 3
    found = []
    for operation in ("forward", "dx"):
        found += [Shipped(operation, "split", t, target, "half") for t in _SPLIT[target]]
        for r in _FUSED_RANKS:
            decode = [_tile(16, 64, 128, 4, stages), _tile(16, 32, 128, 4, stages)]
            for strategy, fused in (("one_pass", _ONE_PASS[target]), ("decode", decode)):
                found += [
                    Shipped(operation, strategy, replace(t, block_r=r), target, "half")
                    for t in fused
                ]
    for r in _SKINNY_RANKS:
        depth = 128 if r == 16 else 64
        wide = r == 128 or (r == 64 and target in ("sm_90", "sm_100"))
        for m in (64, 16):
            tiles = _tile(m, 0, depth, 8 if m == 64 and wide else 4, stages, r=r)
            found.append(Shipped("shrink", "shrink", tiles, target, "half"))
        tiles = _tile(64, 64, 0, 4 if r == 16 else 8, stages, r=r)
        found.append(Shipped("reduce", "reduce", tiles, target, "half"))
    return found


def _single(target: str, kind: str) -> list[Shipped]:
    """Everything for fp32. IEEE products run outside the tensor cores."""
    stages = 2 if target in AMD else 3
    tile = _tile(64, 64, 32, 8 if target == "sm_100" else 4, stages)
    if kind == "ieee":
        tile = _tile(64, 64, 32, 8, 2 if target in ("sm_100", "sm_120") else stages)
    found = [Shipped(operation, "split", tile, target, kind) for operation in ("forward", "dx")]
    for r in (16, 64):
        warps = 8 if kind == "tf32" and r == 64 else 4
        shrink, reduce = _tile(32, 0, 32, warps, stages, r=r), _tile(32, 32, 0, 4, stages, r=r)
        found.append(Shipped("shrink", "shrink", shrink, target, kind))
        found.append(Shipped("reduce", "reduce", reduce, target, kind))
    return found


SHIPPED: list[Shipped] = [
    choice
    for target in TARGETS
    for choice in (
        *_half(target),
        *_single(target, "ieee"),
        *(_single(target, "tf32") if target in NVIDIA else ()),
    )
]


def candidates(problem: Problem, device: Device, operation: str) -> list[Candidate]:
    """The legal ways to run "forward", "dx", "shrink" or "reduce"; none for an unknown target."""
    found = []
    for choice in _choices(target_of(device), kind_of(problem.dtype), operation):
        shared, registers = RESOURCES[str(choice)]
        if shared <= device.shared_bytes_per_block and is_legal(problem, choice):
            tiles = replace(choice.tiles, splits=_splits(problem, device, operation, choice.tiles))
            found.append(Candidate(choice.strategy, tiles, shared, registers))
    return found


@functools.cache
def _choices(target: str, kind: str, operation: str) -> tuple[Shipped, ...]:
    wanted = (operation, target, kind)
    return tuple(c for c in SHIPPED if (c.operation, c.target, c.kind) == wanted)


def target_of(device: Device) -> str:
    """The target whose code the device runs: its own, else the newest older one of its generation.

    "" where there is none.
    """
    if device.kind == "hip":
        return f"gfx{device.capability}" if f"gfx{device.capability}" in AMD else ""
    known = [int(name.removeprefix("sm_")) for name in NVIDIA]
    older = [c for c in known if c <= device.capability and c // 10 == device.capability // 10]
    return f"sm_{max(older)}" if older else ""


def kind_of(dtype: torch.dtype) -> str:
    """The kind of `Shipped` for a compute dtype, as torch allows TF32 now."""
    if dtype != torch.float32:
        return "half"
    tf32 = tf32_is_allowed() and torch.version.hip is None
    return "tf32" if tf32 else "ieee"


def is_legal(problem: Problem, choice: Shipped) -> bool:
    """Whether the kernels can run the problem with these tiles, and with no much smaller ones."""
    tiles = choice.tiles
    if choice.operation in ("shrink", "reduce"):
        together = choice.operation == "reduce" and not problem.dropout
        rank = problem.R if together else _rank(problem)  # a group's stacked ds, or one member's
        return tiles.block_r == skinny_block(rank, choice.kind)
    if not _is_as_small(choice, problem):
        return False
    if problem.dropout and choice.operation == "dx" and _is_wide(tiles):
        return False  # the masked term needs accumulators of its own
    if len(problem.group) > 1 and _is_wide(tiles):
        return False
    if problem.has_bias and not takes_bias(choice):
        return False
    if choice.strategy != "split":
        if problem.dropout or not 0 < _rank(problem) <= tiles.block_r:
            return False
        if any(r < tiles.block_r and _rank(problem) <= r for r in _FUSED_RANKS):
            return False
        if (choice.strategy == "decode") != (problem.M <= DECODE_TOKENS):
            return False
    return not tiles.descriptors or _fits_descriptors(problem)


def left_out(problem: Problem) -> list[str]:
    """Why there is no kernel that makes s and y in one launch; empty where there is one."""
    rank, most = _rank(problem), _FUSED_RANKS[-1]
    reasons = []
    if problem.dropout:
        reasons.append("one_pass and decode make no dropout mask")
    if kind_of(problem.dtype) != "half":
        reasons.append("one_pass and decode are for bfloat16 and float16")
    elif problem.M > DECODE_TOKENS and not _has_one_pass(problem):
        reasons.append(f"one_pass has no tile for as few tokens as {problem.M} on this device")
    if rank > most:
        reasons.append(f"one_pass and decode take ranks up to {most}, this one is {rank}")
    return reasons


def _has_one_pass(problem: Problem) -> bool:
    """Whether a tile of the device's is not much larger than the problem."""
    target = "" if problem.device is None else target_of(problem.device)
    choices = _choices(target, "half", "forward")
    return any(c.strategy == "one_pass" and _is_as_small(c, problem) for c in choices)


def _is_as_small(choice: Shipped, problem: Problem) -> bool:
    return choice.tiles.block_m <= max(64, _power_of_two(problem.M))


def takes_bias(choice: Shipped) -> bool:
    """Whether a bias may be added.

    For sm_100 Triton 3.8 packs results of tcgen05.ld in pairs for that, and in some tiles before
    the wait, which PTX leaves undefined; the emulator finds it.
    """
    if choice.target != "sm_100" or choice.operation != "forward" or choice.kind == "ieee":
        return True
    square = choice.tiles.block_m == choice.tiles.block_n == 128
    return choice.strategy == "decode" or (choice.strategy == "split" and square)


def _is_wide(tiles: Tiles) -> bool:
    return tiles.block_m * tiles.block_n > 128 * 128


def _fits_descriptors(problem: Problem) -> bool:
    """TMA needs rows at multiples of 16 bytes: x [M, K], y [M, N] and the weight either way."""
    sizes = (problem.K, *(n for n, _ in problem.group or ((problem.N, problem.R),)))
    multiple = 16 // problem.dtype.itemsize
    rows = all(size % multiple == 0 for size in sizes)
    return problem.aligned and problem.weight_layout != "strided" and rows


def _rank(problem: Problem) -> int:
    """The largest rank of one member."""
    return max((r for _, r in problem.group), default=problem.R)


def _splits(problem: Problem, device: Device, operation: str, tiles: Tiles) -> int:
    """Parts of the contraction that fill the device about _WAVES times."""
    if operation == "shrink":
        blocks, steps = _cdiv(problem.M, tiles.block_m), _cdiv(problem.K, tiles.block_k)
    elif operation == "reduce":
        blocks = _cdiv(problem.K, tiles.block_n) + _cdiv(problem.N, tiles.block_n)
        steps = _cdiv(problem.M, tiles.block_m)
    else:
        return 1
    wanted = _cdiv(_WAVES * device.sms, max(blocks, 1))
    return max(1, min(MAX_PARTS, wanted, steps // _MIN_STEPS))


def rank_block(R: int) -> int:
    """The width of one step of the rank-R term of `split`."""
    return min(64, max(16, _power_of_two(R)))


def skinny_block(R: int, kind: str = "half") -> int:
    """The ranks that one block of shrink or reduce makes."""
    widths = _SKINNY_RANKS if kind == "half" else (16, 64)
    return next((w for w in widths if w >= R), widths[-1])


def default_tiles(problem: Problem, operation: str) -> Tiles:
    """Tiles for a part that was given none: the first legal ones, or small ones."""
    if problem.device is not None:
        for candidate in candidates(problem, problem.device, operation):
            if candidate.strategy in ("split", operation):
                return candidate.tiles
    r = skinny_block(_rank(problem), "ieee")
    if operation == "shrink":
        return _tile(32, 0, 32, 4, 2, r=r)
    if operation == "reduce":
        return replace(_tile(32, 32, 0, 4, 2, r=r), splits=2)
    return _tile(32, 32, 32, 4, 2)


def tiles_without_descriptors(tiles: Tiles) -> Tiles:
    """Shipped tiles that stand in for those whose tensors TMA turns out not to reach."""
    without = replace(tiles, descriptors=False, persistent=False)
    return without if without == _SQUARE else replace(_STAND_IN, block_r=tiles.block_r)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
