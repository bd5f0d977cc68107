"""How long each operation of a LoRA layer takes on a GPU by every strategy: modelled, not measured.

    operation_us(problem, operation, backend, candidate)    one launch of a backend
    library_us(problem, operation)                          the same by torch's operations

Every time grows with each of M, N, K and R. The forms follow lora_fused/roofline.py; what makes the
strategies differ:

    split      shrink reads x once more; then one GEMM with R more steps
    s_first    the S tiles are tiles of the GEMM's own list, and ride in its last round
    one_pass   every tile computes its rows of s, R more columns in every step
    decode     W streams once, by all multiprocessors; nothing else counts
    library    x once more for s, y written by s Bᵀ and read back by the GEMM (beta = 1)
"""

from __future__ import annotations

import functools
from dataclasses import replace

from lora_fused.config import Candidate, Problem
from lora_fused.roofline import (
    BODY_US,
    LAUNCH_US,
    Rates,
    Work,
    elementwise_us,
    gemm_us,
    library_gemm_us,
    mask_us,
    rates_of,
    read_us,
    resident_blocks,
    tile_counts,
    tile_us,
    work_of,
)
from lora_fused.schedule import filled_makespan, s_first_makespan, waves

_FLAG_US = 0.3
_HOPPER_S_TILE, _S_TILE = 64, 128  # ranks of an S tile
_REDUCE_N, _REDUCE_M = 128, 128  # columns and tokens of a step of a reduce tile
_LATE = 1 / 2  # of the reduce tiles of a dx launch: those that come after the tiles of dx
_REGENERATED_MASK_BYTES = 140  # moved per element by torch's operations that make a mask again
_DRAWN_MASK_BYTES = 6  # moved per element: a mask of bytes drawn or read, x read, x written

SPEED = {
    ("goal", 0): 1.0,
    ("cuda", 90): 1.0,
    ("cuda", 80): 0.97,
    ("triton", 90): 0.88,
    ("triton", 80): 0.93,
    ("triton", 100): 0.85,
    ("triton", 120): 0.93,
    ("triton", 942): 0.85,
}
"""Of a GEMM by a backend relative to the vendor's, for the newest entry not above the capability:
medians of published numbers (fast.cu and its re-implementations on Hopper; hand-written mma.sync on
L20 and RTX PRO 6000; Triton 2022 to 2025 on A100, H100, B200). First guesses: tuning replaces
them."""


def speed_of(backend: str, capability: int) -> float:
    """The relative speed of a backend's GEMM."""
    known = [at for name, at in SPEED if name == backend and at <= capability]
    return SPEED[backend, max(known)] if known else 0.8


def operation_us(problem: Problem, operation: str, backend: str, candidate: Candidate) -> float:
    """One launch: "forward" or "dx" (with s or ds where the strategy makes it), "shrink", "reduce",
    "backward" (dx with da and db).

    "shrink" is that of x; for the one of dy see `shrink_us`. problem.device must be set.
    """
    assert problem.device is not None
    rates = rates_of(problem.device, problem.dtype, problem.tf32)
    if operation == "reduce":
        return reduce_us(rates, problem, candidate)
    if operation == "shrink":
        return shrink_us(rates, work_of(problem, "forward"), candidate)
    if operation == "dx" and len(problem.group) > 1 and _adds_up(backend, candidate):
        members = (replace(problem, N=N, R=R, group=()) for N, R in problem.group)
        alone = sum(operation_us(member, "dx", backend, candidate) for member in members)
        read_again = (len(problem.group) - 1) * work_of(problem, "dx").y_bytes
        return alone + read_again / rates.dram
    work = work_of(problem, operation)
    models = {"split": _split_us, "s_first": _s_first_us, "one_pass": _one_pass_us}
    if candidate.strategy == "decode":
        return _decode_us(rates, work, candidate)
    slower = 1 / speed_of(backend, problem.device.capability)
    if operation == "backward":
        return LAUNCH_US + _backward_us(rates, work, candidate, slower)
    time = models[candidate.strategy](rates, work, candidate) - LAUNCH_US
    return LAUNCH_US + slower * time


def _adds_up(backend: str, candidate: Candidate) -> bool:
    """The mma.sync kernel makes the dx of a group by a launch for each member, which adds to dx."""
    fused = candidate.strategy in ("s_first", "split")
    return backend == "cuda" and fused and not candidate.tiles.descriptors


def library_us(problem: Problem, operation: str) -> float:
    """The operation by torch: "forward" and "dx" with their shrink, "reduce" or "backward"."""
    assert problem.device is not None
    if operation == "backward":
        return library_us(problem, "dx") + library_us(problem, "reduce")
    rates = rates_of(problem.device, problem.dtype, problem.tf32)
    if operation == "reduce":
        return _library_reduce_us(rates, problem)
    work = work_of(problem, operation)
    parts = _members(work)
    if work.R == 0:
        return sum(library_gemm_us(rates, part) for part in parts)
    mask = 0.0
    if work.masked:
        masked = work.x_bytes if work.forward else work.y_bytes
        mask = elementwise_us(rates, _DRAWN_MASK_BYTES * masked / rates.itemsize)
    time = mask + library_shrink_us(rates, work)
    for part in parts:
        time += elementwise_us(rates, part.y_bytes + part.s_bytes)
        time += library_gemm_us(rates, part, float(part.y_bytes))
    return time


def library_shrink_us(rates: Rates, work: Work) -> float:
    """s = x Aᵀ by the vendor's GEMM, which splits the contraction."""
    moved = read_us(rates, work.x_bytes) + (work.s_bytes + work.adapter_bytes) / rates.dram
    return LAUNCH_US + max(BODY_US, moved, 2 * work.M * work.K * work.R / _flops(rates))


def masked_expand_us(problem: Problem, by_kernel: bool) -> float:
    """What dropout adds to a dx by the library when its mask is regenerated, not drawn.

    by_kernel: in a launch that adds the masked rank-R term to dx; else by torch's operations.
    """
    assert problem.device is not None
    rates = rates_of(problem.device, problem.dtype, problem.tf32)
    work = work_of(problem, "dx")
    if by_kernel:
        return elementwise_us(rates, 2 * work.y_bytes)
    return elementwise_us(rates, _REGENERATED_MASK_BYTES * work.M * work.N)


def shrink_us(rates: Rates, work: Work, candidate: Candidate) -> float:
    """s [M, R] = x Aᵀ in one launch, the mask regenerated where the direction has one."""
    tiles = candidate.tiles
    splits = max(1, tiles.splits)
    blocks = waves(work.M, max(1, tiles.block_m)) * splits
    passes = waves(work.R, tiles.block_r) if tiles.block_r else 1
    elements = passes * tiles.block_m * waves(work.K, splits)
    rounds = _rounds(rates, candidate, blocks, elements, work.masked and work.forward)
    moved = read_us(rates, work.x_bytes) + (work.s_bytes + work.adapter_bytes) / rates.dram
    if splits > 1:
        moved += 2 * splits * work.M * work.R * 4 / rates.l2
    math = 2 * work.M * work.K * max(16, work.R) / _flops(rates)
    return LAUNCH_US + max(rounds, moved, math, BODY_US)


def reduce_us(rates: Rates, problem: Problem, candidate: Candidate) -> float:
    """da and db in one launch: x and dy are read once each, partial sums added at the end."""
    forward, tiles = work_of(problem, "forward"), candidate.tiles
    wide = problem.K + problem.N
    splits = max(1, tiles.splits)
    moved = read_us(rates, forward.x_bytes) + read_us(rates, forward.y_bytes)
    moved += 2 * forward.s_bytes / rates.l2 + wide * problem.R * rates.itemsize / rates.dram
    moved += 2 * (splits if splits > 1 else 0) * wide * problem.R * 4 / rates.l2
    block = tiles.block_n or 128
    blocks = (waves(problem.K, block) + waves(problem.N, block)) * splits
    passes = waves(problem.R, tiles.block_r) if tiles.block_r else 1
    elements = passes * block * waves(problem.M, splits)
    rounds = _rounds(rates, candidate, blocks, elements, problem.dropout)
    math = 2 * problem.M * wide * max(16, problem.R) / _flops(rates)
    return LAUNCH_US + max(rounds, moved, math, BODY_US)


def _rounds(
    rates: Rates, candidate: Candidate, blocks: int, elements: int, masked: bool = False
) -> float:
    """Blocks that each load so many elements, and regenerate the mask of them."""
    sms = rates.device.sms
    sharing = min(resident_blocks(rates.device, candidate), max(1, waves(blocks, sms)))
    load = elements * rates.itemsize / rates.sm_load
    if masked:
        load = max(load, mask_us(rates, elements))
    return waves(blocks, sms * sharing) * load * sharing


def _split_us(rates: Rates, work: Work, candidate: Candidate) -> float:
    return gemm_us(rates, work, candidate, 0, work.s_bytes + work.adapter_bytes)


def _one_pass_us(rates: Rates, work: Work, candidate: Candidate) -> float:
    columns = 16 * waves(work.R, 16)
    time = gemm_us(rates, work, candidate, columns, work.s_bytes + work.adapter_bytes)
    if work.masked and work.forward:
        tiles, rows = candidate.tiles, waves(work.M, candidate.tiles.block_m)
        count = rows * sum(waves(width, tiles.block_n) for width in work.outputs)
        time += waves(count, rates.device.sms) * mask_us(rates, tiles.block_m * work.K)
    return time


def _s_first_us(rates: Rates, work: Work, candidate: Candidate) -> float:
    """The S tiles first in the list of one persistent launch; x is in the cache after them."""
    rounds = s_first_makespan(*_s_first_list(rates, work, candidate))
    return LAUNCH_US + max(rounds + _FLAG_US, _s_first_moved_us(rates, work), BODY_US)


def _s_first_moved_us(rates: Rates, work: Work) -> float:
    moved = work.x_bytes + work.weight_bytes + work.y_bytes + work.adapter_bytes
    return moved / rates.dram + 2 * work.s_bytes / rates.l2


def _s_first_list(
    rates: Rates, work: Work, candidate: Candidate
) -> tuple[int, float, int, int, float, int]:
    """S tiles, the time of one, how many a ticket hands out; tiles, the time of one; slots."""
    tiles = candidate.tiles
    count, slots, sharing = tile_counts(rates, work, candidate)
    ranks = _HOPPER_S_TILE if tiles.descriptors else _S_TILE
    rows = tiles.block_m + min(work.R, ranks)
    shrink = rows * work.K * rates.itemsize / rates.sm_load
    if work.masked and work.forward:
        shrink = max(shrink, mask_us(rates, tiles.block_m * work.K))
    shrink_tiles = waves(work.M, tiles.block_m) * waves(work.R, ranks)
    time = tile_us(rates, work, tiles) * sharing
    return shrink_tiles, shrink * sharing, tiles.shrink_group, count, time, slots


def _backward_us(rates: Rates, work: Work, candidate: Candidate, slower: float) -> float:
    """dx, and its reduce tiles: those between the tiles of dx take a multiprocessor's time only,
    the late ones wait for memory as well."""
    shrink_tiles, shrink, group, count, time, slots = _s_first_list(rates, work, candidate)
    parts, sharing = max(1, candidate.tiles.reduce_parts), slots / rates.device.sms
    step = _REDUCE_M * (_REDUCE_N + work.R) * rates.itemsize / rates.sm_load
    math = 2 * _REDUCE_M * _REDUCE_N * max(64, work.R) / rates.sm_flops / rates.device.sustained
    one = waves(waves(work.M, _REDUCE_M), parts) * max(step, math) * sharing
    reduce = (waves(work.K, _REDUCE_N) + waves(work.N, _REDUCE_N)) * parts * one
    sums = 2 * parts * (work.K + work.N) * work.R * 4 / rates.l2
    read = read_us(rates, work.x_bytes) + read_us(rates, work.y_bytes)
    rounds = filled_makespan(
        s_first_makespan(shrink_tiles, shrink, group, count, slower * time, slots),
        shrink_tiles * shrink + count * slower * time + (1 - _LATE) * reduce,
        slots,
        _LATE * max(read, reduce / slots) + one,
    )
    return max(rounds + sums + _FLAG_US, _s_first_moved_us(rates, work) + read, BODY_US)


def _decode_us(rates: Rates, work: Work, candidate: Candidate) -> float:
    """Memory alone: the weight by all multiprocessors, x and the adapters beside it."""
    width, splits = max(1, candidate.tiles.block_n), max(1, candidate.tiles.splits)
    blocks = sum(waves(output, width) for output in work.outputs) * splits
    rounds = _rounds(rates, candidate, blocks, width * waves(work.K, splits))
    moved = (work.weight_bytes + work.adapter_bytes + work.x_bytes + work.y_bytes) / rates.dram
    return LAUNCH_US + max(BODY_US, max(moved, rounds) + _FLAG_US)


def _library_reduce_us(rates: Rates, problem: Problem) -> float:
    forward, total = work_of(problem, "forward"), 0.0
    if problem.dropout:
        masked = forward.x_bytes / rates.itemsize
        total += elementwise_us(rates, _DRAWN_MASK_BYTES * masked)
    outputs = (*forward.outputs, problem.K)
    for width in outputs:
        moved = read_us(rates, problem.M * width * rates.itemsize)
        moved += (forward.s_bytes + width * problem.R * rates.itemsize) / rates.dram
        math = 2 * problem.M * width * max(16, problem.R) / _flops(rates)
        total += LAUNCH_US + max(BODY_US, moved, math)
    return total


@functools.lru_cache(maxsize=4096)
def _members(work: Work) -> tuple[Work, ...]:
    """The GEMMs of a group, one after the other; the work itself where it is no group."""
    if work.forward:
        return tuple(replace(work, N=width, outputs=(width,)) for width in work.outputs)
    return tuple(replace(work, K=width, inputs=(width,)) for width in work.inputs)


def _flops(rates: Rates) -> float:
    """Of the whole device at small tiles, per microsecond."""
    return rates.sm_flops * rates.device.sms * rates.device.sustained / 2
