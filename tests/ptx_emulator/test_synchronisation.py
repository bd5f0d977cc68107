"""Control flow, barriers, mbarriers, clusters and operations among lanes."""

from __future__ import annotations

import numpy as np
import pytest

from . import EVERY_SCHEDULE, TOGETHER, Schedule, Uninitialised, run
from .cases import Case
from .harness import findings, kernel

STORE = "mul.wide.u32 %w, %t, 4; add.s64 %d60, %a0, %w; st.global.b32 [%d60], %r1;"


def lanes(body: str, threads: int = 32, schedule: Schedule = TOGETHER) -> list[int]:
    """The value of %r1 in every thread after `body`."""
    out = np.zeros(threads, np.uint32)
    findings(
        body + STORE, Uninitialised(out), threads=threads, shared=512, schedule=schedule
    ).check()
    return out.tolist()


# ---- control flow --------------------------------------------------------------------------


def test_lanes_diverge_and_meet_again() -> None:
    body = """mov.u32 %r1, 0; setp.lt.u32 %p1, %t, 10; @%p1 bra SMALL; add.s32 %r1, %r1, 100;
        bra.uni JOIN; SMALL: add.s32 %r1, %r1, 1;
        JOIN: activemask.b32 %r2; setp.eq.u32 %p2, %r2, -1; @%p2 add.s32 %r1, %r1, 1000;"""
    assert lanes(body) == [1001] * 10 + [1100] * 22


def test_loops_with_different_trip_counts() -> None:
    body = """mov.u32 %r1, 0; AGAIN: add.s32 %r1, %r1, 3; setp.lt.u32 %p1, %r1, %t; @%p1 bra AGAIN;
        shfl.sync.idx.b32 %r2, %r1, 31, 31, -1; add.s32 %r1, %r1, %r2;"""
    assert lanes(body) == [max(3, -(-t // 3) * 3) + 33 for t in range(32)]


def test_jump_table() -> None:
    body = """and.b32 %r2, %t, 1; TABLE: .branchtargets EVEN, ODD; brx.idx %r2, TABLE;
        EVEN: mov.u32 %r1, 5; bra JOIN; ODD: mov.u32 %r1, 6; JOIN:"""
    assert lanes(body) == [5, 6] * 16


def test_trap_is_a_finding() -> None:
    assert findings("setp.eq.u32 %p1, %t, 3; @%p1 trap;").kinds() == {"trap"}


# ---- lanes of a warp -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("bfly.b32 %r1, %t, 1, 31", [t ^ 1 for t in range(32)]),
        ("idx.b32 %r1, %t, 5, 31", [5] * 32),
        ("up.b32 %r1, %t, 2, 0", [max(t - 2, t if t < 2 else 0) for t in range(32)]),
        ("down.b32 %r1, %t, 2, 31", [t + 2 if t < 30 else t for t in range(32)]),
        # segments of eight lanes: c = ((32 - 8) << 8) | 31
        ("down.b32 %r1, %t, 1, 0x181f", [t + 1 if t % 8 < 7 else t for t in range(32)]),
        ("idx.b32 %r1, %t, 3, 0x181f", [t // 8 * 8 + 3 for t in range(32)]),
    ],
)
def test_shfl(form: str, expected: list[int]) -> None:
    assert lanes(f"shfl.sync.{form}, -1;") == expected


def test_shfl_predicate_and_missing_lanes() -> None:
    body = "shfl.sync.up.b32 %r2|%p1, %t, 1, 0, -1; selp.b32 %r1, 1, 0, %p1;"
    assert lanes(body) == [0] + [1] * 31
    half = "setp.lt.u32 %p1, %t, 16; @%p1 shfl.sync.bfly.b32 %r1, %t, 16, 31, 0xffff;"
    assert findings(half).kinds() == {"divergence"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("setp.lt.u32 %p1, %t, 4; vote.sync.ballot.b32 %r1, %p1, -1;", 15),
        ("setp.lt.u32 %p1, %t, 4; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2;", 1),
        ("setp.lt.u32 %p1, %t, 4; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2;", 0),
        ("redux.sync.add.u32 %r1, %t, -1;", 496),
        ("redux.sync.max.s32 %r1, %t, -1;", 31),
        ("redux.sync.xor.b32 %r1, %t, -1;", 0),
        ("elect.sync %r1|%p1, -1;", 0),
    ],
)
def test_warp_wide_results(body: str, expected: int) -> None:
    assert lanes(body) == [expected] * 32


def test_elect_chooses_one_lane_of_the_mask() -> None:
    body = "elect.sync %r2|%p1, -1; selp.b32 %r1, 1, 0, %p1;"
    assert sum(lanes(body)) == 1


def test_match() -> None:
    assert (
        lanes("and.b32 %r2, %t, 1; match.any.sync.b32 %r1, %r2, -1;")
        == [0x55555555, 0xAAAAAAAA] * 16
    )


# ---- barriers of a block -------------------------------------------------------------------


def test_named_barrier_counts() -> None:
    """Warp 0 waits, warp 1 only arrives: both of 64 threads are counted."""
    body = "setp.lt.u32 %p1, %t, 32; @%p1 bar.sync 3, 64; @!%p1 bar.arrive 3, 64;"
    for schedule in EVERY_SCHEDULE:
        assert findings(body, threads=64, schedule=schedule).ok
    missing = "setp.lt.u32 %p1, %t, 32; @%p1 bar.sync 3, 64;"
    report = findings(missing, threads=64)
    assert report.kinds() == {"deadlock"} and "barrier 3 (64 threads)" in str(report.findings[0])
    uneven = "setp.lt.u32 %p1, %t, 32; @%p1 bar.sync 3, 64; @!%p1 bar.sync 3, 96;"
    assert findings(uneven, threads=64).kinds() == {"barrier-count"}


def test_barrier_in_divergent_code() -> None:
    body = """setp.lt.u32 %p1, %t, 16; @%p1 bra HALF; bar.sync 1, 32; bra JOIN;
        HALF: bar.sync 2, 32; JOIN:"""
    report = findings(body)
    assert report.kinds() == {"divergence"} and "16 lanes" in report.findings[0].message


def test_barrier_reduction() -> None:
    body = "setp.lt.u32 %p1, %t, 40; bar.red.popc.u32 %r1, 0, %p1;"
    assert lanes(body, 64) == [40] * 64
    body = "setp.lt.u32 %p1, %t, 40; bar.red.and.pred %p2, 0, %p1; selp.b32 %r1, 1, 0, %p2;"
    assert lanes(body, 64) == [0] * 64
    body = """setp.lt.u32 %p1, %t, 64; mov.u32 %r1, 9; @!%p1 bra JOIN;
        barrier.red.and.pred %p2, 1, 64, %p1; selp.b32 %r1, 1, 0, %p2; JOIN:"""
    assert lanes(body, 96) == [1] * 64 + [9] * 32, "only the 64 that take part are asked"


# ---- clusters ------------------------------------------------------------------------------

RANK = "mov.u32 %r10, %cluster_ctarank; xor.b32 %r11, %r10, 1; mov.u32 %r12, smem;"
SYNC = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
RELAXED = SYNC.replace("arrive", "arrive.relaxed")
ONE_WAITS = "WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [smem], 0; @!%p2 bra WAIT;"


def test_distributed_shared_memory() -> None:
    out = np.zeros(2, np.uint32)
    body = (
        RANK
        + f"""add.s32 %r13, %r10, 40; st.shared.b32 [smem], %r13; {SYNC}
        mapa.shared::cluster.u32 %r14, %r12, %r11; ld.shared::cluster.b32 %r1, [%r14]; {SYNC}
        mul.wide.u32 %w, %r10, 4; add.s64 %d60, %a0, %w; st.global.b32 [%d60], %r1;"""
    )
    for schedule in EVERY_SCHEDULE:
        findings(
            body, Uninitialised(out), threads=1, grid=2, cluster=2, shared=16, schedule=schedule
        ).check()
        assert out.tolist() == [41, 40]
    first = body.replace(SYNC, "", 1)
    assert findings(first, Uninitialised(out), threads=1, grid=2, cluster=2, shared=16).kinds() & {
        "race",
        "uninitialised",
    }
    last = SYNC.join(body.split(SYNC)[:2]) + body.split(SYNC)[2]
    for schedule in EVERY_SCHEDULE:
        out[:] = 0
        options = {"threads": 1, "grid": 2, "cluster": 2, "shared": 16, "schedule": schedule}
        assert findings(last, Uninitialised(out), **options).kinds() == {"exited-block"}


@pytest.mark.parametrize("exit", ["", RELAXED, SYNC, ONE_WAITS])
@pytest.mark.parametrize(
    "visit",
    [
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r14];",
        "st.shared::cluster.b32 [%r14+8], %r10;",
    ],
    ids=["arrive", "store"],
)
def test_a_block_outlives_its_visitors(visit: str, exit: str) -> None:
    """Nobody reads what the peer did: only the barrier at the end keeps the block there."""
    body = f"""{RANK} mbarrier.init.shared::cta.b64 [smem], 1;
        fence.mbarrier_init.release.cluster; {SYNC}
        mapa.shared::cluster.u32 %r14, %r12, %r11; {visit} {exit}"""
    if exit == ONE_WAITS and "arrive" not in visit:
        return
    for schedule in EVERY_SCHEDULE:
        report = findings(body, threads=1, grid=2, cluster=2, shared=16, schedule=schedule)
        assert report.kinds() == (set() if exit else {"exited-block"})
        assert exit or visit[:12] in report.findings[0].text


def test_a_count_posted_twice() -> None:
    """Three blocks post one each; one of them posts two: the consumer goes on too early."""
    body = """mov.u32 %r1, %ctaid.x; mul.wide.u32 %w, %r1, 4; add.s64 %d1, %a1, %w;
        setp.eq.u32 %p1, %r1, CONSUMER; @%p1 bra READ; st.global.b32 [%d1], 7;
        setp.eq.u32 %p3, %r1, TWICE; selp.b32 %r9, 2, 1, %p3;
        red.release.gpu.global.add.u32 [%a0], %r9; bra DONE;
        READ: ld.acquire.gpu.global.b32 %r2, [%a0]; setp.lt.u32 %p2, %r2, 3; @%p2 bra READ;
        ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%a1]; DONE:"""
    for consumer, twice in ((0, 1), (0, 2), (3, 1), (3, 2), (1, 2), (0, 9), (3, 9)):
        text = body.replace("CONSUMER", str(consumer)).replace("TWICE", str(twice))
        kinds: set[str] = set()
        for schedule in EVERY_SCHEDULE:
            count, data = np.zeros(1, np.uint32), np.zeros(4, np.uint32)
            report = findings(text, count, data, threads=1, grid=4, schedule=schedule)
            kinds |= report.kinds()
        assert kinds == ({"global-race"} if twice < 9 else set()), (consumer, twice)


def test_special_registers() -> None:
    out = np.zeros((6, 4), np.uint32)
    body = """mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %nctaid.x;
        mad.lo.s32 %r4, %r2, %r3, %r1; mov.u32 %r5, %clusterid.x; mov.u32 %r6, %ntid.x;
        mul.wide.u32 %w, %r4, 16; add.s64 %d1, %a0, %w;
        st.global.v4.b32 [%d1], {%r1,%r2,%r5,%r6};"""
    run(kernel(body, 1), "k", (2, 3), 1, [Uninitialised(out)], cluster=(2, 1)).check()
    assert out.tolist() == [[x, y, 0, 1] for y in range(3) for x in range(2)]


# ---- scheduling ----------------------------------------------------------------------------


def test_fair_to_a_spinning_warp() -> None:
    """Warp 0 spins on a flag that warp 1 sets later, under every order."""
    body = """setp.ge.u32 %p1, %t, 32; @%p1 bra SET; SPIN: ld.acquire.gpu.global.b32 %r2, [%a0];
        setp.eq.u32 %p2, %r2, 0; @%p2 bra SPIN; bra DONE;
        SET: st.release.gpu.global.b32 [%a0], 1; DONE:"""
    for schedule in EVERY_SCHEDULE:
        assert findings(body, np.zeros(1, np.uint32), threads=64, schedule=schedule).ok


def test_counters() -> None:
    case = Case("tile_gemm", {"M": 128, "N": 64, "K": 64}, options={"counters": True})
    counters = case.run().report.counters
    assert counters.tensor_flops == 2 * 128 * 64 * 64
    assert counters.global_bytes["load"] == 2 * (128 * 64 + 2 * 64 * 64)
    assert counters.compulsory_bytes["load"] == 2 * (128 * 64 + 64 * 64)
    assert counters.global_bytes["store"] == 2 * 128 * 64
    assert counters.barriers == 2 * 2 and counters.warp_instructions > 0
    assert counters.shared_wavefronts == counters.ideal_wavefronts, "the swizzle has no conflicts"


def test_a_multicast_reads_global_memory_once() -> None:
    """A cluster of two: each block loads its own x, and half of w for both."""
    case = Case("hopper_gemm", {"M": 128, "N": 64, "K": 64}, options={"counters": True})
    counters = case.run().report.counters
    assert counters.global_bytes["load"] == 2 * (128 * 64 + 64 * 64)


def test_bank_conflicts_are_counted() -> None:
    body = "shl.b32 %r1, %t, 7; mov.u32 %r2, smem; add.s32 %r1, %r1, %r2; st.shared.b32 [%r1], 1;"
    text = kernel(body, 0, declarations=".extern .shared .align 16 .b8 smem[];")
    counters = run(text, "k", 1, 32, [], shared=4096, counters=True).check().counters
    assert (counters.shared_wavefronts, counters.ideal_wavefronts) == (32, 1)


def test_store_over_an_mbarrier() -> None:
    body = "mbarrier.init.shared::cta.b64 [smem+8], 1; st.shared.b32 [smem+OFFSET], 1;"
    for offset, kinds in ((4, set()), (8, {"mbarrier"}), (12, {"mbarrier"}), (16, set())):
        report = findings(body.replace("OFFSET", str(offset)), threads=1, shared=32)
        assert report.kinds() == kinds
    ended = body.replace("st.shared", "mbarrier.inval.shared::cta.b64 [smem+8]; st.shared")
    assert findings(ended.replace("OFFSET", "8"), threads=1, shared=32).ok
