"""Numbers of the sm_90a matmul: the compiled PTX, executed under several schedules."""

from __future__ import annotations

from itertools import product

import pytest

from tests.ptx_emulator import EVERY_SCHEDULE, TOGETHER, Schedule

from .sm90 import STAGES, Case, kernel_text

QUICK = (TOGETHER, Schedule("reversed", "late"))
LAYER = Case(200, ((264, 136, 16),))  # ragged in every dimension; two row and two column tiles
MASKED = LAYER.but(direction="dx", p=0.3)

CASES = [
    LAYER,
    LAYER.but(split=True, bias=True, dtype="f16"),
    LAYER.but(p=0.3),
    LAYER.but(direction="dx"),
    MASKED,
    # one block of columns less, one block to a cluster
    Case(130, ((136, 200, 5),), block_n=128, cluster=1, bias=True),
    Case(130, ((136, 72, 40),), block_n=128, cluster=1, direction="dx", dtype="f16", clusters=3),
    Case(72, ((136, 72, 24),), block_n=128, direction="dx", p=0.1, clusters=1),
    # ranks of several stages and of several S tiles
    Case(72, ((72, 136, 200),), blocks=4),
    Case(72, ((72, 136, 100),), p=0.2, dtype="f16"),
    Case(72, ((72, 72, 136),), direction="dx", blocks=2, block_n=128),
    Case(72, ((72, 72, 100),), direction="dx", p=0.5),
    # groups
    Case(72, ((264, 72, 8), (40, 72, 3), (64, 72, 16)), bias=True),
    Case(72, ((136, 72, 8), (40, 72, 20)), separate=True, p=0.2, block_n=128, clusters=1),
    Case(72, ((72, 72, 8), (72, 136, 16), (72, 64, 30)), direction="dx"),
    Case(72, ((72, 72, 8), (72, 136, 16)), direction="dx", p=0.4, dtype="f16"),
    # more tiles of one stage, one after the other, than there are slots to announce them in
    Case(700, ((72, 64, 8),), cluster=1, clusters=1),
    # gradients by the same launch: of several parts and of one, ragged, with and without S tiles
    LAYER.but(direction="dx", parts=2),
    Case(300, ((136, 200, 40),), "dx", "f16", cluster=1, parts=3),
    Case(300, ((136, 72, 64),), "dx", parts=1, split=True),
    Case(600, ((72, 264, 3),), "dx", parts=4, gradients="a"),
    Case(600, ((72, 264, 3),), "dx", parts=3, gradients="b", cluster=1, clusters=3),
    # tiny
    Case(1, ((8, 8, 1),), bias=True, clusters=1),
    Case(1, ((8, 8, 1),), direction="dx", cluster=1, clusters=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_numbers_and_no_findings(case: Case) -> None:
    first = case.run(QUICK[0]).check()
    assert case.run(QUICK[1]).check().same_as(first)


@pytest.mark.parametrize("case", [LAYER, MASKED.but(M=72, sizes=((72, 136, 16),))], ids=str)
def test_every_schedule_gives_the_same_bits(case: Case) -> None:
    first = case.run().check()
    for schedule in EVERY_SCHEDULE[1:]:
        assert case.run(schedule).check().same_as(first)


@pytest.mark.parametrize("clusters", [1, 3])
def test_a_workspace_serves_one_launch_after_another(clusters: int) -> None:
    """As a graph replays them; also with more clusters than tiles for them."""
    LAYER.but(clusters=clusters, sizes=((72, 72, 8),)).run(launches=3).check()


@pytest.mark.parametrize(("resident", "clusters"), [(2, 4), (4, 6)])
def test_blocks_never_wait_for_blocks_that_have_not_started(resident: int, clusters: int) -> None:
    """S tiles have the first tickets: with room for one cluster at a time the grid completes."""
    case = Case(520, ((72, 72, 16),), resident=resident, clusters=clusters)
    for schedule in (TOGETHER, Schedule("reversed", "late", slow_block=1)):
        case.run(schedule).check()


@pytest.mark.parametrize("block_n", [128, 256])
def test_every_phase_of_the_ring(block_n: int) -> None:
    """Tiles of 2 to 7 stages, one after the other on one cluster: each stage begins some tile."""
    for blocks in range(1, STAGES[block_n] + 1):
        sizes = ((2 * block_n, 64 * blocks, 16),)
        Case(100, sizes, cluster=1, clusters=1, block_n=block_n).run(QUICK[1]).check()


def test_nothing_is_touched_before_the_kernel_before_is_done() -> None:
    """Programmatic dependent launch: griddepcontrol.wait comes first."""
    case = LAYER.but(sizes=((72, 72, 16),), bias=True, p=0.3)
    case.run(dependent=True).check()
    text = kernel_text(case.kernel).replace("griddepcontrol.wait;", "")
    assert case.run(dependent=True, text=text).report.kinds() == {"dependent-launch"}


def test_scale_zero_when_everything_is_dropped() -> None:
    for direction in ("forward", "dx"):
        outcome = Case(40, ((72, 72, 16),), direction, p=1.0, clusters=1).run().check()
        assert not outcome.got["s0"].any()


@pytest.mark.full
@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_under_every_schedule(case: Case, schedule: Schedule) -> None:
    case.run(schedule).check()


SHAPES = [(1, 8, 72), (127, 64, 64), (129, 72, 128), (257, 520, 200), (300, 264, 320)]
RANKS = [1, 8, 16, 17, 32, 63, 64, 65, 130, 256, 300, 512]


@pytest.mark.full
@pytest.mark.parametrize("block_n", STAGES)
@pytest.mark.parametrize("rank", RANKS)
def test_sweep(rank: int, block_n: int) -> None:
    """Every rank in both directions, with and without dropout and S tiles; shapes take turns."""
    choices = product(("forward", "dx"), (0.0, 0.25), (False, True))
    for i, (direction, p, split) in enumerate(choices, RANKS.index(rank)):
        M, columns, depth = SHAPES[i % len(SHAPES)]
        wide = rank > 128 and not split and not (p and direction == "forward")
        blocks = block_n // 64 if wide else 1
        case = Case(
            M, ((columns, depth, rank),), direction, ("bf16", "f16")[i % 2], block_n, split, blocks,
            p=p, bias=direction == "forward", cluster=1 + (M > 128),
        )  # fmt: skip
        case.run().check()
