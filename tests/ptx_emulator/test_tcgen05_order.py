"""Order of tcgen05 operations: the canonical patterns of the PTX ISA, and each without one part.

"Memory Consistency Model for 5th generation of TensorCore operations", "Canonical synchronization
patterns". Thread 0 multiplies, in some cases thread 32 too; all four warps load and store.
"""

from __future__ import annotations

import pytest

from . import EVERY_SCHEDULE
from .harness import findings
from .layouts import Swizzle
from .smem_operand import SmemDescriptor
from .tcgen05 import encode_smem_descriptor

FIRST, SECOND, LAST, ADDRESS = (f"[%r50+{at}]" for at in (4096, 4104, 4112, 4120))
OPERAND = encode_smem_descriptor(SmemDescriptor(1024, 128, 256, 0, Swizzle.NONE))
SHAPE_8, SHAPE_16 = (4 << 24 | n << 17 | 1 << 4 for n in (1, 2))  # 64 x 8 and 64 x 16, f16 to f32
START = f"""mov.u32 %r50, smem; mad.lo.s32 %r51, %t, 32, %r50; mov.b32 %r1, 0;
    st.shared.v4.b32 [%r51], {{%r1, %r1, %r1, %r1}};
    st.shared.v4.b32 [%r51+16], {{%r1, %r1, %r1, %r1}}; fence.proxy.async.shared::cta;
    shr.u32 %r52, %t, 5; setp.eq.u32 %p1, %t, 0; setp.eq.u32 %p2, %t, 32;
    setp.eq.u32 %p4, %r52, 0; setp.ne.b32 %p5, 0, 0;
    @%p1 mbarrier.init.shared::cta.b64 {FIRST}, 1;
    @%p1 mbarrier.init.shared::cta.b64 {SECOND}, ARRIVALS;
    @%p1 mbarrier.init.shared::cta.b64 {LAST}, 2; add.s32 %r53, %r50, 4120;
    @%p4 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r53], 64; bar.sync 0;
    ld.shared.b32 %r40, {ADDRESS}; shl.b32 %r54, %r52, 21; add.s32 %r42, %r40, %r54;
    add.s32 %r43, %r40, 32; mov.b64 %d10, {OPERAND};"""


def commit(thread: str, barrier: str) -> str:
    return (
        f"{thread} tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 {barrier};"
    )


def wait(barrier: str, semantics: str, guard: str = "") -> str:
    """Spin; with a guard, only its threads."""
    label = f"W{abs(hash((barrier, guard, semantics)))}"
    form = f"mbarrier.try_wait.parity.{semantics}.cta.shared::cta.b64"
    skip = f"@!{guard} bra {label}_OVER;" if guard else ""
    return f"{skip} {label}: {form} %p3, {barrier}, 0; @!%p3 bra {label}; {label}_OVER:"


def multiply(thread: str, shape: int = SHAPE_8, a: str = "%d10", d: str = "[%r40]") -> str:
    return f"{thread} tcgen05.mma.cta_group::1.kind::f16 {d}, {a}, %d10, {shape}, %p5;"


FINISH = f"""{commit("@%p1", LAST)} {commit("@%p2", LAST)} {wait(LAST, "acquire")} bar.sync 0;
    @%p4 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r40, 64;"""
BEFORE, AFTER = "tcgen05.fence::before_thread_sync;", "tcgen05.fence::after_thread_sync;"
LOAD = "tcgen05.ld.sync.aligned.16x64b.x4.b32 {%r60, %r61, %r62, %r63}, [%r42];"
STORE = "tcgen05.st.sync.aligned.16x64b.x4.b32 [%r42], {%r1, %r1, %r1, %r1};"
LOADED, STORED = (f"tcgen05.wait::{kind}.sync.aligned;" for kind in ("ld", "st"))
MMA, OTHER = multiply("@%p1"), multiply("@%p2")
SEEN, RELAXED = wait(FIRST, "acquire"), wait(FIRST, "relaxed")
DONE = commit("@%p1", FIRST)
ARRIVE, ARRIVE_RELAXED = (
    f"mbarrier.arrive.{order}.cta.shared::cta.b64 _, {SECOND};" for order in ("release", "relaxed")
)
AWAIT, AWAIT_RELAXED = (wait(SECOND, order, "%p1") for order in ("acquire", "relaxed"))
MET, MET_RELAXED = (wait(SECOND, order, "%p2") for order in ("acquire", "relaxed"))
PREPARED = STORE + STORED

# Each pattern in parts; a part that may not go is followed by what is found without it.
PATTERNS: dict[str, list[tuple[str, str]]] = {
    # non-pipelined, same thread
    "st-ld": [(STORE, ""), (STORED, "in-flight"), (LOAD, ""), (LOADED, "in-flight")],
    "st-st": [(STORE, ""), (STORED, "in-flight"), (STORE, ""), (STORED, "in-flight")],
    "ld-st": [(PREPARED, ""), (LOAD, ""), (LOADED, "in-flight"), (STORE + STORED, "")],
    "mma-ld-relaxed": [
        (MMA + DONE, ""),
        (RELAXED, "in-flight"),
        (AFTER, "in-flight"),
        (LOAD + LOADED, ""),
    ],
    # memory order by acquire applies as well
    "mma-ld-acquire": [(MMA + DONE, ""), (SEEN, "in-flight"), (LOAD + LOADED, "")],
    "mma-st": [(MMA + DONE, ""), (SEEN, "in-flight"), (STORE + STORED, "")],
    # non-pipelined, different threads
    "ld-mma-relaxed": [
        (PREPARED + LOAD, ""),
        (LOADED, "in-flight"),
        (BEFORE, "race"),
        (ARRIVE_RELAXED, ""),
        (AWAIT_RELAXED, "race|in-flight"),
        (AFTER, "race"),
        (MMA, ""),
    ],
    "ld-mma-release": [
        (PREPARED + LOAD, ""),
        (LOADED, "in-flight"),
        (ARRIVE, ""),
        (AWAIT, "race|in-flight"),
        (MMA, ""),
    ],
    "st-mma-barrier": [
        (STORE, ""),
        (STORED, "in-flight"),
        ("bar.sync 0;", "race|in-flight"),
        (MMA, ""),
    ],
    # pipelined, same thread: nothing to remove
    "mma-mma": [(MMA + MMA, "")],
    # pipelined, different threads: only the fences hand on what still runs
    "mma-mma-threads": [
        (MMA, ""),
        (BEFORE, "race"),
        (f"@%p1 {ARRIVE_RELAXED}", ""),
        (MET_RELAXED, "race"),
        (AFTER, "race"),
        (OTHER, ""),
    ],
    "mma-mma-barrier": [
        (MMA, ""),
        (BEFORE, "race"),
        ("bar.sync 0;", "race"),
        (AFTER, "race"),
        (OTHER, ""),
    ],
    "mma-mma-release": [
        (MMA, ""),
        (BEFORE, "race"),
        (f"@%p1 {ARRIVE}", ""),
        (MET, "race"),
        (AFTER, "race"),
        (OTHER, ""),
    ],
    # not a pipeline: another shape, or a product as the operand of the next
    "mma-mma-shape": [
        (MMA, ""),
        (DONE + SEEN, "in-flight"),
        (multiply("@%p1", SHAPE_16), ""),
    ],
    "mma-operand": [
        (PREPARED + "bar.sync 0;" + MMA, ""),
        (DONE + SEEN, "in-flight"),
        (multiply("@%p1", a="[%r40]", d="[%r43]"), ""),
    ],
    "mma-operand-overwritten": [
        (PREPARED + "bar.sync 0;" + multiply("@%p1", a="[%r40]", d="[%r43]"), ""),
        (DONE + SEEN, "in-flight"),
        (MMA, ""),
    ],
    # the memory may go only when nobody uses it
    "dealloc": [
        (MMA + DONE, ""),
        (SEEN + "bar.sync 0;", "in-flight"),
        ("@%p4 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r40, 64;", ""),
    ],
}
FAULTS = [
    (name, n)
    for name, parts in PATTERNS.items()
    for n, (_, kind) in enumerate(parts)
    if kind
]  # fmt: skip


def found(name: str, without: int | None, schedule) -> set[str]:
    parts = [part for n, (part, _) in enumerate(PATTERNS[name]) if n != without]
    arrivals = "128" if name.startswith("ld-mma") else "1"
    finish = FINISH if name != "dealloc" else FINISH.rpartition("@%p4")[0]
    body = START.replace("ARRIVALS", arrivals) + "".join(parts) + finish
    report = findings(body, threads=128, shared=4128, schedule=schedule)
    return report.kinds()


@pytest.mark.parametrize("name", PATTERNS)
def test_canonical_pattern_is_in_order(name: str) -> None:
    for schedule in EVERY_SCHEDULE:
        assert found(name, None, schedule) == set()


@pytest.mark.parametrize(("name", "part"), FAULTS)
def test_a_missing_part_is_found(name: str, part: int) -> None:
    for schedule in EVERY_SCHEDULE[:4]:
        kinds = set(PATTERNS[name][part][1].split("|"))
        assert kinds & found(name, part, schedule)


def test_tf32_product_of_ones() -> None:
    """64 x 8 x 8 ones: every element of the product is 8, in every lane that holds one."""
    shape = SHAPE_8 | 2 << 7 | 2 << 10
    ones = START.replace("ARRIVALS", "1").replace("mov.b32 %r1, 0;", "mov.b32 %r1, 0f3F800000;")
    product = multiply("@%p1", shape).replace("kind::f16", "kind::tf32")
    check = "setp.ne.b32 %p6, %r60, 0f41000000; @%p6 trap; setp.ne.b32 %p6, %r63, 0f41000000;"
    body = ones + product + DONE + SEEN + LOAD + LOADED + check + "@%p6 trap;" + FINISH
    assert findings(body, threads=128, shared=4128).ok
    wrong = body.replace("0f41000000", "0f40E00000")
    assert findings(wrong, threads=128, shared=4128).kinds() == {"trap"}
