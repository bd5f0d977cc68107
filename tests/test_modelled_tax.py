"""The modelled tax at 8192 x 4096 x 4096, rank 16: shipped tiles, lists simulated tile by tile.

Modelled, not measured. At the vendor's GEMM speed only the schedule, the rank's steps and the bytes
are left; cost.SPEED guesses how far a kernel is from it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_fused import cost
from lora_fused.backends.cuda_candidates import candidates
from lora_fused.config import Problem
from lora_fused.devices import DEVICES
from lora_fused.roofline import library_gemm_us, rates_of, work_of

from .test_cost import backward_both_ways, simulate

GPUS = ("H100", "A100", "RTX 4090")
NEEDS = frozenset({"x", "lora_A", "lora_B"})


@pytest.fixture(autouse=True)
def tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "s_first_makespan", simulate)


@pytest.fixture
def vendors_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability in (80, 90):
        monkeypatch.setitem(cost.SPEED, ("cuda", capability), 1.0)


def problem(name: str) -> Problem:
    dtype = torch.bfloat16
    return Problem(8192, 4096, 4096, 16, dtype, "cuda", dtype, needs=NEEDS, device=DEVICES[name])


def frozen_us(p: Problem, direction: str) -> float:
    assert p.device is not None
    work = replace(work_of(p, direction), R=0)
    return library_gemm_us(rates_of(p.device, p.dtype), work)


def our_us(name: str, operation: str, groups: tuple[int, ...] = (1, 2, 3, 4)) -> float:
    """The best shipped kernel: S-first, or the reduction."""
    p = problem(name)
    assert p.device is not None
    legal = [c for c in candidates(p, p.device, operation) if c.strategy in ("s_first", "reduce")]
    legal = [c for c in legal if c.tiles.shrink_group in groups]
    return min(cost.operation_us(p, operation, "cuda", c) for c in legal)


def forward(name: str) -> float:
    return our_us(name, "forward") / frozen_us(problem(name), "forward")


def backward(name: str) -> float:
    return (our_us(name, "dx") + our_us(name, "reduce")) / frozen_us(problem(name), "dx")


@pytest.mark.parametrize(("name", "most"), [("H100", 1.02), ("A100", 1.04), ("RTX 4090", 1.04)])
def test_forward_at_the_vendors_speed(vendors_speed: None, name: str, most: float) -> None:
    assert 1 < forward(name) <= most


@pytest.mark.parametrize(("name", "most"), [("H100", 1.02), ("A100", 1.05), ("RTX 4090", 1.05)])
def test_forward_at_the_speed_that_is_guessed(name: str, most: float) -> None:
    assert 1 < forward(name) <= most


def test_tickets_of_one_s_tile_would_miss_it_on_hopper() -> None:
    assert our_us("H100", "forward", (1,)) > 1.02 * frozen_us(problem("H100"), "forward")


@pytest.mark.parametrize("name", ["A100", "RTX 4090"])
def test_backward_at_the_vendors_speed(vendors_speed: None, name: str) -> None:
    assert 1 < backward(name) <= 1.10


def test_gradients_by_a_launch_of_their_own_would_miss_it_on_hopper() -> None:
    """dA and dB read x and dy once more: 11 % by itself on an H100, where nothing else is done."""
    p = problem("H100")
    assert p.device is not None
    read = p.M * (p.K + p.N) * 2 / rates_of(p.device, p.dtype).dram / frozen_us(p, "dx")
    assert 0.10 < read < 0.12
    assert 1 + read < backward("H100") <= 1.015 + read


def test_backward_on_hopper_by_one_launch() -> None:
    """Between the tiles of dx the same reading hides behind the tensor cores, and at the end a part
    of it fills the last round: list simulated tile by tile."""
    p = problem("H100")
    assert p.device is not None
    assert 1 < our_us("H100", "backward") / frozen_us(p, "dx") <= 1.10
    legal = candidates(p, p.device, "backward")
    best = min(legal, key=lambda c: cost.operation_us(p, "backward", "cuda", c)).tiles
    _, simulated = backward_both_ways(p, best.shrink_group, best.reduce_parts)
    assert 1 < simulated / frozen_us(p, "dx") <= 1.10


@pytest.mark.parametrize("name", GPUS)
def test_forward_and_backward_together(name: str) -> None:
    p = problem(name)
    ours = sum(our_us(name, operation) for operation in ("forward", "dx", "reduce"))
    assert ours <= 1.10 * (frozen_us(p, "forward") + frozen_us(p, "dx"))
