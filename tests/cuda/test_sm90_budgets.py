"""What ptxas made of the sm_90a matmul, and its exact traffic in bytes and wavefronts."""

from __future__ import annotations

import re
from itertools import pairwise, product

import pytest

from .compile import compiler_log, resources, sass
from .sm90 import ARCH, SOURCE, Case, shared_bytes

DIRECTIONS = ("forward", "dx", "dx_masked")
KERNELS = [
    f"lora_matmul_sm90_{dtype}_{direction}_n{block_n}"
    for dtype, direction, block_n in product(("bf16", "f16"), DIRECTIONS, (128, 256))
]
MAX_SHARED = 232448
# What may wait or move data does not stand between two HGMMAs of a stage; addresses are made there.
WAITING = ("LDG", "LDS", "LDL", "STG", "STS", "STL", "LD.", "ST.", "ATOM", "RED", "BAR", "BRA")
WAITING += ("BSYNC", "CALL", "DEPBAR", "MEMBAR", "SHFL", "SYNCS", "UTMA", "WARPGROUP")


def test_every_kernel_is_there() -> None:
    assert set(resources(SOURCE, ARCH)) == set(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_registers_and_shared_memory(kernel: str) -> None:
    """168 at launch for 384 threads; setmaxnreg moves them to the consumers, 232 and 40."""
    used = resources(SOURCE, ARCH)[kernel]
    assert used.registers == 168
    assert (used.spill_stores, used.spill_loads, used.stack, used.shared_bytes) == (0, 0, 0, 0)
    assert shared_bytes(int(kernel[-3:])) <= MAX_SHARED


def test_ptxas_serialises_nothing() -> None:
    assert re.findall(r"C75\d\d|serialized", compiler_log(SOURCE, ARCH)) == []


@pytest.mark.parametrize("kernel", KERNELS)
def test_matrix_instructions_stand_back_to_back(kernel: str) -> None:
    """A stage is one WARPGROUP.ARRIVE, its HGMMAs, and one wait."""
    code = [line.strip() for line in sass(SOURCE, ARCH)[kernel].splitlines()]
    names = [
        m[1] for line in code if (m := re.match(r"/\*\w+\*/\s+(?:@!?U?P\d+ )?([A-Z]\S*)", line))
    ]
    block_n = int(kernel[-3:])
    runs = _stages(names)
    main = [run for run in runs if run["shape"] == f"64x{block_n}x16" and run["count"] == 4]
    assert len(main) >= 2, "the contraction, and the full stage of ranks or the wide S tile"
    assert "STL" not in " ".join(names) and "LDL" not in " ".join(names)
    for run in runs:
        reduces = kernel.endswith("_dx_n256") and run["shape"] == "64x64x16"
        assert 1 <= run["count"] <= (8 if reduces else 4)  # a stage of tokens is 128, not 64
        assert not [name for name in run["between"] if name.startswith(WAITING)]
        assert run["gap"] <= 40


def _stages(names: list[str]) -> list[dict]:
    """From every WARPGROUP.ARRIVE to the wait behind it."""
    runs = []
    for start in (i for i, name in enumerate(names) if name == "WARPGROUP.ARRIVE"):
        end = next(i for i in range(start, len(names)) if names[i].startswith("WARPGROUP.DEPBAR"))
        inside = names[start + 1 : end]
        mma = [i for i, name in enumerate(inside) if name.startswith("HGMMA")]
        between = {name for name in inside[mma[0] : mma[-1]] if not name.startswith("HGMMA")}
        gaps = [b - a - 1 for a, b in pairwise(mma)]
        shape = inside[mma[0]].split(".")[1]
        runs.append(
            {"shape": shape, "count": len(mma), "between": between, "gap": max(gaps, default=0)}
        )
    return runs


# ---- traffic -------------------------------------------------------------------------------------

LAYER = Case(512, ((512, 256, 64),), clusters=3)


@pytest.mark.parametrize(
    "case",
    [
        LAYER,
        LAYER.but(direction="dx"),
        LAYER.but(split=True, block_n=128),
        LAYER.but(M=256, direction="dx", p=0.3),
        LAYER.but(M=256, p=0.3),
    ],
    ids=str,
)
def test_traffic_is_as_planned(case: Case) -> None:
    """Bytes of global memory within 1.02 of the plan, shared memory without bank conflicts."""
    counters = case.run(counters=True).check().report.counters
    plan = planned_bytes(case)
    for kind in ("load", "store"):
        assert plan[kind] <= counters.global_bytes[kind] <= 1.02 * plan[kind]
    assert counters.shared_wavefronts <= 1.05 * counters.ideal_wavefronts
    assert counters.tensor_flops == planned_flops(case)


def planned_bytes(case: Case) -> dict[str, int]:
    """Each block reads its rows of x for every tile; the blocks of a cluster share w and b."""
    ((columns, depth, rank),) = case.sizes
    row_tiles, column_tiles = case.M // (128 * case.cluster), columns // case.block_n
    x, s = 2 * case.M * depth, 2 * case.M * rank
    main = column_tiles * (x + s) + row_tiles * 2 * columns * (depth + rank)
    shrink = 0 if case.split else x + row_tiles * case.cluster * 2 * rank * depth
    return {"load": main + shrink, "store": 2 * case.M * columns + (0 if case.split else s)}


def planned_flops(case: Case) -> int:
    """The rank costs no more than itself; S tiles are 64 columns wide."""
    ((columns, depth, rank),) = case.sizes
    return 2 * case.M * (columns * (depth + rank) + (0 if case.split else 64 * depth))
