"""The cost model: monotone, equal to a tile-by-tile simulation, in line with published roofs."""

from __future__ import annotations

import heapq
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fused import cost, roofline, schedule
from lora_fused.config import Candidate, Problem, Tiles
from lora_fused.devices import DEVICES

DEVICE_NAMES = sorted(DEVICES)
SHAPES = st.tuples(*(st.integers(1, limit) for limit in (20_000, 12_000, 12_000, 512)))
TILES = Tiles(128, 256, 64, num_warps=8, num_stages=4, persistent=True)
SMALL = Tiles(64, 64, 32, num_warps=4, num_stages=3, splits=2)


def problem(
    M: int, N: int, K: int, R: int, device: str = "H100", dtype: torch.dtype = torch.bfloat16
) -> Problem:
    return Problem(M, K, N, R, dtype, "cuda", device=DEVICES[device])


def every_time(p: Problem) -> dict[str, float]:
    """The time of every operation by every strategy."""
    times = {f"library {op}": cost.library_us(p, op) for op in ("forward", "dx", "reduce")}
    for tiles in (TILES, SMALL, replace(TILES, shrink_group=3)):
        for strategy in ("split", "s_first", "one_pass", "decode"):
            candidate = Candidate(strategy, tiles, 98304, 168)
            for op in ("forward", "dx"):
                times[f"{strategy} {op} {tiles}"] = cost.operation_us(p, op, "triton", candidate)
        both = Candidate("s_first", replace(tiles, reduce_parts=4), 98304, 168)
        times[f"backward {tiles}"] = cost.operation_us(p, "backward", "cuda", both)
        for op in ("shrink", "reduce"):
            candidate = Candidate(op, replace(tiles, block_r=64), 49152, 64)
            times[f"{op} {tiles}"] = cost.operation_us(p, op, "triton", candidate)
    return times


# --- growth -------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    SHAPES,
    st.sampled_from(DEVICE_NAMES),
    st.integers(0, 3),
    st.integers(1, 700),
    st.booleans(),
    st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_no_time_falls_when_a_size_grows(
    shape: tuple[int, int, int, int],
    device: str,
    axis: int,
    more: int,
    dropout: bool,
    dtype: torch.dtype,
) -> None:
    larger = list(shape)
    larger[axis] += more
    small, large = (
        every_time(replace(problem(*sizes, device, dtype), dropout=dropout))
        for sizes in (shape, larger)
    )
    for name, time in small.items():
        assert 0 < time < math.inf
        assert time <= large[name] * (1 + 1e-12), f"{name}: {time} at {shape}, less at {larger}"


@pytest.mark.parametrize("device", DEVICE_NAMES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 0), (0, 4096, 4096, 16), (1 << 22, 65536, 8, 1)])
def test_every_device_prices_odd_problems(device: str, shape: tuple[int, int, int, int]) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert all(0 < t < math.inf for t in every_time(problem(*shape, device, dtype)).values())


def test_dropout_and_masks_cost() -> None:
    plain = problem(8192, 4096, 4096, 16)
    before, after = every_time(plain), every_time(replace(plain, dropout=True))
    assert all(after[name] >= time for name, time in before.items())
    assert after["library dx"] > before["library dx"]


# --- schedules ----------------------------------------------------------------------------------


def simulate(
    shrink_tiles: int, shrink_time: float, group: int, tiles: int, time: float, slots: int
) -> float:
    """Tile by tile: a free slot takes the next ticket; a tile ends when its S is there, too."""
    free = [0.0] * slots
    published: list[float] = []
    for first in range(0, shrink_tiles, group):
        start = heapq.heappop(free)
        part = min(group, shrink_tiles - first)
        published += [start + (i + 1) * shrink_time for i in range(part)]
        heapq.heappush(free, start + part * shrink_time)
    end = 0.0
    for tile in range(tiles):
        needed = published[tile * shrink_tiles // tiles] if published else 0.0
        done = max(heapq.heappop(free) + time, needed)
        end = max(end, done)
        heapq.heappush(free, done)
    return end


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 300),
    st.floats(0.5, 40),
    st.integers(1, 5),
    st.integers(1, 600),
    st.floats(1, 60),
    st.integers(1, 150),
)
def test_the_closed_form_is_the_simulation_or_a_little_more(
    shrink_tiles: int, shrink_time: float, group: int, tiles: int, time: float, slots: int
) -> None:
    arguments = (shrink_tiles, shrink_time, group, tiles, time, slots)
    exact, closed = simulate(*arguments), schedule.s_first_makespan(*arguments)
    ticket = group * shrink_time if shrink_tiles else 0.0
    assert exact <= closed * (1 + 1e-9)
    assert closed <= exact + 2 * ticket + time * (ticket > 0) + 1e-6


def test_the_closed_form_is_exact_for_full_tickets_that_nobody_waits_for() -> None:
    for slots, shrink_tiles, tiles in ((132, 64, 1024), (132, 16, 256), (7, 20, 31), (4, 4, 4)):
        for group in (1, 2, 4):
            arguments = (shrink_tiles, 1.0, group, tiles, 4.5, slots)
            assert schedule.s_first_makespan(*arguments) == pytest.approx(simulate(*arguments))


def test_s_tiles_ride_in_the_last_round_where_a_ticket_hands_out_several() -> None:
    alone = schedule.s_first_makespan(0, 14.9, 1, 256, 49.2, 132)
    assert alone == pytest.approx(2 * 49.2)
    assert schedule.s_first_makespan(16, 14.9, 1, 256, 49.2, 132) > 1.1 * alone
    assert schedule.s_first_makespan(16, 14.9, 3, 256, 49.2, 132) == pytest.approx(alone)


def simulate_mixed(
    s_first: tuple[int, float, int, int, float, int], small: int, one: float, at_once: float
) -> float:
    """Tile by tile, as csrc/cuda/sm90/scheduler.cuh lists them: tickets of S tiles, tiles with half
    of the `small` ones between them, the other half. `one`: the time of a small one; memory serves
    `at_once` of them at full speed, and more share that."""
    shrink_tiles, shrink, group, tiles, time, slots = s_first
    early = small // 2
    every = (early + tiles) // max(1, early)
    mixed = [place % every == every - 1 for place in range(early * every)]
    mixed += [False] * (early + tiles - len(mixed))
    work: list[float | None] = [
        shrink * min(group, shrink_tiles - first) for first in range(0, shrink_tiles, group)
    ]
    work += [None if is_small else time for is_small in mixed] + [None] * (small - sum(mixed))
    now, running, reading = 0.0, [], []  # ends of the large ones; what is left of the small ones
    while work or running or reading:
        while work and len(running) + len(reading) < slots:
            length = work.pop(0)
            if length is None:
                reading.append(one)
            else:
                heapq.heappush(running, now + length)
        speed = min(1.0, at_once / max(1, len(reading)))
        ends = [running[0] - now] if running else []
        step = min([*ends, *([min(reading) / speed] if reading else [])])
        now += step
        reading = [left - step * speed for left in reading if left - step * speed > 1e-9]
        while running and running[0] <= now + 1e-9:
            heapq.heappop(running)
    return now


@pytest.mark.parametrize("M", [2048, 4096, 8192, 16384])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (14336, 4096), (4096, 14336)])
def test_the_closed_form_with_reduce_tiles_is_near_the_simulation(M: int, N: int, K: int) -> None:
    """The forms of the Hopper kernel, in and out of the second-level cache: within 6 %."""
    for group, parts in ((1, 8), (2, 4), (3, 8)):
        closed, simulated = backward_both_ways(problem(M, N, K, 16), group, parts)
        assert closed == pytest.approx(simulated, rel=0.06)


def backward_both_ways(p: Problem, group: int, parts: int) -> tuple[float, float]:
    """The time of dx, da and db by one launch on an H100: closed, and simulated."""
    assert p.device is not None
    rates, work = roofline.rates_of(p.device, p.dtype), roofline.work_of(p, "dx")
    tiles = replace(TILES, descriptors=True, shrink_group=group, reduce_parts=parts)
    candidate = Candidate("s_first", tiles, 196608, 168)
    s_first = cost._s_first_list(rates, work, candidate)
    read = roofline.read_us(rates, work.x_bytes) + roofline.read_us(rates, work.y_bytes)
    bandwidth = (work.x_bytes + work.y_bytes) / read
    alone = schedule.s_first_makespan(*s_first)
    bandwidth *= 1 - cost._s_first_moved_us(rates, work) / alone  # the rest is read for dx
    small = parts * (schedule.waves(p.K, 128) + schedule.waves(p.N, 128))
    one = schedule.waves(p.M, 128 * parts) * 128 * (128 + p.R) * 2 / rates.sm_load
    sums = 8 * parts * (p.K + p.N) * p.R / rates.l2
    rounds = simulate_mixed(s_first, small, one, bandwidth / rates.sm_load)
    closed = cost.operation_us(p, "backward", "cuda", candidate)
    return closed, roofline.LAUNCH_US + rounds + sums


# --- what it says -------------------------------------------------------------------------------


def test_the_frozen_gemm_lies_on_the_roofs() -> None:
    rates = roofline.rates_of(DEVICES["H100"], torch.bfloat16)
    one = roofline.library_gemm_us(rates, roofline.work_of(problem(1, 4096, 4096, 0), "forward"))
    many = roofline.library_gemm_us(
        rates, roofline.work_of(problem(8192, 4096, 4096, 0), "forward")
    )
    assert one == pytest.approx(1.5 + 2 * 4096 * 4096 / 3.0e6, rel=0.05)
    assert many == pytest.approx(2 * 8192 * 4096 * 4096 / 720e6, rel=0.06)


def candidates(strategy: str, groups: tuple[int, ...] = (1,)) -> list[Candidate]:
    return [
        Candidate(strategy, replace(TILES, block_m=m, block_n=n, shrink_group=g), 196608, 168)
        for m, n in ((128, 256), (128, 128))
        for g in groups
    ]


def tax(p: Problem, strategy: str) -> float:
    """Per cent over the frozen GEMM, at the vendor's speed."""
    assert p.device is not None
    rates = roofline.rates_of(p.device, p.dtype)
    base = roofline.library_gemm_us(rates, roofline.work_of(p, "forward"))
    groups = (1, 2, 3, 4) if strategy == "s_first" else (1,)
    time = min(cost.operation_us(p, "forward", "cuda", c) for c in candidates(strategy, groups))
    if strategy == "split":
        time += min(
            cost.operation_us(
                p, "shrink", "cuda", Candidate("shrink", Tiles(64, 0, 128, splits=s, num_warps=4))
            )
            for s in (1, 2, 4, 8)
        )
    return (time / base - 1) * 100


@pytest.mark.parametrize(
    ("M", "N", "K", "R", "split", "s_first"),
    [
        (2048, 4096, 4096, 16, 6.9, 1.0),
        (8192, 4096, 4096, 16, 6.2, 0.7),
        (8192, 4096, 4096, 64, 7.4, 2.4),
        (8192, 4096, 4096, 128, 9.1, 4.8),
        (8192, 14336, 4096, 16, 2.1, 0.4),
        (8192, 4096, 14336, 64, 6.2, 1.2),
        (16384, 8192, 8192, 16, 3.1, 0.8),
    ],
)
def test_the_independent_model_of_the_design_study_says_the_same(
    M: int, N: int, K: int, R: int, split: float, s_first: float
) -> None:
    """Tax in per cent on an H100 by a model made before, with other assumptions: ± 3 points."""
    p = problem(M, N, K, R)
    assert tax(p, "split") == pytest.approx(split, abs=3)
    assert tax(p, "s_first") == pytest.approx(s_first, abs=3)
    assert tax(p, "s_first") < tax(p, "split") < tax(p, "one_pass")


def test_one_pass_beats_split_only_for_narrow_outputs_and_small_ranks() -> None:
    assert tax(problem(8192, 1024, 4096, 16), "one_pass") < tax(
        problem(8192, 1024, 4096, 16), "split"
    )
    for N, R in ((1024, 128), (4096, 16), (14336, 16)):
        p = problem(8192, N, 4096, R)
        assert tax(p, "one_pass") > tax(p, "split")


def test_few_tokens_cost_the_weight() -> None:
    p = problem(8, 4096, 4096, 16)
    decode = Candidate("decode", Tiles(16, 16, 64, num_warps=8))
    one = cost.operation_us(p, "forward", "cuda", decode)
    assert one < 1.15 * (1.5 + p.N * p.K * 2 / 3.0e6)
    assert cost.library_us(p, "forward") > 1.3 * one


def test_resident_blocks_respect_every_limit() -> None:
    device = DEVICES["RTX 4090"]
    tiles = Tiles(128, 128, 32, num_warps=8)
    assert roofline.resident_blocks(device, Candidate("split", tiles, 96 * 1024, 64)) == 1
    assert roofline.resident_blocks(device, Candidate("split", tiles, 32 * 1024, 128)) == 2
    assert roofline.resident_blocks(device, Candidate("split", tiles, 1024, 255)) == 1
    assert roofline.resident_blocks(device, Candidate("split", tiles, 10**9, 255)) == 1


def test_speed_of_knows_every_generation() -> None:
    assert cost.speed_of("cuda", 90) == 1.0
    assert cost.speed_of("triton", 89) == cost.speed_of("triton", 80)
    assert 0 < cost.speed_of("triton", 70) < 1 and 0 < cost.speed_of("other", 90) < 1
