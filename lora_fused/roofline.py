"""What a GPU does per microsecond, and how long one GEMM launch takes: rounds of tiles or bytes.

A launch takes its start, plus the longest of: the rounds of its tiles, its bytes, its shortest
possible body. A step of a tile is bound by the tensor cores or by the shared memory that feeds
them. Activations that fit in the second-level cache are read from there.

Times are in microseconds, of a GPU whose queue never runs empty. They are modelled, not measured.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from lora_fused.config import Candidate, Problem, Tiles
from lora_fused.devices import Device
from lora_fused.schedule import waves

LAUNCH_US = 1.5
BODY_US = 1.0
_TILE_US = 0.6  # start of the pipeline and end of a tile, where nothing overlaps them
_WARM_PART = 0.75  # of the second-level cache, that an activation may fill and still be found there
_DRAM_PART = 0.9  # of the data-sheet bandwidth
_L2_BYTES_PER_CLOCK = 24  # per multiprocessor, all of them reading
_LOAD_BYTES_PER_CLOCK = 40  # into one multiprocessor, others idle
_SHARED_BYTES_PER_CLOCK = 128
_LANES = 128
_PHILOX_INSTRUCTIONS = 70 / 8  # per element
_FEW_TOKENS = 16
_LIBRARY_TILES = tuple(
    Tiles(m, n, 64, num_warps=8 if m * n > 8192 else 4, splits=splits, persistent=True)
    for m, n in ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64), (16, 64))
    for splits in (1, 2, 4, 8)
)


@dataclass(frozen=True, slots=True)
class Work:
    """One direction of a Problem as a GEMM: y [M, N] = x [M, K] w + s [M, R] l.

    forward: x, N out_features, K in_features; dx: dy, N in_features, K out_features. outputs are
    the widths of the outputs of a group, inputs those of its inputs.
    """

    dtype: torch.dtype
    M: int
    N: int
    K: int
    R: int
    masked: bool
    forward: bool
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]

    @property
    def x_bytes(self) -> int:
        return self.M * self.K * self.dtype.itemsize

    @property
    def y_bytes(self) -> int:
        return self.M * self.N * self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        return self.N * self.K * self.dtype.itemsize

    @property
    def s_bytes(self) -> int:
        return self.M * self.R * self.dtype.itemsize

    @property
    def adapter_bytes(self) -> int:
        return self.R * (self.K + self.N) * self.dtype.itemsize


def work_of(problem: Problem, direction: str) -> Work:
    """The GEMM that a direction ("forward" or "dx") of the problem is."""
    forward = direction == "forward"
    N, K = (problem.N, problem.K) if forward else (problem.K, problem.N)
    widths = tuple(n for n, _ in problem.group) or (problem.N,)
    return Work(
        dtype=problem.dtype,
        M=problem.M,
        N=N,
        K=K,
        R=problem.R,
        masked=problem.dropout,
        forward=forward,
        outputs=widths if forward else (N,),
        inputs=(K,) if forward else widths,
    )


@dataclass(frozen=True, slots=True)
class Rates:
    """What one device does per microsecond, for one dtype; the sm_ rates of one multiprocessor."""

    device: Device
    itemsize: int
    sm_flops: float
    sm_shared: float
    sm_load: float
    sm_lanes: float
    dram: float
    l2: float


@functools.lru_cache(maxsize=256)
def rates_of(device: Device, dtype: torch.dtype, tf32: bool = False) -> Rates:
    """The rates of a device; tf32: float32 GEMMs may round their inputs to TF32."""
    clock = device.clock / 1e6
    dram = _DRAM_PART * device.bandwidth / 1e6
    return Rates(
        device=device,
        itemsize=dtype.itemsize,
        sm_flops=device.flops(dtype, tf32) / device.sms / 1e6,
        sm_shared=_SHARED_BYTES_PER_CLOCK * clock,
        sm_load=_LOAD_BYTES_PER_CLOCK * clock,
        sm_lanes=_LANES * clock,
        dram=dram,
        l2=max(_L2_BYTES_PER_CLOCK * clock * device.sms, dram),
    )


def read_us(rates: Rates, nbytes: float) -> float:
    """Reading an activation that the operation before wrote or read."""
    warm = nbytes <= _WARM_PART * rates.device.l2_bytes
    return nbytes / (rates.l2 if warm else rates.dram)


def mask_us(rates: Rates, elements: float) -> float:
    """Regenerating the dropout mask of so many elements on one multiprocessor."""
    return elements * _PHILOX_INSTRUCTIONS / rates.sm_lanes


def elementwise_us(rates: Rates, nbytes: float) -> float:
    """A launch that does nothing but move bytes through memory."""
    return LAUNCH_US + max(BODY_US, nbytes / rates.dram)


def resident_blocks(device: Device, candidate: Candidate) -> int:
    """How many blocks of the candidate one multiprocessor holds at a time; at least 1."""
    threads = max(1, candidate.tiles.num_warps) * device.warp_size
    by_shared = device.shared_bytes_per_sm // (candidate.shared_bytes + 1024)
    by_registers = device.registers_per_sm // (threads * max(candidate.registers, 32))
    return max(1, min(by_shared, by_registers, 2048 // threads, 8))


def tile_counts(rates: Rates, work: Work, candidate: Candidate) -> tuple[int, int, int]:
    """Tiles of the output, slots for them, and how many of them share a multiprocessor."""
    tiles, sms = candidate.tiles, rates.device.sms
    columns = sum(waves(width, tiles.block_n) for width in work.outputs)
    count = waves(work.M, tiles.block_m) * columns * tiles.splits
    sharing = min(resident_blocks(rates.device, candidate), max(1, waves(count, sms)))
    return count, sms * sharing, sharing


def tile_us(rates: Rates, work: Work, tiles: Tiles, columns: int = 0) -> float:
    """One [block_m, block_n] tile alone on a multiprocessor, `columns` wider in the main loop."""
    steps = waves(waves(work.K, tiles.block_k), tiles.splits)
    time = steps * step_us(rates, tiles, tiles.block_n, columns)
    return time + tail_us(rates, work, tiles) + (_TILE_US / 2 if tiles.persistent else _TILE_US)


def step_us(rates: Rates, tiles: Tiles, n: int, columns: int = 0) -> float:
    """block_k steps of the contraction of a [block_m, n] tile and one of [block_m, columns].

    Both read the same x tile, each with instructions of its own.
    """
    m, k, device = tiles.block_m, tiles.block_k, rates.device
    mma = 2 * m * (n + columns) * k / rates.sm_flops
    rows = m + n + columns + _fragment_rows(device, tiles, n)
    if columns:
        rows += _fragment_rows(device, tiles, columns)
    return max(mma, rows * k * rates.itemsize / rates.sm_shared) / device.sustained


def _fragment_rows(device: Device, tiles: Tiles, columns: int) -> int:
    """Rows of the operands that the tensor cores read from shared memory per step."""
    m, rows = tiles.block_m, max(1, tiles.block_m // 64)
    if device.kind == "cuda" and 100 <= device.capability < 120:
        return m + columns
    if device.kind == "cuda" and 90 <= device.capability < 100:
        return m + rows * columns
    return m * max(1, tiles.num_warps // rows) + columns * rows


def tail_us(rates: Rates, work: Work, tiles: Tiles) -> float:
    """The rank-R term of one tile, with the mask on it where the direction has one."""
    if work.R == 0:
        return 0.0
    time = waves(work.R, 16) * step_us(rates, replace(tiles, block_k=16), tiles.block_n)
    if work.masked and not work.forward:
        time += mask_us(rates, tiles.block_m * tiles.block_n)
    return time


def gemm_us(
    rates: Rates, work: Work, candidate: Candidate, columns: int = 0, extra_bytes: float = 0.0
) -> float:
    """One launch of y = x w, its contraction longer by R; extra_bytes beyond x, w and y."""
    count, slots, sharing = tile_counts(rates, work, candidate)
    time = tile_us(rates, work, candidate.tiles, columns) * sharing
    moved = (work.x_bytes + work.weight_bytes + work.y_bytes + extra_bytes) / rates.dram
    if candidate.tiles.splits > 1:
        moved += 2 * candidate.tiles.splits * work.M * work.N * 4 / rates.l2
    return LAUNCH_US + max(waves(count, slots) * time, moved, BODY_US)


@functools.lru_cache(maxsize=4096)
def library_gemm_us(rates: Rates, work: Work, extra_bytes: float = 0.0) -> float:
    """The vendor's GEMM y = x w with its best tile; extra_bytes for what beta = 1 reads.

    Up to _FEW_TOKENS rows it streams the weight at the speed of memory.
    """
    plain = replace(work, R=0, masked=False)
    best = min(
        gemm_us(rates, plain, Candidate("library", tiles, 64 * 1024, 128), 0, extra_bytes)
        + (LAUNCH_US if tiles.splits > 1 else 0.0)
        for tiles in _LIBRARY_TILES
    )
    if work.M > _FEW_TOKENS:
        return best
    moved = work.x_bytes + work.weight_bytes + work.y_bytes + extra_bytes
    return min(best, LAUNCH_US + max(BODY_US, moved / rates.dram))
