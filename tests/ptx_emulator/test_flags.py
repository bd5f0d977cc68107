"""Synchronisation through flags in memory: tensor memory, copies and plain stores handed over.

"Specialized Inter-thread Synchronization for tcgen05 instructions": the fences compose "with
execution ordering instructions, like morally strong ld/st/atom instructions". The patterns are
those of `test_tcgen05_order.py` with a flag in the place of the mbarrier.
"""

from __future__ import annotations

import numpy as np
import pytest

from . import EVERY_SCHEDULE, run
from .harness import findings, kernel
from .test_tcgen05_order import (
    AFTER,
    BEFORE,
    DONE,
    FINISH,
    LOAD,
    LOADED,
    MMA,
    OTHER,
    PREPARED,
    RELAXED,
    SEEN,
    START,
)

PLACES = {"shared": "[smem+4128]", "global": "[%a0]"}
CLEAR = "@%p1 st.SPACE.b32 FLAG, 0; bar.sync 0;"
MEMBAR = "fence.acq_rel.cta;"


def post(order: str, thread: str = "@%p1") -> str:
    return f"{thread} st.{order}.cta.SPACE.b32 FLAG, 1;"


def count(order: str) -> str:
    return f"red.{order}.cta.SPACE.add.u32 FLAG, 1;"


def see(order: str, value: int, guard: str = "") -> str:
    """Spin until the flag has a value; with a guard, only its threads."""
    label = f"SEE_{order}_{value}_{guard[1:]}"
    skip = f"@!{guard} bra {label}_OVER;" if guard else ""
    return f"""{skip} {label}: ld.{order}.cta.SPACE.b32 %r70, FLAG; setp.ne.u32 %p6, %r70, {value};
        @%p6 bra {label}; {label}_OVER:"""


# Each pattern in parts; a part that may not go is followed by what is found without it.
PATTERNS: dict[str, list[tuple[str, str]]] = {
    # the ISA's example of tcgen05.fence, with a multiplication as the producer
    "mma-mma-relaxed": [
        (MMA, ""),
        (BEFORE, "race"),
        (post("relaxed"), ""),
        (see("relaxed", 1, "%p2"), "race"),
        (AFTER, "race"),
        (OTHER, ""),
    ],
    "mma-mma-release": [
        (MMA, ""),
        (BEFORE, "race"),
        (post("release"), ""),
        (see("acquire", 1, "%p2"), "race"),
        (AFTER, "race"),
        (OTHER, ""),
    ],
    # loads of all threads, counted
    "ld-mma-relaxed": [
        (PREPARED + LOAD, ""),
        (LOADED, "in-flight"),
        (BEFORE, "race"),
        (count("relaxed"), ""),
        (see("relaxed", 128, "%p1"), "race|in-flight"),
        (AFTER, "race"),
        (MMA, ""),
    ],
    # memory order is enough for what is complete
    "ld-mma-release": [
        (PREPARED + LOAD, ""),
        (LOADED, "in-flight"),
        (count("release"), ""),
        (see("acquire", 128, "%p1"), "race|in-flight"),
        (MMA, ""),
    ],
    "ld-mma-fences": [
        (PREPARED + LOAD + LOADED, ""),
        (MEMBAR, "race"),
        (count("relaxed") + see("relaxed", 128, "%p1"), "race|in-flight"),
        (MEMBAR, "race"),
        (MMA, ""),
    ],
    # a product: waited for by its thread, announced to all others
    "mma-ld-release": [
        (MMA + DONE, ""),
        (f"@!%p1 bra OTHERS; {SEEN} OTHERS:", "in-flight"),
        (post("release"), ""),
        (see("acquire", 1), "in-flight|race"),
        (LOAD + LOADED, ""),
    ],
    "mma-ld-composed": [
        (MMA + DONE, ""),
        (f"@!%p1 bra OTHERS; {RELAXED} OTHERS:", "in-flight"),
        (AFTER, ""),
        (BEFORE, ""),  # its thread saw the completion: execution order hands that on
        (post("relaxed"), ""),
        (see("relaxed", 1), "in-flight|race"),
        (AFTER + " ", "in-flight"),
        (LOAD + LOADED, ""),
    ],
}
FAULTS = [
    (name, n)
    for name, parts in PATTERNS.items()
    for n, (_, kind) in enumerate(parts)
    if kind
]  # fmt: skip


def found(name: str, space: str, without: int | None, schedule) -> set[str]:
    parts = [part for n, (part, _) in enumerate(PATTERNS[name]) if n != without]
    body = START.replace("ARRIVALS", "1") + CLEAR + "".join(parts) + FINISH
    body = body.replace("SPACE", space).replace("FLAG", PLACES[space])
    flag = np.zeros(1, np.uint32)
    return findings(body, flag, threads=128, shared=4144, schedule=schedule).kinds()


@pytest.mark.parametrize("space", PLACES)
@pytest.mark.parametrize("name", PATTERNS)
def test_tensor_memory_handed_over_by_a_flag(name: str, space: str) -> None:
    for schedule in EVERY_SCHEDULE:
        assert found(name, space, None, schedule) == set(), schedule


@pytest.mark.parametrize("space", PLACES)
@pytest.mark.parametrize(("name", "part"), FAULTS)
def test_a_missing_part_is_found(name: str, part: int, space: str) -> None:
    kinds = set(PATTERNS[name][part][1].split("|"))
    for schedule in EVERY_SCHEDULE[:4]:
        assert kinds & found(name, space, part, schedule), schedule


# ---- shared memory -------------------------------------------------------------------------

COPIED = """setp.eq.u32 %p1, %t, 0; @%p1 st.shared.b32 [smem], 0; mov.u32 %r50, smem;
    @%p1 mbarrier.init.shared::cta.b64 [smem+8], 1; bar.sync 0; @!%p1 bra OTHERS;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem+8], 128; add.s32 %r51, %r50, 128;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r51], [%a0], 128, [%r50+8];
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [smem+8], 0; @!%p2 bra WAIT;
    st.shared.b32 [smem+4], 9; POST OTHERS: SEE
    ld.shared.b32 %r1, [smem+4]; and.b32 %r52, %t, 31; shl.b32 %r52, %r52, 2;
    add.s32 %r52, %r52, %r50; ld.shared.b32 %r2, [%r52+128];"""


def handed_over(post_order: str, see_order: str, schedule) -> set[str]:
    body = COPIED.replace("POST", post(post_order, "")).replace("SEE", see(see_order, 1), 1)
    body = body.replace("SPACE", "shared").replace("FLAG", "[smem]")
    data = np.arange(32, dtype=np.uint32)
    return findings(body, data, threads=64, shared=256, schedule=schedule).kinds()


def test_copies_and_stores_handed_over_by_a_flag_in_shared_memory() -> None:
    for schedule in EVERY_SCHEDULE:
        assert handed_over("release", "acquire", schedule) == set(), schedule
        assert handed_over("relaxed", "acquire", schedule) == {"in-flight", "race"}, schedule
        assert handed_over("release", "relaxed", schedule) == {"in-flight", "race"}, schedule


@pytest.mark.parametrize(("kind", "found"), [("relaxed.cta", set()), ("", {"race"})])
def test_a_store_after_a_strong_load(kind: str, found: set[str]) -> None:
    """Two strong accesses of a location never race; a weak store against a strong load does."""
    dot = "." if kind else ""
    body = f"""setp.eq.u32 %p1, %t, 0; @%p1 st.shared.b32 [smem], 1; bar.sync 0;
        setp.eq.u32 %p2, %t, 32; @%p2 ld.relaxed.cta.shared.b32 %r1, [smem];
        @%p1 st{dot}{kind}.shared.b32 [smem], 2;"""
    for schedule in EVERY_SCHEDULE[3:4]:  # the load comes first
        assert findings(body, threads=64, shared=16, schedule=schedule).kinds() == found


def test_a_flag_of_the_block_before_is_gone() -> None:
    """The next block in the same place learns nothing from what was released there."""
    body = """mov.u32 %r2, %ctaid.x; setp.ne.u32 %p3, %r2, 0; st.shared.b32 [smem], 0;
        @%p3 bra SECOND; st.global.b32 [%a0], 5; red.release.gpu.shared.add.u32 [smem], 1; bra OVER;
        SECOND: red.relaxed.gpu.shared.add.u32 [smem], 1; ld.acquire.gpu.shared.b32 %r1, [smem];
        ld.global.b32 %r3, [%a0]; OVER:"""
    text = kernel(body, 1, declarations=".extern .shared .align 16 .b8 smem[];")
    report = run(text, "k", 2, 1, [np.zeros(1, np.uint32)], shared=16, resident=1)
    assert report.kinds() == {"global-race"}
