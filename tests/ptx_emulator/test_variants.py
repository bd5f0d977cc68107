"""Opcode variants that compiled kernels contain and no other test executes on chosen values."""

from __future__ import annotations

import re

import numpy as np
import pytest

from . import EVERY_SCHEDULE, Struct, Uninitialised, run
from .harness import evaluate, findings, kernel

U16, S16, U32, U64, S64, F32, F64 = (
    np.dtype(t) for t in ("u2", "i2", "u4", "u8", "i8", "f4", "f8")
)

SCALAR = [
    ("add.bf16x2 $0, $1, $2;", [(U32, [0x3F804000]), (U32, [0x40003F80])], U32, [0x40404040]),
    ("add.rn.f32 $0, $1, $2;", [(F32, [1.0]), (F32, [2.0**-24])], F32, [1.0]),
    ("add.u64 $0, $1, $2;", [(U64, [2**64 - 1]), (U64, [2])], U64, [1]),
    ("sub.s64 $0, $1, $2;", [(S64, [3]), (S64, [2**40])], S64, [3 - 2**40]),
    ("brev.b64 $0, $1;", [(U64, [1, 6])], U64, [2**63, 3 * 2**61]),
    ("clz.b64 $0, $1;", [(U64, [1, 2**40, 0])], U32, [63, 23, 64]),
    ("cvt.rmi.f32.f32 $0, $1;", [(F32, [-1.5, 1.5])], F32, [-2.0, 1.0]),
    ("cvt.rpi.f32.f32 $0, $1;", [(F32, [-1.5, 1.5])], F32, [-1.0, 2.0]),
    ("cvt.rzi.f32.f32 $0, $1;", [(F32, [-1.5, 1.5])], F32, [-1.0, 1.0]),
    ("cvt.rmi.f64.f64 $0, $1;", [(F64, [-1.5, 1.5])], F64, [-2.0, 1.0]),
    ("cvt.u16.u32 $0, $1;", [(U32, [0x12345678])], U16, [0x5678]),
    ("div.approx.f32 $0, $1, $2;", [(F32, [7.0]), (F32, [2.0])], F32, [3.5]),
    ("rem.u32 $0, $1, $2;", [(U32, [2**32 - 1, 7]), (U32, [2**31, 7])], U32, [2**31 - 1, 0]),
    ("div.u64 $0, $1, $2;", [(U64, [2**64 - 1]), (U64, [2**32])], U64, [2**32 - 1]),
    ("fma.rm.f32 $0, $1, $2, $3;", [(F32, [1.0]), (F32, [1.0]), (F32, [2.0**-30])], F32, [1.0]),
    (
        "fma.rm.f32 $0, $1, $2, $3;",
        [(F32, [-1.0]), (F32, [1.0]), (F32, [-(2.0**-30)])],
        F32,
        [np.nextafter(np.float32(-1), np.float32(-2))],
    ),
    ("mov.f32 $0, $1;", [(F32, [-0.0, 1.5])], F32, [-0.0, 1.5]),
    ("mov.f64 $0, $1;", [(F64, [-0.0, 1.5])], F64, [-0.0, 1.5]),
    ("mul.f64 $0, $1, $2;", [(F64, [3.0]), (F64, [2.0**-900])], F64, [3 * 2.0**-900]),
    ("neg.f64 $0, $1;", [(F64, [3.0])], F64, [-3.0]),
    ("neg.s64 $0, $1;", [(S64, [2**40])], S64, [-(2**40)]),
    ("min.s64 $0, $1, $2;", [(S64, [-(2**40)]), (S64, [1])], S64, [-(2**40)]),
    ("not.b16 $0, $1;", [(U16, [0xF0])], U16, [0xFF0F]),
    ("or.b16 $0, $1, $2;", [(U16, [12]), (U16, [10])], U16, [14]),
    ("xor.b64 $0, $1, $2;", [(U64, [2**40 + 1]), (U64, [1])], U64, [2**40]),
    ("shr.u16 $0, $1, $2;", [(U16, [0x8000, 0x8000]), (U32, [15, 16])], U16, [1, 0]),
    ("rcp.rn.f32 $0, $1;", [(F32, [4.0, 3.0])], F32, [0.25, np.float32(1) / np.float32(3)]),
    ("rcp.rn.f64 $0, $1;", [(F64, [3.0])], F64, [1 / 3]),
    ("sqrt.rn.f64 $0, $1;", [(F64, [2.0, 9.0])], F64, [2**0.5, 3.0]),
]
COMPARED = [
    ("eq.s16", S16, [-1, 2], [-1, 3], [1, 0]),
    ("gt.s16", S16, [-1, 2], [1, 1], [0, 1]),
    ("ne.s16", S16, [-1, 2], [-1, 3], [0, 1]),
    ("ne.b16", U16, [0xFFFF, 2], [0xFFFF, 3], [0, 1]),
    ("eq.s64", S64, [-(2**40), 2], [-(2**40), 3], [1, 0]),
    ("ne.b64", U64, [2**63, 2], [2**63, 3], [0, 1]),
    ("gt.u32", U32, [2**31, 1], [1, 2**31], [1, 0]),
    ("le.s32", np.dtype("i4"), [-1, 2], [-1, 1], [1, 0]),
    ("lt.s64", S64, [-(2**40), 2], [1, 2], [1, 0]),
    ("le.s64", S64, [-(2**40), 2], [1, 1], [1, 0]),
    ("ge.s64", S64, [-(2**40), 1], [1, 1], [0, 1]),
    ("ne.s64", S64, [-(2**40), 1], [1, 1], [1, 0]),
    ("le.u32", U32, [2**31, 1], [1, 2**31], [0, 1]),
    ("lt.u64", U64, [2**63, 1], [1, 2**63], [0, 1]),
]


@pytest.mark.parametrize(
    ("text", "inputs", "result", "expected"), SCALAR, ids=lambda v: str(v)[:24]
)
def test_scalar(text: str, inputs: list, result: np.dtype, expected: list) -> None:
    arrays = [np.array(values, dtype) for dtype, values in inputs]
    got = evaluate(text, *arrays, result=result.str)
    bits = f"u{result.itemsize}"
    np.testing.assert_array_equal(got.view(bits), np.array(expected, result).view(bits))


@pytest.mark.parametrize(("form", "dtype", "a", "b", "expected"), COMPARED, ids=lambda v: str(v))
def test_setp(form: str, dtype: np.dtype, a: list, b: list, expected: list) -> None:
    text = f"setp.{form} %p1, $1, $2; selp.u32 $0, 1, 0, %p1;"
    got = evaluate(text, np.array(a, dtype), np.array(b, dtype), result="u4")
    assert got.tolist() == expected


@pytest.mark.parametrize(
    ("form", "dtype"), [("b16", U16), ("u16", U16), ("b64", U64), ("u64", U64), ("f32", F32)]
)
def test_selp(form: str, dtype: np.dtype) -> None:
    text = f"setp.lt.u32 %p1, %t, 1; selp.{form} $0, $1, $2, %p1;"
    a, b = np.array([5, 6], dtype), np.array([7, 8], dtype)
    assert evaluate(text, a, b, result=dtype.str).tolist() == [5, 8]


# ---- loads and stores ----------------------------------------------------------------------

MEMORY = [
    "ld.global.cg.v4.f32",
    "ld.global.nc.L1::no_allocate.L2::128B.v4.u32",
    "ld.global.nc.u16",
    "st.global.v4.u32",
    "ld.global.cg.f32",
    "ld.global.u16",
    "ld.shared.s32",
    "ld.shared.u8",
    "ld.shared.v4.u32",
    "st.global.v2.f32",
    "st.global.v4.f32",
    "st.shared.u16",
    "st.shared.u8",
    "st.shared.v4.f32",
    "ld.global.f32",
    "ld.global.f64",
    "ld.global.u32",
    "ld.global.u64",
    "ld.global.nc.u32",
    "ld.global.v4.u32",
    "ld.local.u32",
    "ld.shared.b16",
    "ld.shared.b64",
    "ld.shared.f32",
    "ld.shared.u32",
    "ld.shared.v2.b16",
    "ld.shared.v2.b64",
    "ld.shared.v4.b16",
    "ld.shared.v2.u32",
    "st.global.f32",
    "st.global.f64",
    "st.global.u64",
    "st.local.u32",
    "st.local.v4.u32",
    "st.shared.f32",
    "st.shared.u32",
    "st.shared.v4.u32",
    "st.shared::cta.b16",
    "st.shared::cta.v2.b8",
    "st.shared::cta.v4.b8",
    "st.relaxed.gpu.global.u32",
    "ld.acquire.gpu.global.u32",
    "ld.shared.b8",
    "ld.shared.v2.b32",
    "st.global.u32",
    "st.shared.v2.b32",
    "st.shared::cta.v2.b16",
    "st.shared::cta.v2.b32",
    "st.shared::cta.v4.b16",
]
REGISTER = {8: "%h", 16: "%h", 32: "%r", 64: "%d"}


@pytest.mark.parametrize("form", MEMORY)
def test_memory(form: str) -> None:
    """Sixteen bytes go through the space; the form moves its share of them unchanged."""
    match = re.search(r"(?:\.v(\d))?\.[a-z](\d+)$", form)
    assert match is not None
    count, unit = int(match[1] or 1), int(match[2])
    registers = [f"{REGISTER[unit]}{20 + i}" for i in range(count)]
    operand = registers[0] if count == 1 else "{" + ", ".join(registers) + "}"
    space = next(name for name in ("global", "shared", "local") if name in form)
    place = {"global": "%a2", "shared": "smem", "local": "stack"}[space]
    words = range(0, 16, 4)
    each = list(zip(registers, range(0, 16, unit // 8), strict=False))
    if form.startswith("ld"):
        there = [f"ld.global.b32 %r1, [%a0+{i}]; st.{space}.b32 [{place}+{i}], %r1;" for i in words]
        back = [f"st.global.b{unit} [%a1+{i}], {name};" for name, i in each]
        body = "".join([*there, f"{form} {operand}, [{place}];", *back])
    else:
        there = [f"ld.global.b{unit} {name}, [%a0+{i}];" for name, i in each]
        clear = [f"st.{space}.b32 [{place}+{i}], 0;" for i in words]
        back = [f"ld.{space}.b32 %r1, [{place}+{i}]; st.global.b32 [%a1+{i}], %r1;" for i in words]
        body = "".join([*clear, *there, f"{form} [{place}], {operand};", *back])
    data, out, middle = (np.zeros(16, np.uint8) for _ in range(3))
    data[:] = np.arange(0xA1, 0xB1)
    body = ".local .align 16 .b8 stack[16];" + body
    findings(body, data, out, middle, threads=1, shared=16).check()
    moved = count * unit // 8
    assert out.tolist() == [*data[:moved], *[0] * (16 - moved)]


def test_copy_with_a_prefetch_hint() -> None:
    out, data = np.zeros(4, np.uint32), np.array([5, 6, 7, 8], np.uint32)
    body = """cp.async.cg.shared.global.L2::128B [smem], [%a0], 16, 12; cp.async.wait_all;
        ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [smem];
        st.global.v4.b32 [%a1], {%r1, %r2, %r3, %r4};"""
    findings(body, data, out, threads=1, shared=16).check()
    assert out.tolist() == [5, 6, 7, 0]


def test_parameters_as_vectors() -> None:
    out = np.zeros(10, np.uint32)
    text = kernel(
        """ld.param.v2.u64 {%d1, %d2}, [p]; ld.param.v2.u32 {%r1, %r2}, [p+16];
        ld.param.v4.u32 {%r3, %r4, %r5, %r6}, [p+32]; st.global.b64 [%d1], %d2;
        st.global.v2.b32 [%d1+8], {%r1, %r2}; st.global.v4.b32 [%d1+16], {%r3, %r4, %r5, %r6};""",
        0,
    ).replace("k()", "k(.param .align 16 .b8 p[48])")
    words = [np.int32(n) for n in (3, 4, 0, 0, 5, 6, 7, 8)]
    run(text, "k", 1, 1, [Struct(out, np.int64(2**32 + 1), *words)]).check()
    assert out.tolist() == [1, 1, 3, 4, 5, 6, 7, 8, 0, 0]


@pytest.mark.parametrize(
    "form", ["atom.global.add.u32", "atom.shared.add.u32", "atom.global.add.f32"]
)
def test_atom(form: str) -> None:
    """Four lanes add 1: each old value is returned once."""
    one = "0f3F800000" if form.endswith("f32") else "1"
    at = "[%a0]" if "global" in form else "[smem]"
    body = f"""st.shared.b32 [smem], 0; bar.sync 0; {form} %r1, {at}, {one};
        mul.wide.u32 %w, %t, 4; add.s64 %d1, %a1, %w; st.global.b32 [%d1], %r1;"""
    out = np.zeros(4, np.float32 if form.endswith("f32") else np.uint32)
    findings(body, np.zeros(1, np.uint32), out.view(np.uint32), threads=4, shared=16).check()
    assert sorted(out.tolist()) == [0, 1, 2, 3]


def test_store_to_a_peer_and_wait_with_cluster_scope() -> None:
    out = np.zeros((2, 2), np.uint32)
    sync = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    body = f"""mov.u32 %r10, %cluster_ctarank; xor.b32 %r11, %r10, 1; mov.u32 %r12, smem;
        mbarrier.init.shared::cta.b64 [smem], 1; fence.mbarrier_init.release.cluster; {sync}
        mapa.shared::cluster.u32 %r14, %r12, %r11; add.s32 %r13, %r10, 40;
        st.shared::cluster.v2.u32 [%r14+8], {{%r13, %r10}};
        mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r14];
        WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p1, [smem], 0;
        @!%p1 bra WAIT; ld.shared.v2.u32 {{%r1, %r2}}, [smem+8];
        mul.wide.u32 %w, %r10, 8; add.s64 %d1, %a0, %w; st.global.v2.b32 [%d1], {{%r1, %r2}};"""
    for schedule in EVERY_SCHEDULE:
        options = {"threads": 1, "grid": 2, "cluster": 2, "shared": 16, "schedule": schedule}
        findings(body, Uninitialised(out), **options).check()
        assert out.tolist() == [[41, 1], [40, 0]]


@pytest.mark.parametrize("vector", ["", ".v4"])
def test_atom_with_release_and_acquire(vector: str) -> None:
    four, one = "{%r2, %r3, %r4, %r5}", "0f3F800000"
    got, add = (four, f"{{{one}, {one}, {one}, {one}}}") if vector else ("%r2", one)
    body = f"""atom.global.gpu.acq_rel.add{vector}.f32 {got}, [%a0], {add};
        mul.wide.u32 %w, %t, 4; add.s64 %d1, %a1, %w; st.global.b32 [%d1], %r2;"""
    total, old = np.zeros(4, np.float32), np.zeros(4, np.float32)
    findings(body, total.view(np.uint32), old.view(np.uint32), threads=4).check()
    assert total.tolist() == ([4.0] * 4 if vector else [4.0, 0.0, 0.0, 0.0])
    assert sorted(old.tolist()) == [0.0, 1.0, 2.0, 3.0]


def test_number_as_a_parameter() -> None:
    out = np.zeros(1, np.uint32)
    text = kernel("ld.param.u64 %d1, [p]; ld.param.s32 %r1, [n]; st.global.b32 [%d1], %r1;", 0)
    text = text.replace("k()", "k(.param .u64 p, .param .s32 n)")
    run(text, "k", 1, 1, [out, np.int32(-7)]).check()
    assert out.view(np.int32).tolist() == [-7]


def test_warp_maximum_of_floats() -> None:
    out = np.zeros(32, np.float32)
    body = """cvt.rn.f32.u32 %r2, %t; neg.f32 %r2, %r2; redux.sync.max.f32 %r1, %r2, -1;
        mul.wide.u32 %w, %t, 4; add.s64 %d1, %a0, %w; st.global.b32 [%d1], %r1;"""
    findings(body, Uninitialised(out.view(np.uint32))).check()
    assert (out == 0.0).all()


def test_barrier_of_some_warps() -> None:
    """`barrier.sync` orders the 64 threads that take part."""
    body = """setp.ge.u32 %p1, %t, 64; @%p1 bra DONE; setp.eq.u32 %p2, %t, 0;
        @%p2 st.shared.b32 [smem], 7; MEET setp.eq.u32 %p3, %t, 40; @%p3 ld.shared.b32 %r1, [smem];
        DONE:"""
    for meet, kinds in (("barrier.sync 1, 64;", set()), ("", {"race"})):
        report = findings(body.replace("MEET", meet), threads=96, shared=16)
        assert report.kinds() == kinds


# ---- matrices ------------------------------------------------------------------------------


def matrix_register(matrix: int, thread: int, trans: bool) -> int:
    """Two elements of an 8 x 8 matrix of the numbers 64 * matrix + 8 * row + column.

    Thread t holds columns 2 (t % 4) and one more of row t / 4; transposed, those rows of column
    t / 4."""
    a, b = thread // 4, 2 * (thread % 4)
    first, second = (8 * b + a, 8 * (b + 1) + a) if trans else (8 * a + b, 8 * a + b + 1)
    return 64 * matrix + first | (64 * matrix + second) << 16


ROW = "shl.b32 %r1, %t, 4; mov.u32 %r2, smem; add.s32 %r1, %r1, %r2;"
OUT = "mul.wide.u32 %w, %t, 16; add.s64 %d1, %a1, %w;"


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, trans: str) -> None:
    """Thread t gives the address of row t; registers of matrices that are not loaded stay 0."""
    registers = ", ".join(f"%r{20 + i}" for i in range(count))
    body = f"""{ROW} mul.wide.u32 %w, %t, 16; add.s64 %d1, %a0, %w;
        ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%d1];
        st.shared.v4.b32 [%r1], {{%r3, %r4, %r5, %r6}};
        bar.sync 0; mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r1];
        {OUT} st.global.v4.b32 [%d1], {{%r20, %r21, %r22, %r23}};"""
    out = np.zeros((32, 4), np.uint32)
    findings(body, np.arange(256, dtype=np.uint16), Uninitialised(out), shared=512).check()
    for t in range(32):
        expected = [matrix_register(i, t, bool(trans)) if i < count else 0 for i in range(4)]
        assert out[t].tolist() == expected


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count: int, trans: str) -> None:
    """The inverse: fragments of the same numbers give rows in memory."""
    given = [[matrix_register(i, t, bool(trans)) for i in range(4)] for t in range(32)]
    registers = ", ".join(f"%r{20 + i}" for i in range(count))
    body = f"""{ROW} mul.wide.u32 %w, %t, 16; add.s64 %d1, %a0, %w; mov.b32 %r3, 0;
        st.shared.v4.b32 [%r1], {{%r3, %r3, %r3, %r3}}; bar.sync 0;
        ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%d1];
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r1], {{{registers}}};
        bar.sync 0; {OUT} ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r1];
        st.global.v4.b32 [%d1], {{%r20, %r21, %r22, %r23}};"""
    out = np.zeros(256, np.uint16)
    findings(body, np.array(given, np.uint32), Uninitialised(out), shared=512).check()
    assert out.tolist() == [n if n < 64 * count else 0 for n in range(256)]


@pytest.mark.parametrize(
    ("shape", "kind", "k", "width"), [("m16n8k16", "f16", 16, 2), ("m16n8k8", "tf32", 8, 1)]
)
def test_mma(shape: str, kind: str, k: int, width: int) -> None:
    """Fragments by the ISA's figures: group g = t / 4 is the row of A and C and the column of B."""
    rng = np.random.default_rng(0)
    dtype = np.float16 if kind == "f16" else np.float32
    a, b = (rng.integers(-4, 5, size).astype(dtype) for size in ((16, k), (k, 8)))
    given = np.zeros((32, 8), np.uint32)
    for t in range(32):
        g, low = t // 4, width * (t % 4)
        for i in range(4):
            first = low + (i // 2) * (k // 2)
            row = a[g + 8 * (i % 2), first : first + width]
            given[t, i] = row.view(np.uint32)[0]
        for i in range(2):
            first = low + i * (k // 2)
            given[t, 4 + i] = np.ascontiguousarray(b[first : first + width, g]).view(np.uint32)[0]
    body = f"""mul.wide.u32 %w, %t, 32; add.s64 %d1, %a0, %w; mov.b32 %r10, 0;
        ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%d1]; ld.global.v2.b32 {{%r5, %r6}}, [%d1+16];
        mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{%r20, %r21, %r22, %r23}},
            {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%r10, %r10, %r10, %r10}};
        {OUT} st.global.v4.b32 [%d1], {{%r20, %r21, %r22, %r23}};"""
    out = np.zeros((32, 4), np.float32)
    findings(body, given, Uninitialised(out.view(np.uint32))).check()
    c = a.astype(np.float64) @ b
    for t in range(32):
        g, low = t // 4, 2 * (t % 4)
        assert out[t].tolist() == [*c[g, low : low + 2], *c[g + 8, low : low + 2]]


# ---- tensor memory -------------------------------------------------------------------------


def through_tensor_memory(columns: int, move: str, registers: int) -> np.ndarray:
    """The registers from %r0 of every thread of one warp after `move`; %r40 is the address."""
    body = "".join(
        [
            "mov.u32 %r290, smem; tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32",
            f" [%r290], {max(columns, 32)}; bar.sync 0; ld.shared.b32 %r291, [smem]; {move}",
            f"mul.wide.u32 %w, %t, {4 * registers}; add.s64 %d1, %a0, %w;",
            *(f"st.global.b32 [%d1+{4 * r}], %r{r};" for r in range(registers)),
            f"tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r291, {max(columns, 32)};",
        ]
    )
    out = np.zeros((32, registers), np.uint32)
    findings(body, Uninitialised(out), shared=16).check()
    return out


def listed(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


STORED, LOADED = "tcgen05.wait::st.sync.aligned;", "tcgen05.wait::ld.sync.aligned;"


def numbered(columns: int) -> str:
    """Cell (lane, column) holds 1000 lane + column, from one-column stores."""
    lines = [
        f"mad.lo.s32 %r140, %t, 1000, {c}; add.s32 %r292, %r291, {c};"
        "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r292], {%r140};"
        for c in range(columns)
    ]
    return "".join(lines) + STORED


@pytest.mark.parametrize("num", [1, 2, 4, 8, 16, 32, 64, 128])
def test_tensor_memory_32x32b(num: int) -> None:
    """Thread t and register r: lane t, column r."""
    expected = 1000 * np.arange(32)[:, None] + np.arange(num)
    load = f"tcgen05.ld.sync.aligned.32x32b.x{num}.b32 {listed(0, num)}, [%r291]; {LOADED}"
    np.testing.assert_array_equal(through_tensor_memory(num, numbered(num) + load, num), expected)
    fill = "".join(f"mad.lo.s32 %r{150 + r}, %t, 1000, {r};" for r in range(num))
    store = f"{fill} tcgen05.st.sync.aligned.32x32b.x{num}.b32 [%r291], {listed(150, num)};{STORED}"
    one = "".join(
        f"add.s32 %r292, %r291, {c}; tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r{c}}}, [%r292];"
        for c in range(num)
    )
    np.testing.assert_array_equal(through_tensor_memory(num, store + one + LOADED, num), expected)


@pytest.mark.parametrize("num", [1, 2, 4, 8, 16, 32, 64])
def test_tensor_memory_16x32bx2(num: int) -> None:
    """Threads 0-15: lane t, column r; threads 16-31: lane t - 16, column r + the split."""
    t, r = np.arange(32)[:, None], np.arange(num)
    load = f"""tcgen05.ld.sync.aligned.16x32bx2.x{num}.b32 {listed(0, num)}, [%r291], {num};
        {LOADED}"""
    expected = 1000 * (t % 16) + r + num * (t // 16)
    got = through_tensor_memory(2 * num, numbered(2 * num) + load, num)
    np.testing.assert_array_equal(got, expected)
    fill = "".join(f"mad.lo.s32 %r{150 + i}, %t, 1000, {i};" for i in range(num))
    store = f"""{fill} tcgen05.st.sync.aligned.16x32bx2.x{num}.b32 [%r291], {num},
        {listed(150, num)}; {STORED}"""
    back = f"tcgen05.ld.sync.aligned.32x32b.x{2 * num}.b32 {listed(0, 2 * num)}, [%r291]; {LOADED}"
    got = through_tensor_memory(2 * num, numbered(2 * num) + store + back, 2 * num)
    lane, column = np.arange(32)[:, None], np.arange(2 * num)
    thread = lane + 16 * (column // num)
    stored = 1000 * thread + column % num
    np.testing.assert_array_equal(got, np.where(lane < 16, stored, 1000 * lane + column))
