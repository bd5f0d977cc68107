"""Seeded faults in the sm_90a matmul: each is found where it is, by instruction and source line.

A fault changes one instruction of the compiled kernel. `FINDINGS` must be reported as `kind` at an
instruction that matches `place` in one of `files`; `NUMBERS` break no rule of the machine and show
in the result; `EQUIVALENT` changes are those that no schedule of the emulator can tell.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from tests.ptx_emulator import EVERY_SCHEDULE, TOGETHER, Schedule
from tests.ptx_emulator.testing import with_fault

from .sm90 import Case, kernel_text

LATE = Schedule("reversed", "late")
SLOW = Schedule("reversed", "late", slow_block=0)
LAYER = Case(200, ((264, 136, 16),))
LONG = Case(
    100, ((264, 392, 16),), cluster=1, clusters=1
)  # more blocks of the contraction than stages
PAIR = LONG.but(cluster=2)
DX = LAYER.but(direction="dx")
DROPOUT = LONG.but(p=0.3)
MASKED = LONG.but(direction="dx", p=0.3)
SPLIT = LONG.but(split=True, bias=True)

WAIT = r"mbarrier\.try_wait[^;]*;\s*selp\.u32 (%r\d+), 1, 0, done;"
RETRY = r"(mbarrier\.try_wait[^;]*;\s*selp\.u32 %r\d+, 1, 0, done;.*?)@%p\d+ bra\s[^;]*;"
EXPECT = r"(expect_tx[^;]*,\s*)\S+;"
RELEASE = r"mbarrier\.arrive\.release\.cluster[^;]*;"
WAIT_ONE = r"wgmma\.wait_group\.sync\.aligned\s+1;"
WAIT_ALL = r"wgmma\.wait_group\.sync\.aligned\s+0;"
FENCE = r"wgmma\.fence\.sync\.aligned;"
CLUSTER = r"barrier\.cluster\.arrive\.aligned;.*?barrier\.cluster\.wait\.aligned;"
INIT = r"(mbarrier\.init\S*\s+\[[^\]]*\],\s*)\S+;"
ANNOUNCE = r"(st\.shared::cluster[^;]*;)(.*?)(mbarrier\.arrive\.release\.cluster[^;]*;)"
LOAD, STORE = "bulk.tensor.2d.shared", "bulk.tensor.2d.global"


class Fault(NamedTuple):
    """The `nth` match of `pattern` becomes `new`."""

    name: str
    case: Case
    pattern: str
    nth: int
    new: str
    kind: str = ""
    place: str = ""
    files: str = ""
    schedule: Schedule = TOGETHER


FINDINGS = [
    # bytes that a stage waits for
    Fault("main-expects-less", LAYER, EXPECT, 0, r"\g<1>40960;", "in-flight", "wgmma", "wgmma"),
    Fault("main-expects-more", LAYER, EXPECT, 0, r"\g<1>57344;", "deadlock", "try_wait", "ptx"),
    Fault("shrink-expects-less", LAYER, EXPECT, 2, r"\g<1>16384;", "in-flight", "wgmma", "wgmma"),
    # waits taken away: the consumer's for bytes, the producer's for a free stage and for the tile
    Fault(
        "tile-unread", LAYER, WAIT, 0, r"mov.u32 \g<1>, 1;", "uninitialised|race", "ld.shared|wgmma"
    ),
    Fault(
        "full-wait", LONG, WAIT, 1, r"mov.u32 \g<1>, 1;", "in-flight|uninit", "wgmma", "wgmma", LATE
    ),
    Fault("rank-wait", LONG, WAIT, 2, r"mov.u32 \g<1>, 1;", "deadlock", "try_wait", "ptx"),
    Fault("empty-wait", LONG, WAIT, 8, r"mov.u32 \g<1>, 1;", "race|in-flight", LOAD, "ptx", SLOW),
    Fault(
        "announced-wait",
        PAIR,
        WAIT,
        7,
        r"mov.u32 \g<1>, 1;",
        "uninit|race",
        "ld.shared",
        "ptx",
        SLOW,
    ),
    # waits that do not ask again when their time limit has passed
    Fault("tile-retry", LAYER, RETRY, 0, r"\g<1>", "uninit", "ld.shared", "ptx", LATE),
    Fault("full-retry", LONG, RETRY, 1, r"\g<1>", "in-flight", "wgmma", "wgmma", LATE),
    Fault("rank-retry", LAYER, RETRY, 2, r"\g<1>", "in-flight", "wgmma", "wgmma", LATE),
    Fault("shrink-retry", LONG, RETRY, 4, r"\g<1>", "in-flight", "wgmma", "wgmma", LATE),
    Fault("announced-retry", PAIR, RETRY, 7, r"\g<1>", "uninit", "ld.shared", "ptx", LATE),
    Fault("empty-retry", PAIR, RETRY, 8, r"\g<1>", "in-flight", LOAD, "ptx", LATE),
    # the ring
    Fault(
        "released-early",
        LONG,
        WAIT_ONE,
        0,
        "wgmma.wait_group.sync.aligned 2;",
        "in-flight|race",
        LOAD,
        "ptx",
        LATE,
    ),
    Fault("release-dropped", LONG, RELEASE, 0, "", "deadlock", "try_wait", "ptx"),
    Fault("last-release-dropped", LONG, RELEASE, 1, "", "deadlock", "try_wait", "ptx"),
    Fault("empty-count", PAIR, INIT, 1, r"\g<1>5;", "deadlock", "try_wait", "ptx"),
    Fault("full-count", LONG, INIT, 0, r"\g<1>2;", "deadlock", "try_wait", "ptx"),
    Fault(
        "init-fence",
        PAIR,
        r"fence\.mbarrier_init[^;]*;",
        0,
        "",
        "missing-fence",
        "bulk|mbarrier",
        "ptx",
    ),
    Fault(
        "init-barrier", PAIR, CLUSTER, 0, "", "race|mbarrier|uninit", "mbarrier|bulk|st.shared", ""
    ),
    Fault(
        "multicast-to-one",
        PAIR,
        r"multicast::cluster(.*?), %rs\d+;",
        0,
        r"multicast::cluster\g<1>, 1;",
        "deadlock",
        "try_wait",
        "ptx",
    ),
    # accumulators
    Fault("wgmma-fence", SPLIT, FENCE, 0, "", "missing-fence", "wgmma", "wgmma"),
    Fault("accumulator-unwaited", SPLIT, WAIT_ALL, 2, "", "in-flight", "fma", "epilogue", LATE),
    Fault(
        "accumulates-garbage",
        SPLIT,
        r"setp\.ne\.b32( add,[^;]*), 0;",
        0,
        r"setp.eq.b32\g<1>, 0;",
        "uninit",
        "wgmma",
        "wgmma",
    ),
    # from one block to another
    Fault(
        "s-posted-unwritten",
        LAYER,
        r"cp\.async\.bulk\.wait_group 0;",
        0,
        "",
        "global-race",
        LOAD,
        "ptx",
    ),
    Fault(
        "s-posted-by-one-warp", LAYER, r"bar\.sync[^;]*;", -1, "", "global-race", LOAD, "ptx", SLOW
    ),
    Fault(
        "flag-relaxed",
        LAYER,
        r"red\.release\.gpu",
        0,
        "red.relaxed.gpu",
        "global-race",
        LOAD,
        "ptx",
    ),
    Fault(
        "tile-after-its-arrival",
        PAIR,
        ANNOUNCE,
        0,
        r"\g<2>\g<3>\g<1>",
        "race|uninit",
        "ld.shared",
        "ptx",
        SLOW,
    ),
    # the epilogue
    Fault(
        "store-fence",
        LONG,
        r"fence\.proxy\.async\.shared::cta;",
        0,
        "",
        "missing-proxy-fence",
        STORE,
        "ptx",
    ),
    Fault("stmatrix-swizzle", LONG, r"xor\.b32", 2, "or.b32", "race", "stmatrix", "ptx"),
    Fault("store-warp-barrier", LONG, r"bar\.warp\.sync\s+-1;", 2, "", "race", STORE, "ptx"),
    Fault(
        "staging-reused",
        LAYER.but(split=True),
        r"cp\.async\.bulk\.wait_group\.read 1;",
        2,
        "",
        "in-flight|race",
        "stmatrix",
        "",
        LATE,
    ),
    Fault(
        "stores-left-over",
        SPLIT.but(sizes=((256, 136, 16),)),
        r"cp\.async\.bulk\.wait_group 0;",
        -1,
        "",
        "leftover",
        STORE,
        "ptx",
        LATE,
    ),
    # dropout
    Fault(
        "mask-reads-released",
        DROPOUT,
        r"bar\.sync[^;]*;",
        0,
        "",
        "race|in-flight",
        LOAD,
        "ptx",
        SLOW,
    ),
]

NUMBERS = [
    Fault("ldmatrix-swizzle", DROPOUT, r"xor\.b32(?=(?:(?!xor).)*ldmatrix)", 0, "or.b32"),
    Fault("descriptor-stride", LONG, "4611686293305360384", 0, "4611686297600327680"),
    Fault("descriptor-step", LONG, r"(add\.s32\s+%r\d+, %r\d+, )32;", 0, r"\g<1>64;"),
    Fault("mn-major-forgotten", DX, r"(wgmma\.mma_async[^;]*), 1;", 0, r"\g<1>, 0;"),
    Fault("mn-major-leading", DX, "4611686293338849280", 0, "4611686293305360384"),
    Fault("philox-multiplier", DROPOUT, "3528531795", 0, "3528531797"),
    Fault("philox-multiplier-dx", MASKED, "3528531795", 0, "3528531797"),
    Fault(
        "scale-of-s", LONG, r"ld\.param\.f32\s+(%f\d+), [^;]*;", 0, r"mov.f32 \g<1>, 0f3F800000;"
    ),
    Fault("flag-kept", LAYER, r"st\.relaxed[^;]*;", 1, ""),
]

EQUIVALENT = [
    # s is written by tensor stores that were waited for: no ordinary store is handed over
    Fault("writer-proxy-fence", LAYER, r"fence\.proxy\.async\.global;", 0, ""),
    Fault("reader-proxy-fence", LAYER, r"fence\.proxy\.async\.global;", 1, ""),
]


def mutated(fault: Fault) -> str:
    return with_fault(kernel_text(fault.case.kernel), fault.pattern, fault.nth, fault.new)


@pytest.mark.parametrize("fault", FINDINGS, ids=lambda fault: fault.name)
def test_fault_is_found_at_its_place(fault: Fault) -> None:
    report = fault.case.run(fault.schedule, mutated(fault)).report
    found = [
        f
        for f in report.findings
        if re.search(fault.kind, f.kind) and re.search(fault.place, f.text)
    ]
    assert found, f"found {report.findings}"
    assert all(re.match(rf"{fault.files}\w*\.cuh:\d+$", f.source) for f in found)


@pytest.mark.parametrize("fault", NUMBERS, ids=lambda fault: fault.name)
def test_fault_shows_in_the_numbers(fault: Fault) -> None:
    outcome = fault.case.run(fault.schedule, mutated(fault))
    assert outcome.report.ok and (outcome.wrong() or outcome.workspace.any())


@pytest.mark.parametrize("fault", EQUIVALENT, ids=lambda fault: fault.name)
def test_equivalent_change_is_not_reported(fault: Fault) -> None:
    for schedule in EVERY_SCHEDULE[:3]:
        fault.case.run(schedule, mutated(fault)).check()
