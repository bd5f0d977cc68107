"""Checks on memory: bounds, alignment, initialisation, races; and loads, stores, atomics."""

from __future__ import annotations

import numpy as np
import pytest

from . import EVERY_SCHEDULE, Schedule, Struct, Uninitialised, run
from .harness import findings, kernel

ADDRESS = "mul.wide.u32 %w, %t, 4; add.s64 %d1, %a0, %w;"


def words(n: int = 32) -> np.ndarray:
    return np.arange(n, dtype=np.uint32)


def only(report, kind: str):
    assert report.kinds() == {kind}, report.findings
    return report.findings[0]


# ---- global memory -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "access",
    ["ld.global.b32 %r1, [%d1];", "st.global.b32 [%d1], %t;", "red.global.add.u32 [%d1], 1;"],
)
def test_one_word_past_the_end(access: str) -> None:
    finding = only(findings(ADDRESS + access, words(31)), "out-of-bounds")
    assert "byte 124 of buffer 0 (124 bytes)" in finding.message
    assert "thread 31" in finding.message and access.split(";")[0] == finding.text


def test_before_the_start() -> None:
    only(findings("ld.global.b32 %r1, [%a0+-4];", words()), "out-of-bounds")


def test_misaligned_vector() -> None:
    report = findings("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%a0+8];", words())
    assert "16-byte load" in only(report, "misaligned").message


def test_uninitialised_buffer() -> None:
    body = "st.global.b32 [%a0], 1; ld.global.v2.b32 {%r1, %r2}, [%a0];"
    only(findings(body, Uninitialised(words()), threads=1), "uninitialised")
    assert findings(
        "st.global.v2.b32 [%a0], {1, 2}; ld.global.v2.b32 {%r1, %r2}, [%a0];",
        Uninitialised(words()),
        threads=1,
    ).ok


def test_uninitialised_register() -> None:
    only(findings("add.s32 %r1, %r2, 1;"), "uninitialised")
    assert findings("mov.b32 %r1, %r2;").ok, "copying an undefined value is no use of it"


def test_partly_written_register() -> None:
    body = "setp.lt.u32 %p1, %t, 16; @%p1 mov.u32 %r1, 5; add.s32 %r2, %r1, 1;"
    assert "thread 16 and 15 more" in only(findings(body), "uninitialised").message


def test_vectors_and_narrow_types() -> None:
    x = np.array([0x80FF, 0x1234, 7, 8], np.uint16)
    out = np.zeros(4, np.uint32)
    body = (
        "ld.global.s8 %r1, [%a0]; ld.global.u8 %r2, [%a0+1];"
        "ld.global.v4.b16 {%h1, %h2, %h3, %h4}, [%a0]; cvt.u32.u16 %r3, %h2;"
        "ld.global.s16 %r4, [%a0]; st.global.v4.b32 [%a1], {%r1, %r2, %r3, %r4};"
    )
    assert findings(body, x, out, threads=1).ok
    assert out.view(np.int32).tolist() == [-1, 0x80, 0x1234, 0x80FF - 0x10000]


def test_parameters_by_value() -> None:
    out = np.zeros(3, np.uint32)
    text = kernel(
        "ld.param.u64 %d1, [p]; ld.param.u32 %r1, [p+8]; ld.param.f32 %r2, [p+12];"
        "st.global.v2.b32 [%d1], {%r1, %r2};",
        0,
    ).replace("k()", "k(.param .align 8 .b8 p[16])")
    run(text, "k", 1, 1, [Struct(out, np.int32(-1), np.float32(1.0))]).check()
    assert out.tolist() == [2**32 - 1, 0x3F800000, 0]


def test_generic_addresses_reach_every_space() -> None:
    out = np.zeros(2, np.uint32)
    body = (
        "mov.u64 %d1, smem; cvta.shared.u64 %d2, %d1; st.b32 [%d2], 7; ld.shared.b32 %r1, [smem];"
        "mov.u64 %d3, stack; cvta.local.u64 %d4, %d3; st.b32 [%d4+4], 9;"
        "ld.local.b32 %r2, [stack+4];"
        "cvta.to.global.u64 %d5, %a0; st.v2.b32 [%d5], {%r1, %r2};"
    )
    body = ".local .align 8 .b8 stack[8];" + body
    assert findings(body, out, threads=1, shared=16).ok
    assert out.tolist() == [7, 9]


def test_module_variables() -> None:
    out = np.zeros(2, np.uint32)
    report = findings(
        "ld.const.b32 %r1, [table+4]; ld.global.b32 %r2, [plain];"
        "st.global.v2.b32 [%a0], {%r1, %r2};",
        out,
        threads=1,
        declarations=".const .align 4 .b32 table[2] = {5, 6};.global .align 4 .u32 plain = 8;",
    )
    assert report.ok and out.tolist() == [6, 8]


# ---- shared memory -------------------------------------------------------------------------

SLOT = "shl.b32 %r1, %t, 2; mov.u32 %r2, smem; add.s32 %r1, %r1, %r2;"


def test_shared_bounds_and_initialisation() -> None:
    only(findings(SLOT + "st.shared.b32 [%r1], 1;", shared=64), "out-of-bounds")
    only(findings(SLOT + "ld.shared.b32 %r3, [%r1];", shared=128), "uninitialised")


def exchange(barrier: str) -> str:
    """Every thread stores its number and reads its neighbour's."""
    return (
        SLOT + f"st.shared.b32 [%r1], %t; {barrier} xor.b32 %r4, %r1, 4; ld.shared.b32 %r3, [%r4];"
    )


def test_race_inside_a_warp_and_across_warps() -> None:
    finding = only(findings(exchange(""), shared=128), "race")
    assert "st.shared.b32" in finding.message and finding.text.startswith("ld.shared")
    assert findings(exchange("bar.warp.sync -1;"), shared=128).ok
    across = exchange("bar.warp.sync -1;").replace("%r1, 4", "%r1, 128")
    only(findings(across, threads=64, shared=256), "race")
    assert findings(across.replace("bar.warp.sync -1", "bar.sync 0"), threads=64, shared=256).ok


def test_write_after_read() -> None:
    body = (
        SLOT + "st.shared.b32 [%r1], %t; bar.sync 0; xor.b32 %r4, %r1, 128;"
        "ld.shared.b32 %r3, [%r4]; {barrier} st.shared.b32 [%r1], 9;"
    )
    only(findings(body.replace("{barrier}", ""), threads=64, shared=256), "race")
    assert findings(body.replace("{barrier}", "bar.sync 0;"), threads=64, shared=256).ok


def test_same_value_stores_are_no_race() -> None:
    assert findings("st.shared.b32 [smem], 5;", threads=64, shared=16).ok
    only(findings("st.shared.b32 [smem], %t;", threads=32, shared=16), "race")


def test_neighbouring_bytes_do_not_conflict() -> None:
    body = "mov.u32 %r2, smem; add.s32 %r1, %t, %r2; mov.u16 %h1, 3; st.shared.b8 [%r1], %h1;"
    assert findings(body, threads=64, shared=64).ok


# ---- atomics -------------------------------------------------------------------------------

ATOMICS = [
    ("add.u32", 10, "1", 42),
    ("min.s32", -1, "%t", -1),
    ("max.u32", 3, "%t", 31),
    ("and.b32", 255, "0xF0", 0xF0),
    ("or.b32", 1, "6", 7),
    ("xor.b32", 0, "1", 0),
    ("exch.b32", 1, "9", 9),
    ("inc.u32", 0, "4", 2),
    ("dec.u32", 3, "3", 3),
]


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("form", "start", "operand", "expected"), ATOMICS, ids=lambda v: str(v))
def test_atomics(form: str, start: int, operand: str, expected: int, space: str) -> None:
    """32 lanes on one word: inc wraps 0..4, so 32 steps end at 32 mod 5."""
    x = np.array([start], np.int32).view(np.uint32)
    at = "[%a0]" if space == "global" else "[smem]"
    body = f"red.{space}.{form} {at}, {operand};"
    if space == "shared":
        body = (
            f"st.shared.b32 [smem], {start}; bar.sync 0; {body} bar.sync 0;"
            "ld.shared.b32 %r1, [smem]; st.global.b32 [%a0], %r1;"
        )
    findings(body, x, shared=16).check()
    assert x.view(np.int32).tolist() == [expected]


def test_atom_returns_the_old_value() -> None:
    x, out = np.zeros(1, np.uint32), np.zeros(32, np.uint32)
    body = (
        "atom.global.gpu.relaxed.add.u32 %r1, [%a0], 2; mul.wide.u32 %w, %t, 4;"
        "add.s64 %d1, %a1, %w; st.global.b32 [%d1], %r1;"
    )
    findings(body, x, Uninitialised(out)).check()
    assert sorted(out.tolist()) == list(range(0, 64, 2))


def test_compare_and_swap() -> None:
    x, out = np.array([5], np.uint32), np.zeros(2, np.uint32)
    body = (
        "atom.global.cas.b32 %r1, [%a0], 5, 8; atom.global.cas.b32 %r2, [%a0], 5, 9;"
        "st.global.v2.b32 [%a1], {%r1, %r2};"
    )
    findings(body, x, out, threads=1).check()
    assert x.tolist() == [8] and out.tolist() == [5, 8]


def test_float_atomics() -> None:
    x = np.zeros(2, np.float32)
    findings("red.global.gpu.relaxed.add.f32 [%a0], 0f3F000000;", x.view(np.uint32)).check()
    assert x[0] == 16.0
    half = np.array([0x3C003C00], np.uint32)
    findings("red.global.gpu.relaxed.add.noftz.f16x2 [%a0], 0x40003C00;", half, threads=1).check()
    assert half.tolist() == [0x42004000]
    vector = np.zeros(4, np.float32)
    findings(
        "atom.global.gpu.relaxed.add.v4.f32 {%r1,%r2,%r3,%r4}, [%a0],"
        "{0f3F800000,0f40000000,0f40400000,0f40800000};",
        vector.view(np.uint32),
        threads=2,
    ).check()
    assert vector.tolist() == [2, 4, 6, 8]


# ---- between blocks ------------------------------------------------------------------------


def handoff(post: str, wait: str) -> str:
    """Block 0 writes word 0 and posts word 1; block 1 waits and reads."""
    return f"""mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, 0; @%p1 bra READ;
        st.global.b32 [%a0], 7; {post} bra DONE;
        READ: {wait} setp.eq.u32 %p2, %r2, 0; @%p2 bra READ; {{fence}}
        ld.global.b32 %r3, [%a0]; st.global.b32 [%a0+8], %r3; DONE:"""


RELEASE, ACQUIRE = (
    "st.release.gpu.global.b32 [%a0+4], 1;",
    "ld.acquire.gpu.global.b32 %r2, [%a0+4];",
)
FENCED = "fence.acq_rel.gpu; st.relaxed.gpu.global.b32 [%a0+4], 1;"
RELAXED = "ld.relaxed.gpu.global.b32 %r2, [%a0+4];"


@pytest.mark.parametrize(
    ("post", "wait", "fence", "ordered"),
    [
        (RELEASE, ACQUIRE, "", True),
        (FENCED, ACQUIRE, "", True),
        (RELEASE, RELAXED, "fence.acq_rel.gpu;", True),
        (RELEASE, RELAXED, "", False),
        ("st.relaxed.gpu.global.b32 [%a0+4], 1;", ACQUIRE, "", False),
        ("red.release.gpu.global.add.u32 [%a0+4], 1;", ACQUIRE, "", True),
        ("atom.acq_rel.gpu.global.inc.u32 %r9, [%a0+4], 5;", ACQUIRE, "", True),
        # scopes must include the other thread ("Morally strong operations")
        (RELEASE.replace("gpu", "cta"), ACQUIRE, "", False),
        (RELEASE, ACQUIRE.replace("gpu", "cta"), "", False),
        (FENCED.replace("rel.gpu", "rel.cta"), ACQUIRE, "", False),
        (FENCED.replace("relaxed.gpu", "relaxed.cta"), ACQUIRE, "", False),
        (RELEASE, RELAXED, "fence.acq_rel.cta;", False),
        ("fence.acq_rel.gpu; membar.cta; st.volatile.global.b32 [%a0+4], 1;", ACQUIRE, "", True),
    ],
)
def test_flags_between_blocks(post: str, wait: str, fence: str, ordered: bool) -> None:
    x = np.zeros(3, np.uint32)
    body = handoff(post, wait).replace("{fence}", fence)
    for schedule in EVERY_SCHEDULE:
        x[:] = 0
        report = findings(body, x, threads=1, grid=2, schedule=schedule)
        assert report.kinds() == (set() if ordered else {"global-race"})
        assert x[2] == 7


# The counter of a release sequence: every block adds, block 0 waits for all and resets it.
COUNT = """mov.u32 %r1, %ctaid.x; POST setp.ne.u32 %p1, %r1, 0; @%p1 bra DONE;
    READ: WAIT setp.ne.u32 %p2, %r2, 3; @%p2 bra READ; FENCE st.global.b32 [%a0], 0; DONE:"""
SEE, SEE_ACQUIRED = (f"ld.{order}.gpu.global.b32 %r2, [%a0];" for order in ("relaxed", "acquire"))


@pytest.mark.parametrize(
    ("post", "wait", "ordered"),
    [
        ("red.release.gpu.global.add.u32 [%a0], 1;", SEE_ACQUIRED, True),
        # a store that a strong load of the thread saw precedes what the thread does next
        ("red.relaxed.gpu.global.add.u32 [%a0], 1;", SEE, True),
        ("membar.gl; red.global.add.u32 [%a0], 1;", "ld.volatile.global.b32 %r2, [%a0];", True),
        ("atom.acq_rel.gpu.global.add.u32 %r9, [%a0], 1;", SEE_ACQUIRED, True),
        # nothing was seen: the count is taken for granted
        ("red.release.gpu.global.add.u32 [%a0], 1;", "mov.b32 %r2, 3;", False),
        ("red.relaxed.gpu.global.add.u32 [%a0], 1;", "mov.b32 %r2, 3;", False),
        # a scope that leaves the others out
        ("red.relaxed.cta.global.add.u32 [%a0], 1;", SEE, False),
    ],
)
def test_weak_store_after_a_counter(post: str, wait: str, ordered: bool) -> None:
    body = COUNT.replace("POST", post).replace("WAIT", wait).replace("FENCE", "")
    for schedule in EVERY_SCHEDULE:
        x = np.zeros(1, np.uint32)
        report = findings(body, x, threads=1, grid=3, schedule=schedule)
        # block 0's own addition sees the others' if it is the last
        seen = ordered or (schedule.slow_block == 0 and "cta" not in post)
        assert report.kinds() == (set() if seen else {"global-race"})
        assert x[0] == 0 or not ordered


def test_seeing_a_counter_says_nothing_of_what_came_before() -> None:
    """Relaxed: the counter itself may be stored to, the data behind it may not be read."""
    data = "mul.wide.u32 %w, %r1, 4; add.s64 %d1, %a1, %w; st.global.b32 [%d1], 7;"
    body = COUNT.replace("WAIT", SEE)
    body = body.replace("FENCE", "ld.global.b32 %r3, [%a1+4];")
    for order, kinds in (("relaxed", {"global-race"}), ("release", {"global-race"})):
        text = body.replace("POST", f"{data} red.{order}.gpu.global.add.u32 [%a0], 1;")
        report = findings(text, np.zeros(1, np.uint32), np.zeros(3, np.uint32), threads=1, grid=3)
        assert report.kinds() == kinds
    text = text.replace("ld.relaxed", "ld.acquire")
    findings(text, np.zeros(1, np.uint32), np.zeros(3, np.uint32), threads=1, grid=3).check()


def test_the_counter_may_be_reset_by_another_thread_of_the_block() -> None:
    """Thread 0 sees the count, a barrier later thread 40 resets it."""
    body = """mov.u32 %r1, %ctaid.x; setp.eq.u32 %p3, %t, 0;
        @%p3 red.relaxed.gpu.global.add.u32 [%a0], 1; setp.ne.u32 %p1, %r1, 0; @%p1 bra DONE;
        @!%p3 bra MEET; READ: ld.relaxed.gpu.global.b32 %r2, [%a0]; setp.ne.u32 %p2, %r2, 3;
        @%p2 bra READ; MEET: BARRIER setp.eq.u32 %p4, %t, 40; @%p4 st.global.b32 [%a0], 0; DONE:"""
    for barrier, kinds in (("bar.sync 0;", set()), ("", {"global-race"})):
        text = body.replace("BARRIER", barrier)
        report = findings(
            text, np.zeros(1, np.uint32), threads=64, grid=3, schedule=Schedule("reversed")
        )
        assert report.kinds() == kinds


def test_block_scope_is_enough_within_a_block() -> None:
    """Warp 1 hands a word to warp 0 with scope .cta."""
    body = """setp.ge.u32 %p1, %t, 32; @%p1 bra SET; setp.ne.u32 %p3, %t, 0; @%p3 bra DONE;
        SPIN: ld.acquire.cta.global.b32 %r2, [%a0]; setp.eq.u32 %p2, %r2, 0; @%p2 bra SPIN;
        ld.global.b32 %r3, [%a0+4]; bra DONE;
        SET: setp.ne.u32 %p3, %t, 32; @%p3 bra DONE; st.global.b32 [%a0+4], 5; POST DONE:"""
    posts = ("st.release.cta.global.b32 [%a0], 1;", "membar.cta; st.volatile.global.b32 [%a0], 1;")
    for schedule in EVERY_SCHEDULE:
        for post in posts:
            text = body.replace("POST", post)
            findings(text, np.zeros(2, np.uint32), threads=64, schedule=schedule).check()
        text = body.replace("POST", "st.relaxed.cta.global.b32 [%a0], 1;")
        only(findings(text, np.zeros(2, np.uint32), threads=64, schedule=schedule), "global-race")


@pytest.mark.parametrize("cluster", [False, True], ids=["mbarrier", "barrier.cluster"])
def test_what_one_thread_acquired_reaches_the_others(cluster: bool) -> None:
    """Thread 0 sees another block's flag; the others learn of it through a barrier."""
    if cluster:
        meet = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    else:
        meet = """mbarrier.arrive.shared::cta.b64 _, [smem];
            MEET: mbarrier.try_wait.parity.shared::cta.b64 %p4, [smem], 0; @!%p4 bra MEET;"""
    body = f"""setp.eq.u32 %p2, %t, 0; @%p2 mbarrier.init.shared::cta.b64 [smem], 64; bar.sync 0;
        mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, 0; @%p1 bra READ; @!%p2 bra DONE;
        st.global.b32 [%a0], 7; {RELEASE} bra DONE;
        READ: @!%p2 bra WAITED; SPIN: {ACQUIRE} setp.eq.u32 %p3, %r2, 0; @%p3 bra SPIN;
        WAITED: {{meet}} ld.global.b32 %r3, [%a0]; DONE:"""
    body = body if not cluster else body.replace("DONE;", "LEAVE;") + "bra END; LEAVE: END:"
    x = np.zeros(2, np.uint32)
    for schedule in EVERY_SCHEDULE:
        x[:] = 0
        text = body.replace("{meet}", meet)
        findings(text, x, threads=64, grid=2, shared=16, schedule=schedule).check()
        x[:] = 0
        report = findings(
            body.replace("{meet}", ""), x, threads=64, grid=2, shared=16, schedule=schedule
        )
        assert report.kinds() == {"global-race"}


def test_blocks_that_store_to_the_same_place() -> None:
    only(
        findings("mov.u32 %r1, %ctaid.x; st.global.b32 [%a0], %r1;", words(), threads=1, grid=2),
        "global-race",
    )


# ---- cp.async ------------------------------------------------------------------------------

COPY = SLOT + ADDRESS + "cp.async.ca.shared.global [%r1], [%d1], 4; cp.async.commit_group;"


def test_copy_needs_its_wait() -> None:
    for landing in ("early", "late"):
        schedule = Schedule(landing=landing)
        body = COPY + "ld.shared.b32 %r3, [%r1]; cp.async.wait_all;"
        assert "in-flight" in findings(body, words(), shared=128, schedule=schedule).kinds()
        body = COPY + "cp.async.wait_group 0; ld.shared.b32 %r3, [%r1];"
        assert findings(body, words(), shared=128, schedule=schedule).ok


def test_wait_covers_only_the_older_groups() -> None:
    body = (
        COPY + "add.s32 %r5, %r1, 128; cp.async.ca.shared.global [%r5], [%d1], 4;"
        "cp.async.commit_group; cp.async.wait_group 1; ld.shared.b32 %r3, [{at}];"
        "cp.async.wait_all;"
    )
    assert findings(body.replace("{at}", "%r1"), words(), shared=256).ok
    only(findings(body.replace("{at}", "%r5"), words(), shared=256), "in-flight")


def test_short_source_is_zero_filled() -> None:
    out = np.ones(4, np.uint32)
    body = (
        "cp.async.cg.shared.global [smem], [%a0], 16, 8; cp.async.wait_all;"
        "ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [smem]; st.global.v4.b32 [%a1], {%r1,%r2,%r3,%r4};"
    )
    findings(body, np.array([5, 6, 7, 8], np.uint32), out, threads=1, shared=16).check()
    assert out.tolist() == [5, 6, 0, 0]


def test_copy_left_at_exit() -> None:
    only(findings(COPY, words(), shared=128), "leftover")


def test_copies_arrive_on_an_mbarrier() -> None:
    body = (
        SLOT
        + ADDRESS
        + """setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared::cta.b64 [smem+256], 32; bar.sync 0;
        createpolicy.fractional.L2::evict_first.b64 %d9;
        cp.async.ca.shared.global.L2::cache_hint [%r1], [%d1], 4, %d9;
        cp.async.mbarrier.arrive.noinc.shared.b64 [smem+256]; WAIT:
        mbarrier.try_wait.parity.shared::cta.b64 %p2, [smem+256], 0; @!%p2 bra WAIT;
        xor.b32 %r4, %r1, 124; ld.shared.b32 %r3, [%r4]; st.global.b32 [%d1], %r3;"""
    )
    # without .noinc the phase waits for the copies, but arrivals are counted apart
    counted = "mbarrier.arrive.shared.b64 _, [smem+256]; WAIT:"
    both = body.replace("noinc.", "").replace("WAIT:", counted)
    for schedule in EVERY_SCHEDULE:
        for text in (body, both):
            x = words()
            findings(text, x, shared=264, schedule=schedule).check()
            assert x.tolist() == list(range(31, -1, -1))
    report = findings(body.replace("noinc.", ""), words(), shared=264)
    assert "deadlock" in report.kinds()


def test_an_mbarrier_tracks_only_earlier_copies() -> None:
    """The second copy comes after `cp.async.mbarrier.arrive`: the phase says nothing of it."""
    body = (
        SLOT
        + ADDRESS
        + """setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared::cta.b64 [smem+256], 32; bar.sync 0;
        cp.async.ca.shared.global [%r1], [%d1], 4;
        cp.async.mbarrier.arrive.noinc.shared.b64 [smem+256];
        cp.async.ca.shared.global [%r1+128], [%d1], 4; WAIT:
        mbarrier.try_wait.parity.shared::cta.b64 %p2, [smem+256], 0; @!%p2 bra WAIT;
        ld.shared.b32 %r3, [%r1+AT]; cp.async.wait_all;"""
    )
    for schedule in EVERY_SCHEDULE:
        assert findings(body.replace("AT", "0"), words(), shared=264, schedule=schedule).ok
        late = findings(body.replace("AT", "128"), words(), shared=264, schedule=schedule)
        assert "in-flight" in late.kinds()
