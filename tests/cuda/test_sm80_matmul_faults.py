"""Seeded faults: the compiled sm_80 matmul or its source is changed; a finding or the numbers tell.

`TEXT` faults give a finding of the stated kind at an instruction that matches `place`; `NUMBERS`
faults stay inside every rule of the machine and show in the result only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lora_fused.testing import Case, make_case
from tests.ptx_emulator import TOGETHER, Report, Schedule

from . import sm80
from .faults import changed_source
from .sm80 import problem_of, variant

LATE = Schedule("together", "late")
SLOW = Schedule("reversed", "late", slow_block=0)
KERNEL = {"forward": variant("bf16_32x64x64_k_major"), "dx": variant("bf16_32x64x64_mn_major")}

BARRIER = r"bar\.sync\s+0;|barrier\.sync\s+0;"
WAIT = r"cp\.async\.wait_group\s+2;"
SHUFFLE = r"shfl\.sync\.idx\.b32\s+(%r\d+)[^;]*;"


class Fault(NamedTuple):
    """Every match of `pattern` after the first that contains `after` becomes `new`."""

    name: str
    pattern: str
    new: str
    nth: int | None  # None: all matches
    kind: str
    place: str
    direction: str = "forward"
    schedule: Schedule = TOGETHER


TEXT = [
    Fault("barriers-removed", BARRIER, "", None, "race", "."),
    Fault(
        "wait-shortened",
        WAIT,
        "cp.async.wait_group 3;",
        None,
        "in-flight",
        "ldmatrix",
        schedule=LATE,
    ),
    Fault(
        "no-commit", r"cp\.async\.commit_group;", "", None, "in-flight", "ldmatrix", schedule=LATE
    ),
    Fault(
        "flag-relaxed",
        r"red\.release\.gpu",
        "red.relaxed.gpu",
        None,
        "global-race",
        "cp.async",
        schedule=SLOW,
    ),
    Fault(
        "flag-read-relaxed", r"ld\.acquire\.gpu", "ld.relaxed.gpu", None, "global-race", "cp.async"
    ),
    Fault(
        "flag-not-waited-for",
        r"ld\.acquire\.gpu\.global\.u32 (%r\d+),[^;]*;",
        r"mov.u32 \1, 99;",
        None,
        "uninitialised|global-race",
        "cp.async",
    ),
    Fault("flag-never-raised", r"red\.release\.gpu[^;]*;", "", None, "deadlock|trap", "."),
    Fault("dx-barriers-removed", BARRIER, "", None, "race", ".", "dx"),
    Fault(
        "dx-flag-relaxed",
        r"red\.release\.gpu",
        "red.relaxed.gpu",
        None,
        "global-race",
        "cp.async",
        "dx",
        SLOW,
    ),
]

NUMBERS = [
    Fault(
        "not-transposed",
        r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans",
        "ldmatrix.sync.aligned.m8n8.x4",
        None,
        "",
        "",
        "dx",
    ),
    Fault("a-multiplication-lost", r"mma\.sync[^;]*;", "", 10, "", ""),
    Fault("bits-of-the-mask-lost", SHUFFLE, r"mov.u32 \1, 255;", None, "", ""),
    Fault("dx-mask-lost", SHUFFLE, r"mov.u32 \1, 255;", None, "", "", "dx"),
    Fault(
        "quads-not-transposed",
        r"shfl\.sync\.bfly\.b32\s+(%r\d+)[^;]*;",
        r"mov.u32 \1, 0;",
        None,
        "",
        "",
    ),
]


def case_of() -> Case:
    return make_case(72, 200, 136, 24, torch.bfloat16, dropout_p=0.25)


def changed(fault: Fault) -> str:
    """The kernel's text with the fault; the pattern must be there."""
    text = sm80.kernel_text(KERNEL[fault.direction], "sm_80")
    found = list(re.finditer(fault.pattern, text))
    assert found, fault.name
    if fault.nth is None:
        return re.sub(fault.pattern, fault.new, text)
    match = found[fault.nth]
    return text[: match.start()] + match.expand(fault.new) + text[match.end() :]


def executed(fault: Fault) -> tuple[Report, Case, sm80.Problem, torch.Tensor]:
    case = case_of()
    problem = problem_of(case, fault.direction)
    options = {"schedule": fault.schedule, "text": changed(fault), "grid": 4}
    report, s = sm80.run(problem, KERNEL[fault.direction], **options)
    return report, case, problem, s


@pytest.mark.parametrize("fault", TEXT, ids=lambda fault: fault.name)
def test_fault_is_found_where_it_shows(fault: Fault) -> None:
    report, *_ = executed(fault)
    places = [f"{f.kind}: {f.text}" for f in report.findings]
    assert any(
        re.fullmatch(fault.kind, f.kind) and re.search(fault.place, f.text) for f in report.findings
    ), places


@pytest.mark.parametrize("fault", NUMBERS, ids=lambda fault: fault.name)
def test_fault_shows_in_the_numbers(fault: Fault) -> None:
    report, case, problem, s = executed(fault)
    report.check()
    with pytest.raises(AssertionError, match="error"):
        sm80.hold(case, fault.direction, problem, s)


class Mutant(NamedTuple):
    """`old` becomes `new` in a file; one of `kinds` is found; if none is named, numbers differ."""

    name: str
    file: str
    old: str
    new: str
    kinds: str
    direction: str = "forward"


MUTANTS = [
    Mutant(
        "row-bound", "copies.cuh", "pass * kStep < rows_left ? bytes : 0", "bytes", "out-of-bounds"
    ),
    Mutant(
        "column-bound",
        "copies.cuh",
        "clamp(row_bytes - chunk * 16, 0, 16)",
        "16",
        "out-of-bounds|uninitialised",
    ),
    Mutant(
        "rank-bound",
        "loader.cuh",
        "ranks = work->rank - r0;",
        "ranks = work->rank - r0 + 8;",
        "out-of-bounds|global-race",
    ),
    Mutant(
        "rank-bound-dx",
        "loader.cuh",
        "ranks = work->rank - r0;",
        "ranks = work->rank - r0 + 8;",
        "out-of-bounds|global-race",
        "dx",
    ),
    Mutant(
        "flag-before-s",
        "matmul.cuh",
        "__syncthreads();\n    if (threadIdx.x == 0) ptx::red_add",
        "if (threadIdx.x == 0) ptx::red_add",
        "global-race|uninitialised",
    ),
    Mutant(
        "stage-too-early",
        "matmul.cuh",
        "slot == 0 ? kStages - 1 : slot - 1",
        "slot",
        "race|in-flight",
    ),
    Mutant("work-overwritten", "matmul.cuh", "now == 2 ? 0", "now == 1 ? 0", "race"),
    Mutant("workspace-left", "matmul.cuh", "i < words; i +=", "i < 0; i +=", ""),
    Mutant(
        "last-block-dropped",
        "loader.cuh",
        "blocks_of(args.D, Tile::BLOCK_K)",
        "args.D / Tile::BLOCK_K",
        "uninitialised",
    ),
    Mutant(
        "mask-on-everything",
        "loader.cuh",
        "args.mask_output && args.threshold > 0 ? 0 :",
        "false ? 0 :",
        "",
        "dx",
    ),
    Mutant("scale-lost", "epilogue.cuh", "c[i][j][e] * scale", "c[i][j][e]", ""),
]


def mutated(mutant: Mutant, folder: Path) -> str:
    """The PTX of the kernel from changed sources."""
    source = KERNEL[mutant.direction].instantiation
    return changed_source(folder, f"sm80/{mutant.file}", mutant.old, mutant.new, source, "sm_80")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_changed_source_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    case = case_of()
    problem = problem_of(case, mutant.direction)
    options = {"schedule": SLOW, "text": mutated(mutant, tmp_path), "grid": 4}
    report, s = sm80.run(problem, KERNEL[mutant.direction], **options)
    if mutant.kinds:
        assert report.kinds() & set(mutant.kinds.split("|")), report.findings
        return
    report.check()
    with pytest.raises(AssertionError):
        sm80.hold(case, mutant.direction, problem, s)
