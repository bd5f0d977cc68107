"""Both gradients of the adapters by the launch of dx on sm_90a: reduce tiles between its own."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lora_fused.autograd import Saved, lora_backward
from lora_fused.backends import BACKENDS, cuda, cuda_sm90
from lora_fused.config import Call, Config, Problem, Route
from lora_fused.testing import assert_close_to_ref, make_case
from tests.ptx_emulator import EVERY_SCHEDULE, TOGETHER, Schedule

from .emulated import EmulatedGpu
from .faults import changed_source
from .problems import strided
from .sm90 import Case

LATE = Schedule("reversed", "late", slow_block=0)
MIXED = Schedule("random", "random", seed=3)
PAIR = Case(300, ((136, 264, 16),), "dx", parts=2)
ALONE = PAIR.but(cluster=1, parts=3)
KERNEL = """
#include "matmul.cuh"
extern "C" __global__ void __launch_bounds__(384, 1) lora_matmul_sm90_bf16_dx_n256(
    const __grid_constant__ lora_fused::sm90::MatmulArgs args) {
  using namespace lora_fused;
  sm90::matmul<sm90::Tiling<bf16, 256, sm90::Direction::dx>>(args);
}
"""


@pytest.mark.parametrize("case", [PAIR, ALONE], ids=str)
def test_every_schedule_gives_the_same_bits(case: Case) -> None:
    """The parts are summed in their order, whoever arrives last."""
    first = case.run().check()
    for schedule in (*EVERY_SCHEDULE[1:], MIXED):
        assert case.run(schedule).check().same_as(first)


@pytest.mark.parametrize("parts", [1, 2, 4, 5, 9])
def test_any_number_of_parts(parts: int) -> None:
    """Five blocks of tokens: parts of unequal length, and more parts than there are blocks."""
    ALONE.but(M=600, parts=parts, group=2).run(LATE).check()


@pytest.mark.parametrize(("resident", "clusters"), [(2, 1), (2, 4), (4, 9)])
def test_blocks_never_wait_for_blocks_that_have_not_started(resident: int, clusters: int) -> None:
    PAIR.but(resident=resident, clusters=clusters).run(LATE, launches=2).check()


@pytest.mark.parametrize("case", [PAIR.but(M=512, sizes=((256, 256, 32),)), ALONE], ids=str)
def test_traffic_is_as_planned(case: Case) -> None:
    """x and dy once, ds and s once for 128 of their columns, partial sums once each way."""
    plain = case.but(parts=0).run(counters=True).check().report.counters
    both = case.run(counters=True).check().report.counters
    ((columns, depth, rank),), parts = case.sizes, case.parts
    width = 128 * case.cluster
    blocks = sum(-(-p // width) * case.cluster for p in (columns, depth))
    sums = 4 * parts * (-(-columns // 16) + -(-depth // 16)) * 16 * -(-rank // 8) * 8
    plan = {
        "load": 2 * case.M * (columns + depth) + 2 * case.M * rank * blocks + sums,
        "store": 2 * columns * rank + 4 * depth * rank + sums,
    }
    for kind in ("load", "store"):
        more = both.global_bytes[kind] - plain.global_bytes[kind]
        assert 0.9 * plan[kind] <= more <= 1.02 * plan[kind], kind
    assert both.shared_wavefronts <= 1.05 * both.ideal_wavefronts


# ---- through the backend -------------------------------------------------------------------------


def route_of(case, parts: int, da: torch.dtype, db: torch.dtype) -> Route:
    (M, K), (N, R), dtype = case.x.shape, case.lora_B.shape, case.x.dtype
    needs = frozenset({"x", "lora_A", "lora_B"})
    problem = Problem(M, K, N, R, dtype, "cuda", needs=needs)
    config = Config("cuda", dx="s_first", dx_tiles=cuda_sm90.tiles(256, 2, parts))
    return Route(problem, config, dtype, False, needs, (M, K), (M, N), (dtype, da, db, dtype))


@pytest.mark.parametrize(
    ("shape", "dtype", "gradients", "layout"),
    [
        ((200, 136, 264, 16), torch.bfloat16, torch.float32, "contiguous"),
        ((130, 72, 136, 5), torch.float16, torch.float16, "padded"),
        ((90, 72, 72, 64), torch.bfloat16, torch.float64, "strided"),
    ],
    ids=str,
)
def test_backward_of_a_layer_is_one_launch(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    gradients: torch.dtype,
    layout: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    M, K, N, R = shape
    case = make_case(M, K, N, R, dtype)
    x, dy = (t if layout == "contiguous" else strided(t, layout) for t in (case.x, case.dy))
    s = case.baseline()["s"]
    call = Call(route_of(case, 2, gradients, gradients), case.scaling)
    monkeypatch.setitem(BACKENDS, "cuda", cuda)
    with EmulatedGpu("sm_90a") as gpu:
        gpu.see(x, dy, s, case.weight, case.lora_A, case.lora_B)
        saved = Saved(x, s, case.weight, case.lora_A, case.lora_B)
        with torch.no_grad():
            got = [lora_backward(call, dy, saved)._asdict() for _ in range(2)]
    gpu.check()
    assert [launch.kernel[:17] for launch in gpu.launches] == ["lora_matmul_sm90_"] * 2
    truth, baseline = case.truth(), case.baseline()
    for name in ("dx", "da", "db"):
        assert torch.equal(got[0][name], got[1][name])
        assert got[0][name].dtype == (dtype if name == "dx" else gradients)
        assert_close_to_ref(name, got[0][name], truth[name], baseline[name])


def test_refusals_are_sentences() -> None:
    case = make_case(130, 72, 72, 65, torch.bfloat16)
    s = case.baseline()["s"]
    y, da = torch.empty(130, 72).bfloat16(), torch.empty(65, 72).bfloat16()
    gradient = cuda_sm90.Gradient(case.x, s, da.t())
    with EmulatedGpu("sm_90a") as gpu:
        gpu.see(*(t for t in (case.x, case.dy, case.weight, case.lora_A, case.lora_B, s, y, da)))
        layer = cuda_sm90.Layer(case.dy, case.weight, case.lora_B, case.lora_A, s, y, 1.0)
        for tiles, message in (
            (cuda_sm90.tiles(256, 1, 2), "R: got 65, expected at most 64 where gradients are"),
            (cuda_sm90.tiles(128, 1, 2), "reduce_parts: got 2, expected 0, but for the dx of one"),
        ):
            with pytest.raises(ValueError, match=message):
                cuda_sm90.run(tiles, "dx", [layer], [gradient, gradient])


# ---- faults --------------------------------------------------------------------------------------


class Mutant(NamedTuple):
    """In a file of sm90/ `old` becomes `new`; one of `kinds` is found, or without kinds the result
    is wrong."""

    name: str
    file: str
    old: str
    new: str
    kinds: str


READ_BY_ALL = "ptx::bar_sync(1 + group, 128);  // all warps have read z"
MUTANTS = [
    Mutant("ds-unwaited", "producer.cuh", "wait_for_s(block);", "{}", "global-race"),
    Mutant("z-released-early", "consumer.cuh", READ_BY_ALL, "", "race|in-flight"),
    Mutant("sum-by-the-first", "gradient.cuh", "before != last", "before != 0",
           "uninit|global-race"),
    Mutant("parts-unordered", "gradient.cuh", "  __syncwarp();\n  std::uint32_t before",
           "  std::uint32_t before", "global-race"),
    Mutant("sum-unordered", "gradient.cuh", "__syncwarp();  // what lane 0", "// what lane 0",
           "global-race"),
    Mutant("part-forgotten", "gradient.cuh", "int p = 0; p < args", "int p = 1; p < args", ""),
    Mutant("swizzle", "gradient.cuh", "chunk ^ (token % 8)", "chunk ^ (token % 4)", ""),
    Mutant("same-columns", "producer.cuh", "job.column + 64, block", "job.column, block", ""),
    Mutant("tiles-of-dx-skipped", "scheduler.cuh", "    place -= before;\n", "", ""),
    Mutant("late-ones-dropped", "scheduler.cuh", "early + place - mixed", "args.reduce_tiles", ""),
    Mutant("counter-left", "gradient.cuh", "word, last);", "word, last + 1);", ""),
]  # fmt: skip
QUICK = {"ds-unwaited", "parts-unordered", "part-forgotten"}


@pytest.mark.parametrize(
    "mutant",
    [m if m.name in QUICK else pytest.param(m, marks=pytest.mark.full) for m in MUTANTS],
    ids=lambda mutant: mutant.name,
)
def test_a_change_of_the_reduce_tiles_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    text = changed_source(tmp_path, f"sm90/{mutant.file}", mutant.old, mutant.new, KERNEL, "sm_90a")
    case = ALONE if mutant.name != "ds-unwaited" else ALONE.but(gradients="a", clusters=3)
    found: set[str] = set()
    for schedule in (LATE, TOGETHER, MIXED, Schedule("reversed", "late")):
        outcome = case.run(schedule, text)
        found |= outcome.report.kinds()
        if mutant.kinds and any(kind in f for kind in mutant.kinds.split("|") for f in found):
            return
        if not mutant.kinds and (outcome.wrong() or outcome.workspace.any()):
            return
    raise AssertionError(f"found {found or 'nothing'}")
