"""Bulk copies inside a cluster: from one block's shared memory to another's, and to several."""

from __future__ import annotations

import numpy as np
import pytest

from . import EVERY_SCHEDULE, Report, Schedule, Uninitialised
from .harness import findings

SYNC = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
START = f"""mov.u32 %r10, %cluster_ctarank; xor.b32 %r11, %r10, 1; mov.u32 %r12, smem;
    setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared::cta.b64 [smem], 1;
    fence.mbarrier_init.release.cluster; mad.lo.u32 %r13, %r10, 100, %t; shl.b32 %r15, %t, 2;
    add.s32 %r15, %r15, %r12; st.shared.b32 [%r15+128], %r13; fence.proxy.async.shared::cta; {SYNC}
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem], 128;
    mapa.shared::cluster.u32 %r14, %r12, %r11;"""
WAIT = "WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [smem], 0; @!%p2 bra WAIT;"
END = f"""ld.shared.b32 %r1, [%r15+256]; mad.lo.u32 %r2, %r10, 32, %t; mul.wide.u32 %w, %r2, 4;
    add.s64 %d1, %a0, %w; st.global.b32 [%d1], %r1; {SYNC}"""
TO_PEER = """@%p1 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes
    [%r14+256], [%r12+128], 128, [%r14];"""
TO_ALL = """setp.eq.u32 %p3, %r10, 0; and.pred %p3, %p3, %p1; mov.b16 %h1, 3;
    @%p3 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
    [%r12+256], [%a1], 128, [%r12], %h1;"""


def copied(body: str, schedule: Schedule = EVERY_SCHEDULE[0]) -> tuple[Report, np.ndarray]:
    out, x = np.zeros((2, 32), np.uint32), np.arange(32, dtype=np.uint32)
    options = {"threads": 32, "grid": 2, "cluster": 2, "shared": 512, "schedule": schedule}
    return findings(body, Uninitialised(out), x, **options), out


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=str)
def test_to_the_other_block(schedule: Schedule) -> None:
    report, out = copied(START + TO_PEER + WAIT + END, schedule)
    report.check()
    assert out.tolist() == [[100 + t for t in range(32)], list(range(32))]


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=str)
def test_to_all_blocks(schedule: Schedule) -> None:
    report, out = copied(START + TO_ALL + WAIT + END, schedule)
    report.check()
    assert out.tolist() == [list(range(32))] * 2


def test_with_cache_hints() -> None:
    hints = TO_ALL.replace("%h1;", "%h1, %d9;").replace("cluster\n", "cluster.L2::cache_hint\n")
    policy = "createpolicy.fractional.L2::evict_first.b64 %d9;"
    store = """bar.warp.sync -1; fence.proxy.async;
        @%p1 cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%a0], [%r12+256], 128, %d9;
        @%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 0;"""
    one = f"setp.ne.u32 %p1, %r10, 0; @%p1 bra OVER; setp.eq.u32 %p1, %t, 0; {store} OVER: {SYNC}"
    report, out = copied(policy + START + hints + WAIT + one)
    report.check()
    assert out[0].tolist() == list(range(32))


FAULTS = [
    ("fence.proxy.async.shared::cta;", "", "missing-proxy-fence"),
    (WAIT, "", "in-flight"),
    (TO_PEER, TO_PEER + "st.shared.b32 [%r15+128], 7;", "in-flight"),
    ("128, [%r14];", "64, [%r14];", "deadlock"),
    ("fence.mbarrier_init.release.cluster;", "", "missing-fence"),
    ("[%r14+256],", "[%r14+8192],", "out-of-bounds"),
    ("[%r14+256],", "[%r14+264],", "misaligned"),
]


@pytest.mark.parametrize(("old", "new", "kind"), FAULTS)
def test_faults_are_found(old: str, new: str, kind: str) -> None:
    body = START + TO_PEER + WAIT + END
    report, _ = copied(body.replace(old, new, 1), EVERY_SCHEDULE[1])
    assert kind in report.kinds()


def test_a_multicast_beyond_the_cluster() -> None:
    report, _ = copied(START + TO_ALL.replace("%h1, 3", "%h1, 7") + WAIT + END)
    assert report.kinds() == {"multicast"}
