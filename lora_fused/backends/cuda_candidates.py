"""What the CUDA kernels can run: every legal choice for a problem on a device.

Pure functions of their arguments; needs neither a GPU nor the native module. The limits of each
kernel are stated here and nowhere else on this side; the launchers in csrc/cuda refuse what breaks
them.
"""

from __future__ import annotations

import itertools

import torch

from lora_fused.backends import cuda_sm80, cuda_sm90
from lora_fused.config import Candidate, Problem, Tiles
from lora_fused.devices import Device

TARGETS = (80, 86, 89, 90, 100, 120)
"""The targets that the shipped binary has machine code for; later ones run its PTX."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_RANK = 512
DECODE_TOKENS = 16

_STRATEGIES = ("s_first", "split", "decode")
_SPLITS = (1, 2, 4, 8, 16, 32, 64)
_RESERVED_SHARED = 1024  # of each block, by the driver
_MOST_BLOCKS_PER_SM = 4  # beyond that, more splits only add partial sums
_ROW_BYTES = 128
_SHRINK_M, _REDUCE_P, _REDUCE_M = 128, 128, 32
_DECODE_N, _DECODE_RANKS = 16, 32
_REGISTERS = {16: 128, 64: 128, 128: 200}


def reasons_against(problem: Problem) -> list[str]:
    """Why no CUDA kernel runs the problem, whatever the machine; empty if some do."""
    reasons = []
    if problem.dtype not in DTYPES:
        name = str(problem.dtype).removeprefix("torch.")
        reasons.append(f"there are no CUDA kernels for {name}")
    if problem.R > MAX_RANK and not problem.group:
        reasons.append(f"rank {problem.R} is beyond {MAX_RANK}")
    if not problem.plain:
        reasons.append("a tensor is not an ordinary strided torch.Tensor")
    if problem.M == 0 or problem.K == 0 or problem.N == 0:
        reasons.append("the problem is empty")
    device = problem.device
    if device is not None and device.kind != "cuda":
        reasons.append("the device is not NVIDIA's")
    elif device is not None and device.capability < TARGETS[0]:
        reasons.append(f"the device is sm_{device.capability}, the kernels begin at sm_80")
    return reasons


def candidates(problem: Problem, device: Device, operation: str) -> list[Candidate]:
    """Every legal way to run "forward", "dx", "shrink", "reduce" or "backward" (dx, da and db by
    one launch); the same order every time."""
    if reasons_against(problem) or problem.R == 0:
        return []
    small = {
        "shrink": _shrink_candidates,
        "reduce": _reduce_candidates,
        "forward": _decode_candidates,
        "dx": _decode_candidates,
    }.get(operation)
    found = [] if small is None else small(problem, device, operation)
    for kernel in (cuda_sm90, cuda_sm80):
        found += kernel.candidates(problem, device, operation)
    budget = device.shared_bytes_per_block
    return [candidate for candidate in found if candidate.shared_bytes <= budget]


def left_out(problem: Problem) -> list[str]:
    """Why y, or dx if it is needed, has no candidate of a strategy; empty where all have one.

    Nothing of decode where the tokens are more than it is for.
    """
    device = problem.device
    if device is None:
        return []
    directions = ("forward", "dx") if "x" in problem.needs else ("forward",)
    strategies = _STRATEGIES if problem.M <= DECODE_TOKENS else _STRATEGIES[:-1]
    missing: dict[str, dict[str, list[str]]] = {}
    for direction in directions:
        have = {c.strategy for c in candidates(problem, device, direction)}
        for strategy in strategies:
            if strategy not in have:
                for reason in _reasons_against(problem, device, direction, strategy):
                    missing.setdefault(reason, {}).setdefault(strategy, []).append(direction)
    return [_line(by_strategy, directions, reason) for reason, by_strategy in missing.items()]


def _line(by_strategy: dict[str, list[str]], directions: tuple[str, ...], reason: str) -> str:
    """ "s_first and split: …", with the direction where the reason is one's alone."""
    of = next(iter(by_strategy.values()))
    which = "" if len(of) == len(directions) else f" of {'y' if of == ['forward'] else 'dx'}"
    return f"{' and '.join(by_strategy)}{which}: {reason}"


def _reasons_against(problem: Problem, device: Device, direction: str, strategy: str) -> list[str]:
    if strategy == "decode":
        few = f"its blocks are too few to share rank {problem.R}"
        return _against_decode(problem, direction) or [few]
    kernel = cuda_sm90 if device.capability == cuda_sm90.CAPABILITY else cuda_sm80
    return kernel.reasons_against(problem) or [kernel.NOT_OFFERED[strategy]]


def rank_tile(R: int, dtype: torch.dtype) -> int:
    """Ranks per block of shrink and reduce; as rank_tile in csrc/cuda/launchers.h."""
    return 16 if R <= 16 else 64 if R <= 64 or dtype == torch.float32 else 128


def decode_parts(problem: Problem, splits: int, direction: str) -> int:
    """Into how many parts of the contraction decode cuts s; 0 where decode cannot run it.

    Every part of s is computed by one of the first blocks, so there are no more than blocks.
    """
    outputs, inner = _sizes(problem, direction)
    blocks = -(-outputs // _DECODE_N) * splits
    chunks = -(-problem.R // _DECODE_RANKS)
    steps = -(-inner // (64 // problem.dtype.itemsize))
    return min(blocks // chunks, 16, max(1, steps // 8))


def _sizes(problem: Problem, direction: str) -> tuple[int, int]:
    """Columns of the result, and the length of the contraction."""
    return (problem.N, problem.K) if direction == "forward" else (problem.K, problem.N)


def _splits(tiles: int, steps: int, device: Device) -> list[int]:
    """Parts of a contraction of so many pipeline steps that keep the device busier, not idler."""
    most = max(1, _MOST_BLOCKS_PER_SM * device.sms // max(tiles, 1))
    return [n for n in _SPLITS if n == 1 or (n <= most and n * 2 <= steps)]


def _panels(columns: int, itemsize: int) -> int:
    """Rows of 128 bytes that hold so many columns."""
    return -(-columns * itemsize // _ROW_BYTES)


def shrink_tiles(R: int, dtype: torch.dtype, splits: int) -> Tiles:
    """The tiles of csrc/cuda/shrink.cuh."""
    block_k, block_r = _ROW_BYTES // dtype.itemsize, rank_tile(R, dtype)
    return Tiles(
        block_m=_SHRINK_M, block_k=block_k, block_r=block_r, num_warps=8, num_stages=3,
        splits=splits,
    )  # fmt: skip


def shrink_shared(tiles: Tiles, itemsize: int) -> int:
    """Shared memory of one block, for the adapter layout that needs more."""
    along = tiles.block_r * _ROW_BYTES
    across = _panels(tiles.block_r, itemsize) * tiles.block_k * _ROW_BYTES
    return tiles.num_stages * (tiles.block_m * _ROW_BYTES + max(along, across))


def reduce_tiles(R: int, dtype: torch.dtype, splits: int) -> Tiles:
    """The tiles of csrc/cuda/reduce.cuh: block_n columns of x or dy, block_k tokens a step."""
    stages = 3 if dtype == torch.float32 else 4
    return Tiles(
        block_n=_REDUCE_P, block_k=_REDUCE_M, block_r=rank_tile(R, dtype), num_warps=8,
        num_stages=stages, splits=splits,
    )  # fmt: skip


def reduce_shared(tiles: Tiles, itemsize: int) -> int:
    """Shared memory of one block."""
    panels = _panels(tiles.block_n, itemsize) + _panels(tiles.block_r, itemsize)
    return tiles.num_stages * panels * tiles.block_k * _ROW_BYTES


def decode_tiles(splits: int) -> Tiles:
    """The tiles of csrc/cuda/decode.cuh."""
    return Tiles(block_m=DECODE_TOKENS, block_n=_DECODE_N, num_warps=8, splits=splits)


def decode_shared(R: int) -> int:
    """Static and dynamic shared memory of one block."""
    return 16416 + 4 * DECODE_TOKENS * (R | 1)


def _shrink_candidates(problem: Problem, device: Device, _: str) -> list[Candidate]:
    R, dtype = problem.R, problem.dtype
    tiles = -(-problem.M // _SHRINK_M) * -(-R // rank_tile(R, dtype))
    steps = -(-problem.K * dtype.itemsize // _ROW_BYTES)
    return [_shrink(R, dtype, splits) for splits in _splits(tiles, steps, device)]


def _shrink(R: int, dtype: torch.dtype, splits: int) -> Candidate:
    tiles = shrink_tiles(R, dtype, splits)
    shared = shrink_shared(tiles, dtype.itemsize)
    return Candidate("shrink", tiles, shared, _REGISTERS[tiles.block_r])


def _reduce_candidates(problem: Problem, device: Device, _: str) -> list[Candidate]:
    R, dtype = problem.R, problem.dtype
    columns = -(-problem.K // _REDUCE_P) + -(-problem.N // _REDUCE_P)
    tiles = columns * -(-R // rank_tile(R, dtype))
    steps = -(-problem.M // _REDUCE_M)
    return [_reduce(R, dtype, splits) for splits in _splits(tiles, steps, device)]


def _reduce(R: int, dtype: torch.dtype, splits: int) -> Candidate:
    tiles = reduce_tiles(R, dtype, splits)
    shared = reduce_shared(tiles, dtype.itemsize)
    return Candidate("reduce", tiles, shared, _REGISTERS[tiles.block_r])


def _decode_candidates(problem: Problem, device: Device, direction: str) -> list[Candidate]:
    """Those whose blocks can share the ranks."""
    if _against_decode(problem, direction):
        return []
    outputs, inner = _sizes(problem, direction)
    steps = -(-inner * problem.dtype.itemsize // 64) // 8
    legal = _splits(-(-outputs // _DECODE_N), steps, device)
    return [
        Candidate("decode", decode_tiles(splits), decode_shared(problem.R), 111)
        for splits in legal
        if decode_parts(problem, splits, direction) > 0
    ]


def _against_decode(problem: Problem, direction: str) -> list[str]:
    """Few tokens, no dropout, and a weight that lies along the contraction."""
    reasons = []
    if problem.M > DECODE_TOKENS:
        reasons.append(f"it takes up to {DECODE_TOKENS} tokens, these are {problem.M}")
    along, name = {"forward": ("row", "in"), "dx": ("column", "out")}[direction]
    if problem.weight_layout != along:
        reasons.append(f"it needs a weight with unit stride along {name}_features")
    if problem.dropout or problem.given_mask:
        reasons.append("it makes no dropout mask")
    if problem.group:
        reasons.append("it takes single layers")
    return reasons


def _shipped() -> list[tuple[str, str, Tiles, int]]:
    made = []
    for target, splits in itertools.product(TARGETS, _SPLITS):
        for dtype, R in itertools.product(DTYPES, (16, 64, 128)):
            made.append(("shrink", "shrink", shrink_tiles(R, dtype, splits), target))
            made.append(("reduce", "reduce", reduce_tiles(R, dtype, splits), target))
        for direction in ("forward", "dx"):
            made.append((direction, "decode", decode_tiles(splits), target))
    return list(dict.fromkeys(made + cuda_sm90.SHIPPED + cuda_sm80.SHIPPED))


SHIPPED = _shipped()
"""Every (operation, strategy, tiles, target) that can be chosen: what the tests iterate over."""
