"""The compiled kernels in the PTX emulator: numbers, every check, schedules, planned traffic.

By default one size of the main choices; `full` runs every shipped choice for sm_80, 90, 100 and
120 on all its ragged sizes under every schedule.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from lora_fused.backends import triton
from lora_fused.backends.triton import launch
from lora_fused.backends.triton.candidates import SHIPPED, Shipped
from lora_fused.config import Mask, Tiles
from lora_fused.testing import check_case, make_case
from tests.ptx_emulator import EVERY_SCHEDULE, Schedule
from tests.triton.emulate_shipped import Size, check_traffic, emulate, sizes
from tests.triton.emulated import emulated
from tests.triton.operations import check_group, group_case, group_route_of, route_of
from tests.triton.test_shipped import first

EMULATED = [c for c in SHIPPED if c.target in ("sm_80", "sm_90", "sm_100", "sm_120")]
MAIN = [
    first("sm_80", "forward", "split"),
    first("sm_90", "forward", "split"),
    first("sm_90", "dx", "one_pass"),
    first("sm_100", "dx", "split"),
    first("sm_120", "forward", "split", "d"),
    first("sm_80", "dx", "decode"),
    first("sm_90", "shrink", "shrink"),
    first("sm_80", "reduce", "reduce"),
]
TWO = (Schedule(), Schedule("reversed", "late"))


def has_mask(choice: Shipped) -> bool:
    """Whether the kernel makes a dropout mask, if it is asked to."""
    wide = choice.tiles.block_m * choice.tiles.block_n > 128 * 128
    skinny = choice.operation in ("shrink", "reduce")
    return skinny or (choice.operation == "dx" and choice.strategy == "split" and not wide)


def check(choice: Shipped, size: Size, dropout_p: float, schedules: tuple[Schedule, ...]) -> None:
    """The right numbers and no finding under each schedule, the same bits under all."""
    bits: dict[str, torch.Tensor] = {}
    for schedule in schedules:
        counters = schedule == Schedule()
        outputs, emulation, case = emulate(choice, size, dropout_p, schedule, counters)
        if counters:
            check_traffic(choice, case, outputs, emulation.launches[0])
        for name, output in outputs.items():
            assert torch.equal(bits.setdefault(name, output), output), f"{name} under {schedule}"


@pytest.mark.parametrize("choice", MAIN, ids=str)
def test_main(choice: Shipped) -> None:
    check(choice, sizes(choice)[0], 0.3 if has_mask(choice) else 0.0, TWO)


@pytest.mark.full
@pytest.mark.parametrize("choice", EMULATED, ids=str)
def test_all(choice: Shipped) -> None:
    for size in sizes(choice):
        check(choice, size, 0.0, EVERY_SCHEDULE)
    if has_mask(choice):
        check(choice, sizes(choice)[0], 0.3, EVERY_SCHEDULE)


@pytest.fixture
def layers_on_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are taken, as in the interpreter."""
    monkeypatch.setattr(launch, "interpreted", lambda: True)


@pytest.mark.usefixtures("layers_on_the_emulator")
def test_a_layer_forward_and_backward() -> None:
    """lora_linear with its autograd on compiled sm_90 code; dropout masks are the CPU's."""
    with emulated("sm_90") as emulation:
        check_case(make_case(40, 48, 64, 8, torch.bfloat16, bias=True, dropout_p=0.3), "triton")
    assert {done.request.kernel for done in emulation.launches} >= {"shrink", "matmul", "reduce"}


@pytest.mark.full
@pytest.mark.usefixtures("layers_on_the_emulator")
@pytest.mark.parametrize("target", ["sm_100", "sm_120"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_layers_on_other_targets(target: str, dropout_p: float) -> None:
    with emulated(target):
        check_case(make_case(70, 72, 80, 12, torch.bfloat16, dropout_p=dropout_p), "triton")


GROUP = Tiles(64, 64, 32, num_warps=4, num_stages=3)


@pytest.mark.parametrize("dropout", ["none", "own masks"])
def test_group(dropout: str) -> None:
    cases = group_case(40, 64, [(64, 8), (48, 16)], torch.bfloat16, dropout)
    with emulated("sm_80") as emulation:
        check_group(cases, group_route_of(cases, "split", forward=GROUP, dx=GROUP))
    names = [done.request.kernel for done in emulation.launches]
    assert names == ["shrink", "matmul", "shrink", "matmul", "reduce", "sum"]


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["split", "one_pass"])
@pytest.mark.parametrize("target", ["sm_90", "sm_100", "sm_120"])
def test_group_of_three_with_descriptors(target: str, strategy: str) -> None:
    cases = group_case(70, 72, [(64, 16), (48, 16), (136, 8)], torch.bfloat16, "none")
    tiles = replace(GROUP, descriptors=True, block_r=16)
    with emulated(target):
        check_group(cases, group_route_of(cases, strategy, forward=tiles, dx=tiles))


def test_scaling_and_tokens_do_not_compile_again() -> None:
    """M, scaling and the threshold are run-time values."""
    tiles = Tiles(64, 64, 32, num_warps=4, num_stages=3)
    with emulated("sm_80", execute=False) as emulation:
        for M, scaling, threshold in ((40, 2.0, 7), (41, 0.3, 9), (1024, 7.0, 11)):
            case = make_case(M, 64, 64, 16, torch.bfloat16)
            route = route_of(case, forward=tiles)
            s = triton.shrink(route, case.x, case.lora_A, scaling, Mask(5, threshold))
            triton.matmul(route, "forward", case.x, case.weight, s, case.lora_B)
    assert len({done.request for done in emulation.launches}) == 2
