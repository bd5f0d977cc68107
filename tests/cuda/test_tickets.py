"""Tickets that hand out several S tiles: each tile is computed once, whoever takes which ticket."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lora_fused.testing import make_case
from tests.ptx_emulator import EVERY_SCHEDULE, Schedule

from . import sm80
from .faults import changed_source
from .sm80 import problem_of, variant
from .sm90 import Case

LATE = Schedule("reversed", "late", slow_block=0)
MIXED = Schedule("random", "random", seed=3)
SM80 = variant("bf16_32x64x64_k_major")
SM90_SOURCE = """
#include "matmul.cuh"
extern "C" __global__ void __launch_bounds__(384, 1) lora_matmul_sm90_bf16_forward_n128(
    const __grid_constant__ lora_fused::sm90::MatmulArgs args) {
  using namespace lora_fused;
  sm90::matmul<sm90::Tiling<bf16, 128, sm90::Direction::forward>>(args);
}
"""


def hopper(group: int, clusters: int = 3, resident: int = 64, **changes) -> Case:
    """Five rows of tiles: five S tiles, or ten of 100 ranks; one tile of y to each row."""
    size = {"M": 520, "sizes": ((72, 72, 16),), "block_n": 128, "cluster": 1} | changes
    return Case(clusters=clusters, resident=resident, group=group, **size)


def ampere(group: int, rank: int = 16) -> tuple:
    """The same for sm_80: tiles of 32 rows, S tiles of 64 ranks."""
    case = make_case(136, 72, 104, rank, torch.bfloat16)
    return case, problem_of(case, "forward", shrink_group=group)


# ---- right numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [2, 3])
def test_hopper(group: int) -> None:
    """Three S tiles and two; two, two and one. The ticket counter wraps exactly to zero."""
    hopper(group).run(LATE).check()


@pytest.mark.parametrize(("group", "rank"), [(2, 16), (3, 200)])
def test_ampere(group: int, rank: int) -> None:
    case, problem = ampere(group, rank)
    report, s = sm80.run(problem, SM80, grid=5, schedule=LATE)
    report.check()
    sm80.hold(case, "forward", problem, s)


def test_ampere_takes_as_many_tickets_as_there_should_be() -> None:
    """The counter, if the last block leaves it as it is: tickets, and one more for each block."""
    _, problem = ampere(3, 200)
    text = sm80.kernel_text(SM80, "sm_80").replace("st.relaxed.gpu.global.u32", "// ")
    report, _ = sm80.run(problem, SM80, grid=4, text=text)
    report.check()
    assert problem.workspace is not None
    shrink, main = 5 * 4, 5 * 2
    assert problem.workspace[0] == -(-shrink // 3) + main + 4


RESIDENT = [(1, 1), (2, 1), (3, 3), (7, 2), (20, 64)]  # blocks in the grid, and at a time
GROUPS = [2, 3, 4, 16]


@pytest.mark.full
@pytest.mark.parametrize("schedule", [*EVERY_SCHEDULE, MIXED], ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_hopper_under_every_schedule(group: int, schedule: Schedule) -> None:
    for clusters, resident in RESIDENT:
        hopper(group, clusters, resident).run(schedule).check()
        hopper(group, clusters, 2 * resident, cluster=2, M=300).run(schedule).check()


@pytest.mark.full
@pytest.mark.parametrize(
    "changes",
    [
        {"direction": "dx"},
        {"direction": "dx", "p": 0.3},
        {"p": 0.3, "sizes": ((72, 72, 100),)},
        {"blocks": 2, "sizes": ((72, 72, 140),), "M": 300},
        {"sizes": ((136, 72, 8), (40, 72, 20)), "separate": True, "p": 0.2},
        {"sizes": ((72, 72, 8), (72, 136, 16)), "direction": "dx"},
        {"block_n": 256},
    ],
    ids=str,
)
def test_hopper_of_every_kind(changes: dict) -> None:
    for group, schedule in product(GROUPS, (LATE, MIXED)):
        hopper(group, **changes).run(schedule, launches=2).check()


@pytest.mark.full
@pytest.mark.parametrize("schedule", [*EVERY_SCHEDULE, MIXED], ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_ampere_under_every_schedule(group: int, schedule: Schedule) -> None:
    for (grid, resident), rank in product(RESIDENT, (16, 200)):
        case, problem = ampere(group, rank)
        report, s = sm80.run(problem, SM80, grid=grid, resident=resident, schedule=schedule)
        report.check()
        sm80.hold(case, "forward", problem, s)


# ---- faults --------------------------------------------------------------------------------------


class Mutant(NamedTuple):
    """`old` becomes `new`; one of `kinds` is found, or without kinds the result is wrong."""

    name: str
    old: str
    new: str
    kinds: str


HOPPER = [
    Mutant("beyond-the-s-tiles", "min(place + group, shrink)", "place + group", "global-race"),
    Mutant("short-list", "(shrink + group - 1) / group", "shrink / group", "deadlock|trap"),
    Mutant("one-s-tile", "place = ticket * group", "place = ticket", "deadlock|trap"),
    Mutant("s-tiles-again", "ticket - shrink_tickets + shrink", "ticket", "global-race"),
    Mutant("counter-left", "tickets + clusters - 1)", "tickets + clusters)", ""),
]
AMPERE = [
    Mutant(
        "beyond-the-s-tiles", "min(work.place + group, shrink_tiles)", "work.place + group",
        "global-race",
    ),
    Mutant("short-list", "blocks_of(shrink_tiles, group)", "shrink_tiles / group", "deadlock|trap"),
    Mutant("one-s-tile", "ticket * group", "ticket", "deadlock|trap"),
    Mutant("s-tiles-again", "shrink_tiles + later", "ticket", "global-race"),
]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("mutant", HOPPER, ids=lambda mutant: mutant.name)
def test_a_change_of_hoppers_tickets_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    change = "sm90/scheduler.cuh", mutant.old, mutant.new
    outcome = hopper(3).run(LATE, changed_source(tmp_path, *change, SM90_SOURCE, "sm_90a"))
    if mutant.kinds:
        assert outcome.report.kinds() & set(mutant.kinds.split("|")), outcome.report.findings
    else:
        assert outcome.wrong() or outcome.workspace.any()


@pytest.mark.full
@pytest.mark.parametrize("mutant", AMPERE, ids=lambda mutant: mutant.name)
def test_a_change_of_amperes_tickets_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    change = "sm80/loader.cuh", mutant.old, mutant.new
    text = changed_source(tmp_path, *change, SM80.instantiation, "sm_80")
    report, _ = sm80.run(ampere(3)[1], SM80, grid=4, schedule=LATE, text=text)
    assert report.kinds() & set(mutant.kinds.split("|")), report.findings
