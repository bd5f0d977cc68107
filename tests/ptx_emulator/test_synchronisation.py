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


# ---- mbarrier ------------------------------------------------------------------------------

START = """setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared::cta.b64 [smem], COUNT; bar.sync 0;"""
WAIT = """WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [smem], PARITY; @!%p2 bra WAIT;"""


def mbarrier(count: int, arrive: str, parity: int = 0) -> str:
    return START.replace("COUNT", str(count)) + arrive + WAIT.replace("PARITY", str(parity))


def test_phase_completes_with_the_last_arrival() -> None:
    arrive = "mbarrier.arrive.shared::cta.b64 _, [smem];"
    for schedule in EVERY_SCHEDULE:
        assert findings(mbarrier(64, arrive), threads=64, shared=16, schedule=schedule).ok
    report = findings(mbarrier(65, arrive), threads=64, shared=16)
    assert report.kinds() == {"deadlock"} and "1 of 65 arrivals" in report.findings[0].message
    assert findings(mbarrier(63, arrive), threads=64, shared=16).ok, "the 64th starts a new phase"


def test_the_previous_phase_counts_as_complete() -> None:
    """Waiting with parity 1 on a fresh object succeeds; -1 means the same."""
    assert findings(mbarrier(9, "", 1), shared=16).ok
    assert findings(mbarrier(9, "", -1), shared=16).ok


def test_arrival_count_operand_and_token() -> None:
    body = (
        START.replace("COUNT", "64")
        + """mbarrier.arrive.shared::cta.b64 %d1, [smem], 2;
        WAIT: mbarrier.test_wait.shared::cta.b64 %p2, [smem], %d1; @!%p2 bra WAIT;"""
    )
    assert findings(body, shared=16).ok


def test_arrival_counts_are_positive() -> None:
    report = findings(mbarrier(1, "mbarrier.arrive.shared::cta.b64 _, [smem], 0;"), shared=16)
    assert report.kinds() == {"mbarrier"}


def test_bytes_may_arrive_before_they_are_expected() -> None:
    """complete_tx first: the pending arrival keeps the phase open until expect_tx evens it."""
    x = np.arange(4, dtype=np.uint32)
    body = (
        START.replace("COUNT", "1")
        + """mov.u32 %r5, smem;
        @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r5+16], [%a0], 16,
            [%r5];
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem], 16;"""
        + WAIT.replace("PARITY", "0")
        + "ld.shared.b32 %r1, [%r5+16];"
    )
    for schedule in EVERY_SCHEDULE:
        findings(body, x, shared=64, schedule=schedule).check()
    # without an arrival the phase stays open though no byte is missing
    only = body.replace("arrive.expect_tx.shared::cta.b64 _,", "expect_tx.shared::cta.b64")
    assert "deadlock" in findings(only, x, shared=64).kinds()


def test_transactions_keep_the_phase_open() -> None:
    arrive = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem], 16;"
    report = findings(mbarrier(1, arrive), shared=16)
    assert "deadlock" in report.kinds() and "16 bytes pending" in report.findings[0].message


def test_bulk_copy_signals_its_bytes() -> None:
    x, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    body = (
        START.replace("COUNT", "1")
        + """
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem], 128; mov.u32 %r5, smem;
        @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r5+128], [%a1],
            128, [%r5];"""
        + WAIT.replace("PARITY", "0")
        + """
        shl.b32 %r6, %t, 2; add.s32 %r6, %r6, %r5; ld.shared.b32 %r1, [%r6+128];"""
        + STORE
    )
    for schedule in EVERY_SCHEDULE:
        findings(body, Uninitialised(out), x, shared=256, schedule=schedule).check()
        assert out.tolist() == x.tolist()
    unwaited = body.replace(WAIT.replace("PARITY", "0"), "")
    assert "in-flight" in findings(unwaited, Uninitialised(out), x, shared=256).kinds()


def test_bulk_store_needs_a_proxy_fence_and_a_wait() -> None:
    out = np.zeros(4, np.uint32)
    body = """st.shared.v4.b32 [smem], {1, 2, 3, 4}; fence.proxy.async.shared::cta;
        mov.u32 %r5, smem;
        cp.async.bulk.global.shared::cta.bulk_group [%a0], [%r5], 16; cp.async.bulk.commit_group;
        cp.async.bulk.wait_group.read 0; st.shared.b32 [smem], 9; cp.async.bulk.wait_group 0;"""
    for schedule in EVERY_SCHEDULE:
        findings(body, out, threads=1, shared=16, schedule=schedule).check()
        assert out.tolist() == [1, 2, 3, 4]
    unfenced = body.replace("fence.proxy.async.shared::cta;", "")
    assert findings(unfenced, out, threads=1, shared=16).kinds() == {"missing-proxy-fence"}
    early = body.replace("cp.async.bulk.wait_group.read 0;", "")
    assert findings(early, out, threads=1, shared=16).kinds() == {"in-flight"}


def test_wait_for_reading_says_nothing_of_the_destination() -> None:
    """`.read`: the sources may be reused, the stores need not be visible."""
    body = """st.shared.v4.b32 [smem], {1, 2, 3, 4}; fence.proxy.async; mov.u32 %r5, smem;
        cp.async.bulk.global.shared::cta.bulk_group [%a0], [%r5], 16; cp.async.bulk.commit_group;
        cp.async.bulk.wait_groupREAD 0; ld.global.b32 %r1, [%a0];"""
    for read, kinds in ((".read", {"global-race"}), ("", set())):
        text = body.replace("READ", read)
        report = findings(text, np.zeros(4, np.uint32), threads=1, shared=16)
        assert report.kinds() == kinds


IMPATIENT = [schedule for schedule in EVERY_SCHEDULE if schedule.landing == "late"]


def consumer(wait: str) -> str:
    """Warp 1 reads, after `wait`, what a bulk copy of warp 0 brings."""
    return (
        START.replace("COUNT", "1")
        + f"""mov.u32 %r5, smem; setp.lt.u32 %p4, %t, 32; @%p4 bra OVER; {wait}
        shl.b32 %r6, %t, 2; add.s32 %r6, %r6, %r5; ld.shared.b32 %r1, [%r6]; {STORE} OVER:
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem], 128;
        @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r5+128], [%a1],
            128, [%r5];"""
    )


def test_a_wait_may_give_up_before_its_phase_completes() -> None:
    """try_wait: "resumes ... OR before the phase completes following a system-dependent time
    limit"; who does not ask again reads too early."""
    x, out = np.arange(32, dtype=np.uint32), np.zeros(64, np.uint32)
    wait = WAIT.replace("PARITY", "0")
    for schedule in EVERY_SCHEDULE:
        body, args = consumer(wait), (Uninitialised(out), x)
        findings(body, *args, threads=64, shared=256, schedule=schedule).check()
        assert out[32:].tolist() == x.tolist()
    once = consumer(wait.replace("@!%p2 bra WAIT;", ""))
    for schedule in IMPATIENT:
        report = findings(once, Uninitialised(out), x, threads=64, shared=256, schedule=schedule)
        assert report.kinds() & {"in-flight", "uninitialised"}, schedule


def test_a_wait_that_gives_up_says_so() -> None:
    """The predicate is false, once for every lane and phase: the second wait is suspended."""
    body = (
        START.replace("COUNT", "32")
        + """mov.u32 %r1, 0; setp.lt.u32 %p4, %t, 32; @%p4 bra LATER;
        WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [smem], 0; @!%p2 add.s32 %r1, %r1, 1;
        @!%p2 bra WAIT; bra OVER;
        LATER: nanosleep.u32 100; mbarrier.arrive.shared::cta.b64 _, [smem]; OVER:"""
    )
    assert lanes(body, 64, Schedule("reversed", "late")) == [0] * 32 + [1] * 32
    assert lanes(body, 64, Schedule("reversed", "early")) == [0] * 64


def test_waits_in_turn_come_to_an_end() -> None:
    """A loop that asks two objects in turn, and stores meanwhile, is suspended in the end."""
    body = (
        START.replace("COUNT", "1")
        + """@%p1 mbarrier.init.shared::cta.b64 [smem+8], 1; bar.sync 0; setp.lt.u32 %p4, %t, 32;
        mov.u32 %r1, 0; @%p4 bra FIRST; mbarrier.arrive.shared::cta.b64 _, [smem+8]; bra OVER;
        FIRST: add.s32 %r1, %r1, 1; st.relaxed.gpu.global.b32 [%a0], %r1;
        mbarrier.try_wait.parity.shared::cta.b64 %p2, [smem], 0; @%p2 bra OVER;
        mbarrier.try_wait.parity.shared::cta.b64 %p2, [smem+8], 0; @!%p2 bra FIRST; OVER:"""
    )
    body = body.replace("mbarrier.arrive", "setp.eq.u32 %p1, %t, 32; @%p1 mbarrier.arrive")
    for schedule in EVERY_SCHEDULE:
        flag = np.zeros(64, np.uint32)
        findings(body, flag, threads=64, shared=16, schedule=schedule).check()
        assert flag[0] <= 3


def test_a_test_wait_only_says_what_is() -> None:
    """test_wait is "non-blocking": no time limit, the phase decides."""
    body = (
        START.replace("COUNT", "32")
        + """mbarrier.arrive.shared::cta.b64 %d1, [smem]; bar.sync 0;
        mbarrier.test_wait.shared::cta.b64 %p2, [smem], %d1; selp.b32 %r1, 1, 0, %p2;"""
    )
    for schedule in EVERY_SCHEDULE:
        assert lanes(body, 32, schedule) == [1] * 32


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


def test_generic_store_to_global_then_asynchronous_read() -> None:
    x = np.zeros(32, np.uint32)
    copy = """@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r5+128],
        [%a0], 128, [%r5];"""
    body = (
        START.replace("COUNT", "1")
        + "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem], 128; mov.u32 %r5, smem;"
        + "mul.wide.u32 %w, %t, 4; add.s64 %d1, %a0, %w; st.global.b32 [%d1], %t; FENCE bar.sync 0;"
        + copy
        + WAIT.replace("PARITY", "0")
    )
    fence = "fence.proxy.async.global;"
    assert findings(body.replace("FENCE", fence), x, shared=256).ok
    other = findings(body.replace("FENCE", "fence.proxy.async.shared::cta;"), x, shared=256)
    assert other.kinds() == {"missing-proxy-fence"}, "of another state space"
    report = findings(body.replace("FENCE", ""), x, shared=256)
    assert report.kinds() == {"missing-proxy-fence"}
    assert "st.global.b32" in report.findings[0].message
    late = body.replace("FENCE", "").replace(copy, fence + copy)
    assert findings(late, x, shared=256).ok, "the reader may fence instead, after the barrier"


def test_store_over_an_mbarrier() -> None:
    body = "mbarrier.init.shared::cta.b64 [smem+8], 1; st.shared.b32 [smem+OFFSET], 1;"
    for offset, kinds in ((4, set()), (8, {"mbarrier"}), (12, {"mbarrier"}), (16, set())):
        report = findings(body.replace("OFFSET", str(offset)), threads=1, shared=32)
        assert report.kinds() == kinds
    ended = body.replace("st.shared", "mbarrier.inval.shared::cta.b64 [smem+8]; st.shared")
    assert findings(ended.replace("OFFSET", "8"), threads=1, shared=32).ok
