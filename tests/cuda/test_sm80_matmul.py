"""The sm_80 matmul, as compiled, against the reference."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch

from lora_fused.reference import effective_scaling
from lora_fused.testing import assert_close_to_ref, make_case
from tests.ptx_emulator import EVERY_SCHEDULE, Schedule

from . import sm80
from .sm80 import SHIPPED, Problem, Projection, Variant, check, problem_of, variant

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}
LATE = Schedule("reversed", "late", slow_block=0)
SMALL = {"forward": variant("bf16_32x64x64_k_major"), "dx": variant("bf16_32x64x64_mn_major")}
MIDDLE = {"forward": variant("bf16_64x128x32_k_major"), "dx": variant("bf16_64x128x32_mn_major")}
DIRECTIONS = ("forward", "dx")


def direction_of(shipped: Variant) -> str:
    return "dx" if shipped.layout == "mn_major" else "forward"


def ragged(shipped: Variant) -> tuple[int, int, int]:
    """M, K, N: more than one tile each way, none of them full; K ends inside a k block."""
    step = 16 // shipped.element_bytes
    blocks = 2 if shipped.layout == "any" else 5
    outputs, inner = shipped.block_n + 3 * step, blocks * shipped.block_k + step
    M = shipped.block_m + 9
    return (M, inner, outputs) if direction_of(shipped) == "forward" else (M, outputs, inner)


FP16 = [v for v in SHIPPED if v.math == "f16" and v.block_n > 64]
"""Differ from the bf16 kernels in the mma and the conversions only; run in the full sweep."""


@pytest.mark.parametrize(
    "shipped",
    [pytest.param(v, marks=pytest.mark.full) if v in FP16 else v for v in SHIPPED],
    ids=str,
)
def test_every_kernel_on_a_ragged_shape(shipped: Variant) -> None:
    case = make_case(*ragged(shipped), 16, DTYPES[shipped.math], bias=True)
    check(case, direction_of(shipped), shipped, schedule=LATE, grid=3)


@cache
def together(direction: str) -> torch.Tensor:
    case = make_case(72, 200, 136, 24, torch.bfloat16, dropout_p=0.25)
    return check(case, direction, SMALL[direction], grid=5)[0].members[0].y


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE[1:], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_schedule_gives_the_same_bits(direction: str, schedule: Schedule) -> None:
    case = make_case(72, 200, 136, 24, torch.bfloat16, dropout_p=0.25)
    problem, _ = check(case, direction, SMALL[direction], schedule=schedule, grid=5)
    assert torch.equal(problem.members[0].y, together(direction))


@pytest.mark.parametrize(("grid", "resident"), [(1, 1), (3, 2), (40, 64)])
def test_few_and_many_resident_blocks(grid: int, resident: int) -> None:
    case = make_case(72, 72, 136, 16, torch.bfloat16)
    check(case, "forward", SMALL["forward"], grid=grid, resident=resident, schedule=LATE)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("blocks", range(1, 7))
def test_every_residue_of_k_blocks(direction: str, blocks: int) -> None:
    """With fewer blocks than the four stages, s is waited for while the pipeline fills."""
    inner = 32 * blocks - 8
    case = make_case(
        24, *((inner, 136) if direction == "forward" else (136, inner)), 40, torch.bfloat16
    )
    check(case, direction, MIDDLE[direction], schedule=LATE, grid=2)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rank", [1, 4, 17, 64, 200])
def test_ranks(direction: str, rank: int) -> None:
    case = make_case(40, 72, 104, rank, torch.bfloat16)
    check(case, direction, SMALL[direction], grid=3)


@pytest.mark.parametrize(("math", "p"), [("bf16", 0.1), ("bf16", 1.0), ("f16", 0.1), ("tf32", 0.1)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_dropout_masks_s_and_the_rank_part_of_dx(direction: str, math: str, p: float) -> None:
    shipped = SMALL[direction]
    if math == "tf32":
        shipped = variant("tf32_32x64x32_" + shipped.layout)
    elif math == "f16":
        shipped = variant("f16_32x64x64_" + shipped.layout)
    case = make_case(40, 76 if math == "tf32" else 72, 104, 12, DTYPES[math], dropout_p=p)
    check(case, direction, shipped, grid=4, problem={"seed_on_device": True})


def test_a_mask_bit_out_of_place_is_seen() -> None:
    """The reference with another seed is refused: the comparison above can fail."""
    case = make_case(40, 72, 104, 16, torch.bfloat16, dropout_p=0.1)
    problem = problem_of(case, "forward")
    problem.members[0].seed += 1
    report, s = sm80.run(problem, SMALL["forward"], grid=4)
    report.check()
    with pytest.raises(AssertionError, match="error"):
        sm80.hold(case, "forward", problem, s)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_given_s_needs_no_flags(direction: str) -> None:
    case = make_case(72, 200, 136, 24, torch.bfloat16, bias=True)
    first = problem_of(case, direction)
    _, s = sm80.run(first, SMALL[direction])
    split = problem_of(case, direction, s=s[:, :24])
    report, _ = sm80.run(split, SMALL[direction], schedule=LATE)
    report.check()
    assert torch.equal(split.members[0].y, first.members[0].y)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_second_launch_finds_the_workspace_as_the_first(direction: str) -> None:
    case = make_case(72, 200, 136, 24, torch.bfloat16)
    workspace = torch.zeros(sm80.FLAGS + 3, dtype=torch.int32)
    for _ in range(2):
        check(
            case,
            direction,
            SMALL[direction],
            schedule=LATE,
            grid=3,
            problem={"workspace": workspace},
        )


def group_of(p: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> list:
    """q/k/v-like: one x, other weights, ranks and widths."""
    sizes = ((136, 16), (72, 5), (40, 72))
    cases = [make_case(72, 104, N, R, dtype, dropout_p=p, seed=i) for i, (N, R) in enumerate(sizes)]
    for case in cases:
        case.x = cases[0].x
    return cases


@pytest.mark.parametrize("shipped", [SMALL["forward"], MIDDLE["forward"]], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_groups_share_x_and_have_their_own_masks(p: float, shipped: Variant) -> None:
    cases = group_of(p)
    members = []
    for case in cases:
        y = torch.zeros(72, case.weight.shape[0], dtype=torch.bfloat16)
        members.append(Projection(case.weight, case.lora_A, case.lora_B, y, None, case.seed))
    scale = effective_scaling(cases[0].scaling, p)
    problem = Problem(cases[0].x, members, scale, threshold=round(p * 65536))
    report, s = sm80.run(problem, shipped, schedule=LATE, grid=4)
    report.check()
    begin = 0
    for case, member in zip(cases, members, strict=True):
        expected, allowed = sm80.truth(case), sm80.baseline(case)
        R = case.lora_A.shape[0]
        assert_close_to_ref("y", member.y, expected["y"], allowed["y"])
        assert_close_to_ref("s", s[:, begin : begin + R], expected["s"], allowed["s"])
        begin += -(-R // 8) * 8


def strided(tensor: torch.Tensor, extra: int) -> torch.Tensor:
    """The same values, rows `extra` elements further apart."""
    wide = torch.full((tensor.shape[0], tensor.shape[1] + extra), 99.0, dtype=tensor.dtype)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


@pytest.mark.parametrize("math", DTYPES)
@pytest.mark.parametrize("extra", [8, 3])
def test_strided_operands(math: str, extra: int) -> None:
    """Rows of 16-byte multiples take the fast kernel, others the one that reads elements."""
    case = make_case(40, 75, 101, 9, DTYPES[math], bias=True, dropout_p=0.1)
    width = 80 if extra == 8 else 75
    for name in ("x", "weight", "lora_A"):
        setattr(case, name, strided(getattr(case, name), width - 75 + extra))
    case.lora_B = strided(case.lora_B, extra)
    fast = "tf32_32x64x32_k_major" if math == "tf32" else f"{math}_32x64x64_k_major"
    slow = "tf32_64x128x16_any" if math == "tf32" else f"{math}_64x128x32_any"
    check(case, "forward", variant(slow if extra == 3 else fast), grid=3)


def test_y_with_strides() -> None:
    case = make_case(40, 72, 104, 9, torch.bfloat16, bias=True)
    for extra, shipped in ((8, SMALL["forward"]), (1, SMALL["forward"])):
        problem = problem_of(case, "forward")
        problem.members[0].y = strided(problem.members[0].y, extra)
        _, s = sm80.run(problem, shipped, grid=3)
        sm80.hold(case, "forward", problem, s)


def test_y_by_columns() -> None:
    case = make_case(40, 71, 99, 9, torch.bfloat16, bias=True)
    problem = problem_of(case, "forward")
    problem.members[0].y = torch.zeros(99, 40, dtype=torch.bfloat16).t()
    _, s = sm80.run(problem, variant("bf16_64x128x32_any"), grid=3)
    sm80.hold(case, "forward", problem, s)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_transposed_weights(direction: str) -> None:
    """fan_in_fan_out: w lies the other way round than the adapters, which are read by elements."""
    case = make_case(40, 72, 104, 16, torch.bfloat16, bias=True, fan_in_fan_out=True)
    other = {"forward": SMALL["dx"], "dx": SMALL["forward"]}
    check(case, direction, other[direction], grid=3)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_odd_sizes_by_elements(direction: str) -> None:
    case = make_case(37, 71, 43, 7, torch.bfloat16, bias=True, dropout_p=0.2)
    check(case, direction, variant("bf16_64x128x32_any"), schedule=LATE, grid=3)


def test_the_rest_of_a_band_of_tiles() -> None:
    """Bands of two rows of tiles over five: the last band is short."""
    case = make_case(5 * 32, 72, 200, 16, torch.bfloat16)
    check(case, "forward", SMALL["forward"], grid=6, problem={"group_m": 2})


SWEEP = [
    (shape, rank, p, bias)
    for shape in ((1, 8, 8), (33, 64, 64), (130, 264, 264), (200, 520, 136))
    for rank, p, bias in ((1, 0.0, True), (16, 0.1, False), (130, 0.0, False), (512, 0.5, True))
]


@pytest.mark.full
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_120"])
@pytest.mark.parametrize(
    ("shipped", "item"),
    [(v, i) for v, i in itertools.product(SHIPPED, SWEEP) if v.math != "f16"],
    ids=str,
)
def test_sweep(shipped: Variant, item, arch: str) -> None:
    (M, K, N), rank, p, bias = item
    direction = direction_of(shipped)
    case = make_case(
        M, K, N, rank, DTYPES[shipped.math], bias=bias and direction == "forward", dropout_p=p
    )
    check(case, direction, shipped, arch, schedule=Schedule("random", "random", seed=rank), grid=4)
