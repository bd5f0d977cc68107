"""mbarrier: arrivals, phases, transactions, and waits that may give up."""

from __future__ import annotations

import numpy as np

from . import EVERY_SCHEDULE, Schedule, Uninitialised
from .harness import findings
from .test_synchronisation import STORE, lanes

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


def test_pending_count_of_each_arrival() -> None:
    """The state holds "the pending count prior to the arrive-on operation"."""
    body = (
        START.replace("COUNT", "40")
        + """mbarrier.arrive.shared::cta.b64 %d1, [smem]; mbarrier.pending_count.b64 %r1, %d1;"""
    )
    assert lanes(body) == list(range(40, 8, -1))
    over = body.replace("40", "30")  # the last two arrive in the next phase
    assert lanes(over) == [*range(30, 0, -1), 30, 29]


def test_arrive_drop_lowers_the_count_of_later_phases() -> None:
    """32 of 64 drop out of the first phase; the second is complete with the other 32."""
    arrive = "mbarrier.arrive.shared::cta.b64 _, [smem];"
    drop = """setp.lt.u32 %p3, %t, 32; @%p3 mbarrier.arrive_drop.shared::cta.b64 _, [smem];
        @%p3 bra OVER;"""
    second = WAIT.replace("PARITY", "1").replace("WAIT", "SECOND")
    body = mbarrier(64, drop + arrive) + arrive + second + "OVER:"
    for schedule in EVERY_SCHEDULE:
        assert findings(body, threads=64, shared=16, schedule=schedule).ok
    kept = body.replace("arrive_drop", "arrive")
    assert findings(kept, threads=64, shared=16).kinds() == {"deadlock"}


def test_arrive_without_completing() -> None:
    body = (
        START.replace("COUNT", "64")
        + """mbarrier.arrive.noComplete.shared::cta.b64 %d1, [smem], 1; bar.sync 0;
        mbarrier.arrive.shared::cta.b64 _, [smem];"""
        + WAIT.replace("PARITY", "0")
    )
    assert findings(body, shared=16).ok
    assert findings(body.replace("64;", "32;", 1), shared=16).kinds() == {"mbarrier"}


def test_simulated_completion() -> None:
    """complete_tx takes bytes off as a copy would; so does arrive_drop.expect_tx put them on."""
    body = (
        START.replace("COUNT", "2")
        + """@%p1 mbarrier.arrive.shared::cta.b64 _, [smem];
        @%p1 mbarrier.arrive_drop.expect_tx.shared::cta.b64 _, [smem], 48;
        @%p1 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [smem], 48;"""
        + WAIT.replace("PARITY", "0")
    )
    for schedule in EVERY_SCHEDULE:
        assert findings(body, shared=16, schedule=schedule).ok
    report = findings(body.replace("[smem], 48;", "[smem], 32;", 1), shared=16)
    assert "deadlock" in report.kinds() and "-16 bytes pending" in report.findings[0].message


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
