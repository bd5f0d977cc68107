"""Seeded faults: each is found, and the finding names the instruction where it shows.

A fault changes one instruction of a compiled kernel.  `TEXT` faults must give a finding of the
stated kind at an instruction that matches; `NUMBERS` faults stay inside every rule of the machine
and show in the result only; `EQUIVALENT` ones change nothing that any schedule can tell.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from . import EVERY_SCHEDULE, TOGETHER, Schedule
from .cases import Case
from .fault_list import table
from .testing import fixture, with_fault

TILE = Case("tile_gemm", {"M": 72, "N": 88, "K": 136})
HOPPER = Case("hopper_gemm", {"M": 136, "N": 72, "K": 264})
LORA_80 = Case("lora_bf16_80", {"M": 72, "N": 80, "K": 112})
LORA_90 = Case("lora_bf16_90", {"M": 72, "N": 80, "K": 112})
DESCRIPTOR = Case("descriptor_bf16_100", {"M": 72, "N": 80, "K": 112})
WARPS = Case("specialised_bf16_120", {"M": 136, "N": 72, "K": 160})
GRADIENT = Case("gradient_bf16_80", {"M": 150, "K": 80}, 1e-5)
RELAY = Case("blocks", {"tiles": 6}, 0.0, {"kernel": "relay"})
SUM = Case("blocks", {"N": 1500}, 0.0, {"kernel": "sum"})
HISTOGRAM = Case("blocks", {"N": 700}, 0.0, {"kernel": "histogram"})
HANDOVER = Case("blocks", {"rounds": 7}, 0.0, {"kernel": "handover"})

BARRIER = r"bar\.sync\s+\d+(?:, \d+)?;"
COPY_WAIT = r"cp\.async\.wait_group\s+\d;"
PROXY = r"fence\.proxy\.async\S*;"
MMA_WAIT = r"wgmma\.wait_group\.sync\.aligned\s+\d;"
INIT = r"(mbarrier\.init\S*\s+\[[^\]]*\],\s*)\S+;"
EXPECT = r"(expect_tx[^;]*,\s*)\S+;"
ARRIVE = r"mbarrier\.arrive\.release[^;]*;"
CLUSTER = r"barrier\.cluster\.arrive\.aligned;\s*barrier\.cluster\.wait\.aligned;"
LATE = Schedule("reversed", "late")
RETRY = r"@done bra over;\s*bra again;|@!complete bra\.uni waitLoop;"
SPIN = r"again:\s*mbarrier\.try_wait[^;]*;\s*@done bra over;\s*bra again;"


class Fault(NamedTuple):
    """The `nth` match of `pattern` becomes `new`; `kind` is found where the text has `place`."""

    name: str
    case: Case
    pattern: str
    nth: int
    new: str
    kind: str
    place: str
    schedule: Schedule = TOGETHER


TEXT = [
    # barriers removed
    Fault("tile-barrier", TILE, BARRIER, 0, "", "race", "ldmatrix"),
    Fault("lora80-main-barrier", LORA_80, BARRIER, 1, "", "race", "ldmatrix"),
    Fault("lora80-stage-barrier", LORA_80, BARRIER, 2, "", "race", "cp.async"),
    Fault("lora80-scratch-barrier", LORA_80, BARRIER, 3, "", "race", "st.shared"),
    Fault("lora80-exchange-barrier", LORA_80, BARRIER, 4, "", "race", "ld.shared"),
    Fault("lora80-reuse-barrier", LORA_80, BARRIER, 5, "", "race", "st.shared"),
    Fault("lora90-barrier", LORA_90, BARRIER, 1, "", "race", "wgmma.mma_async"),
    Fault("lora90-tail-barrier", LORA_90, BARRIER, 4, "", "race", "wgmma.mma_async"),
    Fault("gradient-barrier", GRADIENT, BARRIER, 1, "", "race", "ldmatrix"),
    Fault("gradient-stage-barrier", GRADIENT, BARRIER, 2, "", "race", "cp.async"),
    Fault("gradient-exchange-barrier", GRADIENT, BARRIER, 4, "", "race", "ld.shared"),
    Fault("hopper-store-barrier", HOPPER, BARRIER, 1, "", "race", "bulk.tensor.2d.global"),
    Fault("hopper-cluster-barrier", HOPPER, CLUSTER, 0, "", "race", "mbarrier|bulk"),
    Fault("hopper-exit-barrier", HOPPER, CLUSTER, 1, "", "exited-block", "mbarrier.arrive|bulk"),
    Fault("warps-init-barrier", WARPS, BARRIER, 1, "", "race", "bulk.tensor"),
    Fault("descriptor-alloc-barrier", DESCRIPTOR, BARRIER, 0, "", "race", "ld.shared"),
    Fault("sum-barrier", SUM, BARRIER, 0, "", "race", "ld.shared"),
    Fault("histogram-clear-barrier", HISTOGRAM, BARRIER, 0, "", "race", "atom.shared"),
    Fault("histogram-read-barrier", HISTOGRAM, BARRIER, 1, "", "race", "ld.shared"),
    Fault("relay-post-barrier", RELAY, BARRIER, 0, "", "global-race", "ld.global.f32"),
    Fault("relay-wait-barrier", RELAY, BARRIER, 1, "", "global-race", "ld.global.f32"),
    Fault(
        "handover-full-missing", HANDOVER, r"bar\.arrive\s+1, 64;", 0, "", "deadlock", "bar.sync"
    ),
    Fault(
        "handover-count",
        HANDOVER,
        r"bar\.arrive\s+2, 64;",
        0,
        "bar.arrive 2, 96;",
        "barrier-count",
        "bar",
    ),
    Fault(
        "handover-empty-missing",
        HANDOVER,
        r"bar\.sync\s+2, 64;",
        1,
        "bar.arrive 2, 64;",
        "deadlock",
        "bar.sync",
    ),
    # waits shortened
    Fault("tile-wait", TILE, COPY_WAIT, 0, "cp.async.wait_group 2;", "in-flight", "ldmatrix"),
    Fault("lora80-wait", LORA_80, COPY_WAIT, 0, "cp.async.wait_group 4;", "in-flight", "ldmatrix"),
    Fault("lora90-wait", LORA_90, COPY_WAIT, 0, "cp.async.wait_group 4;", "in-flight", "wgmma"),
    Fault("tile-commit", TILE, r"cp\.async\.commit_group;", 0, "", "in-flight", "ldmatrix"),
    Fault("lora80-leftover", LORA_80, COPY_WAIT, 1, "", "leftover", "cp.async"),
    Fault(
        "lora90-mma-wait",
        LORA_90,
        MMA_WAIT,
        0,
        "wgmma.wait_group.sync.aligned 3;",
        "in-flight",
        "cp.async",
    ),
    Fault(
        "lora90-accumulator",
        LORA_90,
        MMA_WAIT,
        2,
        "wgmma.wait_group.sync.aligned 1;",
        "in-flight",
        "cvt",
    ),
    Fault(
        "hopper-mma-wait",
        HOPPER,
        MMA_WAIT,
        0,
        "wgmma.wait_group.sync.aligned 1;",
        "in-flight",
        "bulk.tensor",
    ),
    Fault(
        "hopper-accumulator",
        HOPPER,
        MMA_WAIT,
        2,
        "wgmma.wait_group.sync.aligned 1;",
        "in-flight",
        "cvt",
    ),
    Fault(
        "hopper-store-wait",
        HOPPER,
        r"cp\.async\.bulk\.wait_group\s+0;",
        0,
        "",
        "leftover",
        "bulk.tensor.2d.global",
    ),
    Fault(
        "descriptor-store-wait",
        DESCRIPTOR,
        r"cp\.async\.bulk\.wait_group\s+0;",
        0,
        "",
        "leftover",
        "bulk.tensor.2d.global",
    ),
    Fault("descriptor-load-wait", DESCRIPTOR, r"tcgen05\.wait::ld\S*;", 0, "", "in-flight", "mov"),
    Fault(
        "descriptor-clear-wait",
        DESCRIPTOR,
        r"tcgen05\.wait::st\S*;",
        0,
        "",
        "in-flight",
        "tcgen05.mma",
    ),
    Fault("hopper-stage-reused", HOPPER, SPIN, 3, "", "in-flight", "bulk.tensor"),
    Fault("hopper-full-wait", HOPPER, SPIN, -1, "", "in-flight", "wgmma"),
    # waits that do not ask again when their time limit has passed
    Fault("hopper-full-retry", HOPPER, RETRY, 5, "bra over;", "in-flight", "wgmma", LATE),
    Fault("hopper-empty-retry", HOPPER, RETRY, 3, "bra over;", "barrier-count", "expect_tx", LATE),
    Fault("warps-full-retry", WARPS, RETRY, 0, "", "in-flight", "ldmatrix", LATE),
    Fault("descriptor-full-retry", DESCRIPTOR, RETRY, 0, "", "in-flight", "tcgen05.mma", LATE),
    Fault("descriptor-stage-retry", DESCRIPTOR, RETRY, 1, "", "in-flight", "cp.async.bulk", LATE),
    Fault("descriptor-y-retry", DESCRIPTOR, RETRY, 3, "", "in-flight", "tcgen05.ld", LATE),
    # transaction counts and arrivals
    Fault("hopper-expect-less", HOPPER, EXPECT, 0, r"\g<1>8192;", "in-flight", "wgmma"),
    Fault("hopper-expect-more", HOPPER, EXPECT, 0, r"\g<1>16400;", "deadlock", "try_wait"),
    Fault("warps-expect", WARPS, EXPECT, 0, r"\g<1>8192;", "deadlock", "try_wait"),
    Fault("hopper-arrival-missing", HOPPER, ARRIVE, 0, "", "deadlock", "try_wait"),
    Fault("hopper-empty-count", HOPPER, INIT, 1, r"\g<1>3;", "deadlock", "try_wait"),
    Fault(
        "hopper-multicast",
        HOPPER,
        r"mov\.(b|u)16\s+(%rs\d+), 3;",
        0,
        r"mov.u16 \g<2>, 1;",
        "deadlock",
        "try_wait",
    ),
    Fault("descriptor-count", DESCRIPTOR, INIT, 0, r"\g<1>3;", "deadlock", "try_wait"),
    # fences removed
    Fault(
        "hopper-proxy-fence", HOPPER, PROXY, 0, "", "missing-proxy-fence", "bulk.tensor.2d.global"
    ),
    Fault(
        "hopper-init-fence",
        HOPPER,
        r"fence\.mbarrier_init[^;]*;",
        0,
        "",
        "missing-fence",
        "bulk.tensor|mbarrier",
    ),
    Fault("hopper-mma-fence", HOPPER, r"wgmma\.fence[^;]*;", 0, "", "missing-fence", "wgmma"),
    Fault("lora90-mma-fence", LORA_90, r"wgmma\.fence[^;]*;", 2, "", "missing-fence", "wgmma"),
    Fault("lora90-proxy-fence", LORA_90, PROXY, 0, "", "missing-proxy-fence", "wgmma"),
    Fault("lora90-tail-fence", LORA_90, PROXY, 1, "", "missing-proxy-fence", "wgmma"),
    Fault("warps-store-fence", WARPS, PROXY, 2, "", "missing-proxy-fence", "bulk.tensor.2d.global"),
    Fault(
        "relay-release",
        RELAY,
        r"red\.release\.gpu",
        0,
        "red.relaxed.gpu",
        "global-race",
        "ld.global.f32",
    ),
    Fault(
        "relay-acquire",
        RELAY,
        r"ld\.acquire\.gpu",
        0,
        "ld.relaxed.gpu",
        "global-race",
        "ld.global.f32",
    ),
    # bounds flipped
    Fault("tile-load-bound", TILE, r"setp\.lt\.s32", 1, "setp.le.s32", "out-of-bounds", "cp.async"),
    Fault(
        "tile-store-bound", TILE, r"setp\.ge\.s32", 3, "setp.gt.s32", "out-of-bounds", "st.global"
    ),
    Fault(
        "lora80-row-bound", LORA_80, r"setp\.lt\.s32", 0, "setp.le.s32", "out-of-bounds", "cp.async"
    ),
    Fault(
        "gradient-bound", GRADIENT, r"setp\.lt\.s32", 0, "setp.le.s32", "out-of-bounds", "ld.global"
    ),
    Fault("sum-bound", SUM, r"setp\.lt\.s32", 0, "setp.le.s32", "out-of-bounds", "ld.global"),
    # layouts
    Fault("tile-swizzle", TILE, r"xor\.b32", 0, "or.b32", "uninitialised", "ldmatrix"),
    Fault("hopper-swizzle", HOPPER, r"xor\.b32", 0, "or.b32", "race", "stmatrix"),
    Fault("lora90-swizzle", LORA_90, r"xor\.b32", 0, "or.b32", "uninitialised", "wgmma"),
]

NUMBERS = [
    Fault("gradient-trans", GRADIENT, r"\.trans\.", 0, ".", "", ""),
    Fault("gradient-trans-later", GRADIENT, r"\.trans\.", 5, ".", "", ""),
    Fault("lora80-swizzle-read", LORA_80, r"xor\.b32", 2, "or.b32", "", ""),
    Fault("hopper-descriptor", HOPPER, "4611686293305294848", 0, "4611686293305294849", "", ""),
    Fault(
        "hopper-accumulate",
        HOPPER,
        r"setp\.ne\.b32(\s+p,[^;]*), 0;",
        0,
        r"setp.eq.b32\g<1>, 0;",
        "",
        "",
    ),
]

EQUIVALENT = [
    # `red.release` of one thread after a block barrier is cumulative: it covers the others' stores
    Fault("relay-threadfence", RELAY, r"membar\.gl;|fence\.acq_rel\.gpu;", 0, "", "", ""),
    # the loop's last waits covered every group with data; the groups after that are empty
    Fault("tile-wait-all", TILE, r"cp\.async\.wait_all;", 0, "", "", ""),
    # before the first wait of the loop there is a barrier already
    Fault("lora80-first-barrier", LORA_80, BARRIER, 0, "", "", ""),
    # between accumulators of the same shape no wgmma.fence is asked for, and the only other
    # registers of these wgmmas were fenced before
    Fault("lora90-second-mma-fence", LORA_90, r"wgmma\.fence[^;]*;", 1, "", "", ""),
    Fault("hopper-second-mma-fence", HOPPER, r"wgmma\.fence[^;]*;", 1, "", "", ""),
    Fault("hopper-third-mma-fence", HOPPER, r"wgmma\.fence[^;]*;", 2, "", "", ""),
    # the warpgroup's own wgmma.wait_group precedes it: all four warps are done reading
    Fault("hopper-epilogue-barrier", HOPPER, BARRIER, 0, "", "", ""),
]


def mutated(fault: Fault) -> str:
    """The fixture with the fault; of files with several kernels only the one in question."""
    text = fixture(fault.case.fixture)
    name = fault.case.options.get("kernel", "")
    entry = re.search(rf"\.entry {name}\w*\(", text)
    assert entry is not None
    end = text.find(".entry", entry.end())
    return with_fault(text, fault.pattern, fault.nth, fault.new, entry.start(), end)


@pytest.mark.parametrize("fault", TEXT, ids=lambda fault: fault.name)
def test_fault_is_found_at_its_place(fault: Fault) -> None:
    report = fault.case.run(fault.schedule, mutated(fault)).report
    found = [f for f in report.findings if f.kind == fault.kind and re.search(fault.place, f.text)]
    assert found, f"found {report.findings}"
    assert all(f.line > 0 and re.match(r"[\w.]+:\d+$", f.source) for f in found)


@pytest.mark.parametrize("fault", NUMBERS, ids=lambda fault: fault.name)
def test_fault_shows_in_the_numbers(fault: Fault) -> None:
    assert fault.case.run(fault.schedule, mutated(fault)).error > 10 * fault.case.tolerance


@pytest.mark.parametrize("fault", EQUIVALENT, ids=lambda fault: fault.name)
def test_equivalent_change_is_not_reported(fault: Fault) -> None:
    text = mutated(fault)
    for schedule in EVERY_SCHEDULE:
        outcome = fault.case.run(schedule, text)
        assert outcome.report.ok and outcome.error <= fault.case.tolerance


def test_there_are_enough_faults() -> None:
    kernels = {(f.case.fixture, f.case.options.get("kernel")) for f in TEXT}
    assert len(TEXT) >= 40 and len(kernels) >= 6


def test_the_page_lists_all_faults() -> None:
    page = Path(__file__).parents[2] / "docs" / "gpu-without-gpu.md"
    assert table() in page.read_text(), "python -m tests.ptx_emulator.fault_list prints the list"
