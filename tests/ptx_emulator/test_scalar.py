"""Scalar opcodes on values worked out from the ISA's descriptions."""

from __future__ import annotations

import numpy as np
import pytest

from . import UnknownInstruction
from .harness import evaluate, kernel
from .launch import run

U32, S32, U64, S64, F32, F64, U16 = (
    np.dtype(t) for t in ("u4", "i4", "u8", "i8", "f4", "f8", "u2")
)
INF, NAN = float("inf"), float("nan")

INTEGER = [
    # instruction, inputs, result type, expected
    ("add.s32 $0, $1, $2;", [(S32, [2**31 - 1, -5]), (S32, [1, 3])], S32, [-(2**31), -2]),
    ("add.s64 $0, $1, $2;", [(S64, [2**40]), (S64, [-1])], S64, [2**40 - 1]),
    ("add.s16 $0, $1, $2;", [(U16, [0x7FFF, 0xFFFB]), (U16, [1, 3])], U16, [0x8000, 0xFFFE]),
    ("sub.s16 $0, $1, $2;", [(U16, [0x8000, 3]), (U16, [1, 5])], U16, [0x7FFF, 0xFFFE]),
    ("sub.s32 $0, $1, $2;", [(S32, [3]), (S32, [5])], S32, [-2]),
    ("mul.lo.s32 $0, $1, $2;", [(S32, [65536]), (S32, [65537])], S32, [65536]),
    ("mul.hi.u32 $0, $1, $2;", [(U32, [2**31]), (U32, [6])], U32, [3]),
    ("mul.hi.s32 $0, $1, $2;", [(S32, [-1]), (S32, [5])], S32, [-1]),
    ("mul.hi.u64 $0, $1, $2;", [(U64, [2**63]), (U64, [6])], U64, [3]),
    ("mul.hi.s64 $0, $1, $2;", [(S64, [-1]), (S64, [5])], S64, [-1]),
    ("mul.wide.s32 $0, $1, $2;", [(S32, [-3]), (S32, [2**30])], S64, [-3 * 2**30]),
    ("mul.wide.u32 $0, $1, $2;", [(U32, [2**31]), (U32, [4])], U64, [2**33]),
    ("mul.lo.s64 $0, $1, $2;", [(S64, [-3]), (S64, [2**33])], S64, [-3 * 2**33]),
    ("mad.lo.s32 $0, $1, $2, $3;", [(S32, [7]), (S32, [6]), (S32, [-2])], S32, [40]),
    ("mad.lo.s64 $0, $1, $2, $3;", [(S64, [7]), (S64, [6]), (S64, [-2])], S64, [40]),
    ("mad.wide.s32 $0, $1, $2, $3;", [(S32, [-7]), (S32, [6]), (S64, [2])], S64, [-40]),
    ("mad.wide.u32 $0, $1, $2, $3;", [(U32, [2**31]), (U32, [2]), (U64, [5])], U64, [2**32 + 5]),
    ("div.s32 $0, $1, $2;", [(S32, [-7, 7]), (S32, [2, -2])], S32, [-3, -3]),
    ("rem.s32 $0, $1, $2;", [(S32, [-7, 7]), (S32, [2, -2])], S32, [-1, 1]),
    ("div.u32 $0, $1, $2;", [(U32, [2**32 - 1]), (U32, [2])], U32, [2**31 - 1]),
    ("div.s64 $0, $1, $2;", [(S64, [-(2**40)]), (S64, [3])], S64, [-(2**40 // 3)]),
    ("min.s32 $0, $1, $2;", [(S32, [-1]), (S32, [1])], S32, [-1]),
    ("max.s32 $0, $1, $2;", [(S32, [-1]), (S32, [1])], S32, [1]),
    ("max.u32 $0, $1, $2;", [(U32, [2**32 - 1]), (U32, [1])], U32, [2**32 - 1]),
    ("abs.s32 $0, $1;", [(S32, [-4])], S32, [4]),
    ("neg.s32 $0, $1;", [(S32, [4])], S32, [-4]),
    ("and.b32 $0, $1, $2;", [(U32, [12]), (U32, [10])], U32, [8]),
    ("or.b32 $0, $1, $2;", [(U32, [12]), (U32, [10])], U32, [14]),
    ("or.b64 $0, $1, $2;", [(U64, [2**40]), (U64, [1])], U64, [2**40 + 1]),
    ("and.b64 $0, $1, $2;", [(U64, [2**40 + 1]), (U64, [1])], U64, [1]),
    ("and.b16 $0, $1, $2;", [(U16, [12]), (U16, [10])], U16, [8]),
    ("xor.b32 $0, $1, $2;", [(U32, [12]), (U32, [10])], U32, [6]),
    ("not.b32 $0, $1;", [(U32, [0])], U32, [2**32 - 1]),
    ("shl.b32 $0, $1, $2;", [(U32, [3, 3, 3]), (U32, [1, 31, 32])], U32, [6, 2**31, 0]),
    ("shl.b64 $0, $1, $2;", [(U64, [3, 3]), (U32, [40, 64])], U64, [3 * 2**40, 0]),
    ("shr.u32 $0, $1, $2;", [(U32, [2**31, 8]), (U32, [31, 99])], U32, [1, 0]),
    ("shr.s32 $0, $1, $2;", [(S32, [-8, -8]), (U32, [1, 99])], S32, [-4, -1]),
    (
        "shr.s16 $0, $1, $2;",
        [(U16, [0xFFF8, 0xFFF8, 8]), (U32, [1, 99, 1])],
        U16,
        [0xFFFC, 0xFFFF, 4],
    ),
    ("cvt.s16.s8 $0, $1;", [(U16, [0x1FF, 0x7F, 0x80])], U16, [0xFFFF, 0x7F, 0xFF80]),
    ("shr.u64 $0, $1, $2;", [(U64, [2**40]), (U32, [39])], U64, [2]),
    ("shf.l.wrap.b32 $0, $1, $2, $3;", [(U32, [2**31]), (U32, [1]), (U32, [33])], U32, [3]),
    ("shf.r.wrap.b32 $0, $1, $2, $3;", [(U32, [4]), (U32, [1]), (U32, [1])], U32, [2**31 + 2]),
    ("shf.l.clamp.b32 $0, $1, $2, $3;", [(U32, [5]), (U32, [1]), (U32, [40])], U32, [5]),
    ("bfe.u32 $0, $1, 4, 8;", [(U32, [0xABCDE])], U32, [0xCD]),
    ("bfe.s32 $0, $1, 4, 8;", [(S32, [0xABCDE])], S32, [0xCD - 256]),
    ("bfe.s32 $0, $1, $2, $3;", [(S32, [-1, 8]), (U32, [40, 0]), (U32, [3, 4])], S32, [-1, -8]),
    (
        "bfe.u32 $0, $1, $2, $3;",
        [(U32, [2**32 - 1] * 2), (U32, [30, 0]), (U32, [8, 0])],
        U32,
        [3, 0],
    ),
    (
        "bfi.b32 $0, $1, $2, $3, $4;",
        [(U32, [0xF]), (U32, [0xAAAA]), (U32, [4]), (U32, [4])],
        U32,
        [0xAAFA],
    ),
    (
        "bfi.b64 $0, $1, $2, $3, $4;",
        [(U64, [1]), (U64, [0]), (U32, [40]), (U32, [1])],
        U64,
        [2**40],
    ),
    ("popc.b32 $0, $1;", [(U32, [0xF0F])], U32, [8]),
    ("clz.b32 $0, $1;", [(U32, [1, 0])], U32, [31, 32]),
    ("brev.b32 $0, $1;", [(U32, [1])], U32, [2**31]),
    ("bfind.u32 $0, $1;", [(U32, [0x100, 0])], U32, [8, 2**32 - 1]),
    ("lop3.b32 $0, $1, $2, $3, 0xE8;", [(U32, [12]), (U32, [10]), (U32, [6])], U32, [14]),
    ("prmt.b32 $0, $1, $2, 0x5410;", [(U32, [0x03020100]), (U32, [0x07060504])], U32, [0x05040100]),
    ("prmt.b32 $0, $1, $2, 0x0008;", [(U32, [0x80]), (U32, [0])], U32, [0x808080FF]),
    ("mov.b16 $0, $1;", [(U16, [7])], U16, [7]),
    ("mov.b32 $0, $1;", [(U32, [7])], U32, [7]),
    ("cvt.s64.s32 $0, $1;", [(S32, [-2])], S64, [-2]),
    ("cvt.u64.u32 $0, $1;", [(U32, [2**32 - 2])], U64, [2**32 - 2]),
    ("cvt.u32.u64 $0, $1;", [(U64, [2**32 + 3])], U32, [3]),
    ("cvt.u32.u16 $0, $1;", [(U16, [65535])], U32, [65535]),
    ("cvt.s32.s16 $0, $1;", [(U16, [65535])], S32, [-1]),
    ("cvt.sat.u8.s32 $0, $1;", [(S32, [300, -4])], U16, [255, 0]),
]


@pytest.mark.parametrize(
    ("instruction", "inputs", "result", "expected"),
    INTEGER,
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_integer(instruction: str, inputs, result, expected) -> None:
    got = evaluate(instruction, *(np.array(v, t) for t, v in inputs), result=result)
    assert got.tolist() == expected


def bf16(*values: float) -> tuple:
    return U16, [int(np.float32(v).view(np.uint32)) >> 16 for v in values]


def f16(*values: float) -> tuple:
    return U16, np.array(values, np.float16).view(np.uint16).tolist()


HALF_UP = 1.0 + 2.0**-24  # between 1 and the next f32
FLOAT = [
    ("add.f32 $0, $1, $2;", [(F32, [1.0, INF]), (F32, [2.0**-25, -INF])], F32, [1.0, NAN]),
    ("add.rz.f32 $0, $1, $2;", [(F32, [1.0]), (F32, [1.9 * 2.0**-24])], F32, [1.0]),
    ("add.rp.f32 $0, $1, $2;", [(F32, [1.0]), (F32, [2.0**-30])], F32, [1.0 + 2.0**-23]),
    ("sub.f32 $0, $1, $2;", [(F32, [1.5]), (F32, [0.25])], F32, [1.25]),
    ("mul.f32 $0, $1, $2;", [(F32, [3.0]), (F32, [-0.5])], F32, [-1.5]),
    ("mul.ftz.f32 $0, $1, $2;", [(F32, [2.0**-100]), (F32, [2.0**-40])], F32, [0.0]),
    (
        "fma.rn.f32 $0, $1, $2, $3;",
        [(F32, [1 + 2.0**-12]), (F32, [1 + 2.0**-12]), (F32, [-1.0])],
        F32,
        [2.0**-11 + 2.0**-24],
    ),
    ("div.full.f32 $0, $1, $2;", [(F32, [1.0]), (F32, [4.0])], F32, [0.25]),
    ("div.rn.f32 $0, $1, $2;", [(F32, [1.0]), (F32, [0.0])], F32, [INF]),
    ("max.f32 $0, $1, $2;", [(F32, [NAN, -0.0]), (F32, [2.0, 0.0])], F32, [2.0, 0.0]),
    ("min.NaN.f32 $0, $1, $2;", [(F32, [NAN]), (F32, [2.0])], F32, [NAN]),
    ("max.f32 $0, $1, $2, $3;", [(F32, [1.0]), (F32, [3.0]), (F32, [2.0])], F32, [3.0]),
    ("copysign.f32 $0, $1, $2;", [(F32, [-1.0]), (F32, [2.5])], F32, [-2.5]),
    ("neg.f32 $0, $1;", [(F32, [1.5])], F32, [-1.5]),
    ("abs.f32 $0, $1;", [(F32, [-1.5])], F32, [1.5]),
    ("ex2.approx.f32 $0, $1;", [(F32, [3.0, -INF])], F32, [8.0, 0.0]),
    ("ex2.approx.ftz.f32 $0, $1;", [(F32, [-130.0])], F32, [0.0]),
    ("lg2.approx.f32 $0, $1;", [(F32, [8.0])], F32, [3.0]),
    ("rcp.approx.f32 $0, $1;", [(F32, [4.0])], F32, [0.25]),
    ("rsqrt.approx.f32 $0, $1;", [(F32, [4.0])], F32, [0.5]),
    ("sqrt.rn.f32 $0, $1;", [(F32, [9.0])], F32, [3.0]),
    ("add.f64 $0, $1, $2;", [(F64, [1.0]), (F64, [2.0**-52])], F64, [1 + 2.0**-52]),
    (
        "fma.rn.f64 $0, $1, $2, $3;",
        [(F64, [1 + 2.0**-30]), (F64, [1 + 2.0**-30]), (F64, [-1.0])],
        F64,
        [2.0**-29 + 2.0**-60],
    ),
    ("cvt.f32.bf16 $0, $1;", [bf16(1.5, -INF)], F32, [1.5, -INF]),
    ("cvt.f32.f16 $0, $1;", [f16(0.1)], F32, [float(np.float16(0.1))]),
    ("cvt.rn.f32.s32 $0, $1;", [(S32, [2**24 + 1])], F32, [2.0**24]),
    ("cvt.rn.f32.u64 $0, $1;", [(U64, [2**63 + 2**39 + 1])], F32, [2.0**63 + 2.0**40]),
    ("cvt.rn.f32.f64 $0, $1;", [(F64, [HALF_UP, HALF_UP + 2.0**-40])], F32, [1.0, 1 + 2.0**-23]),
    ("cvt.f64.f32 $0, $1;", [(F32, [0.5])], F64, [0.5]),
    ("add.rn.f32.bf16 $0, $1, $2;", [bf16(1.5), (F32, [0.25])], F32, [1.75]),
    ("sub.rn.f32.bf16 $0, $1, $2;", [bf16(1.5), (F32, [0.25])], F32, [1.25]),
    ("fma.rn.f32.bf16 $0, $1, $2, $3;", [bf16(1.5), bf16(2.0), (F32, [0.25])], F32, [3.25]),
    ("cvt.rni.f32.f32 $0, $1;", [(F32, [2.5, -1.5])], F32, [2.0, -2.0]),
]


@pytest.mark.parametrize(
    ("instruction", "inputs", "result", "expected"),
    FLOAT,
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_float(instruction: str, inputs, result, expected) -> None:
    got = evaluate(instruction, *(np.array(v, t) for t, v in inputs), result=result)
    np.testing.assert_array_equal(got, np.array(expected, result))


TO_BITS = [
    # to bf16: 1 + 2^-8 is a tie and goes to the even 1.0; a bit more goes up
    (
        "cvt.rn.bf16.f32 $0, $1;",
        [(F32, [1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 3.4e38, NAN])],
        U16,
        [0x3F80, 0x3F81, 0x7F80, 0x7FFF],
    ),
    ("cvt.rz.bf16.f32 $0, $1;", [(F32, [1.999])], U16, [0x3FFF]),
    ("cvt.rn.f16.f32 $0, $1;", [(F32, [65520.0, 1.0, 2.0**-25])], U16, [0x7C00, 0x3C00, 0]),
    ("cvt.rn.bf16x2.f32 $0, $1, $2;", [(F32, [1.0]), (F32, [-2.0])], U32, [0x3F80C000]),
    ("cvt.rn.f16x2.f32 $0, $1, $2;", [(F32, [1.0]), (F32, [-2.0])], U32, [0x3C00C000]),
    ("cvt.rn.relu.bf16x2.f32 $0, $1, $2;", [(F32, [1.0]), (F32, [-2.0])], U32, [0x3F800000]),
    # tf32 keeps ten bits of the mantissa; rna rounds ties away from zero
    ("cvt.rna.tf32.f32 $0, $1;", [(F32, [1 + 2.0**-11])], U32, [0x3F802000]),
    ("cvt.rzi.s32.f32 $0, $1;", [(F32, [-1.9, 1e20, NAN])], S32, [-1, 2**31 - 1, 0]),
    ("cvt.rni.u32.f32 $0, $1;", [(F32, [2.5, -3.0])], U32, [2, 0]),
    ("cvt.rzi.s64.f32 $0, $1;", [(F32, [NAN])], S64, [-(2**63)]),
    ("add.f16x2 $0, $1, $2;", [(U32, [0x3C003C00]), (U32, [0x3C004000])], U32, [0x40004200]),
    ("mul.bf16x2 $0, $1, $2;", [(U32, [0x40003F80]), (U32, [0x40004040])], U32, [0x40804040]),
    (
        "fma.rn.bf16x2 $0, $1, $2, $3;",
        [(U32, [0x40003F80]), (U32, [0x40004040]), (U32, [0x3F803F80])],
        U32,
        [0x40A04080],
    ),
    (
        "mul.f32x2 $0, $1, $2;",
        [(U64, [0x400000003F800000]), (U64, [0x4000000040400000])],
        U64,
        [0x4080000040400000],
    ),
    (
        "add.f32x2 $0, $1, $2;",
        [(U64, [0x400000003F800000]), (U64, [0x400000003F800000])],
        U64,
        [0x4080000040000000],
    ),
    ("max.bf16x2 $0, $1, $2;", [(U32, [0x40003F80]), (U32, [0x3F804000])], U32, [0x40004000]),
]


@pytest.mark.parametrize(
    ("instruction", "inputs", "result", "expected"),
    TO_BITS,
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_float_to_bits(instruction: str, inputs, result, expected) -> None:
    got = evaluate(instruction, *(np.array(v, t) for t, v in inputs), result=result)
    assert got.tolist() == expected


COMPARE = [
    ("eq.s32", (S32, [1, 2]), (S32, [1, 1]), [1, 0]),
    ("ne.b32", (U32, [1, 2]), (U32, [1, 1]), [0, 1]),
    ("lt.s32", (S32, [-1, 1]), (S32, [0, 0]), [1, 0]),
    ("lt.u32", (S32, [-1, 1]), (S32, [0, 2]), [0, 1]),
    ("ge.s32", (S32, [-1, 0]), (S32, [0, 0]), [0, 1]),
    ("gt.s64", (S64, [2**40]), (S64, [1]), [1]),
    ("gt.u64", (U64, [2**63, 1, 5]), (U64, [1, 2**63, 5]), [1, 0, 0]),
    ("eq.b16", (U16, [3]), (U16, [3]), [1]),
    ("gt.f32", (F32, [1.0, NAN]), (F32, [0.0, 0.0]), [1, 0]),
    ("neu.f32", (F32, [NAN, 1.0]), (F32, [NAN, 1.0]), [1, 0]),
    ("ne.f32", (F32, [NAN]), (F32, [1.0]), [0]),
    ("nan.f32", (F32, [NAN, 1.0]), (F32, [1.0, 1.0]), [1, 0]),
    ("num.f32", (F32, [NAN, 1.0]), (F32, [1.0, 1.0]), [0, 1]),
]


@pytest.mark.parametrize(
    ("form", "a", "b", "expected"), COMPARE, ids=lambda v: v if isinstance(v, str) else ""
)
def test_compare_and_select(form: str, a, b, expected) -> None:
    code = f"setp.{form} %p1, $1, $2; selp.b32 $0, 1, 0, %p1;"
    got = evaluate(code, *(np.array(v, t) for t, v in (a, b)), result=U32)
    assert got.tolist() == expected


def test_setp_combines_with_a_predicate() -> None:
    """p = (a < b) and c, q = !(a < b) and c."""
    code = (
        "setp.ne.b32 %p3, $2, 0; setp.lt.and.s32 %p1|%p2, $1, 5, %p3;"
        "selp.b32 %r50, 1, 0, %p1; selp.b32 %r51, 2, 0, %p2; or.b32 $0, %r50, %r51;"
    )
    a, c = np.array([1, 9, 1], np.int32), np.array([1, 1, 0], np.int32)
    assert evaluate(code, a, c, result=U32).tolist() == [1, 2, 0]


def test_predicate_logic() -> None:
    code = (
        "setp.ne.b32 %p1, $1, 0; not.pred %p2, %p1; xor.pred %p3, %p1, %p2; and.pred %p4, %p3,"
        " %p1; or.pred %p5, %p4, %p2; mov.pred %p6, %p4; selp.b32 $0, 1, 0, %p6;"
        "@!%p5 add.s32 $0, $0, 100;"
    )
    assert evaluate(code, np.array([0, 3], np.uint32), result=U32).tolist() == [0, 1]


def test_mov_packs_low_element_first() -> None:
    assert evaluate(
        "mov.b32 {%h10, %h11}, $1; mov.b32 $0, {%h11, %h10};",
        np.array([0x11112222], np.uint32),
        result=U32,
    ).tolist() == [0x22221111]


@pytest.mark.parametrize(
    "instruction",
    [
        "frobnicate.s32 %r1, %r2;",
        "add.sat.u32 %r1, %r2, %r3;",
        "cvt.rn.e4m3x2.f32 %h1, %r1, %r2;",
        "mul.s32 %r1, %r2, %r3;",
        "ld.global.u128 %r1, [%a0];",
        "shfl.up.b32 %r1, %r2, 1, 0;",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r1}, {%r2}, {%r3}, {%r4};",
        "bar.sync.foo 0;",
        "st.async.b32 [%r1], %r2, [%r3];",
        "cvt.f32.f64 %r1, %d1;",
    ],
)
def test_unknown_instructions_raise_with_their_line(instruction: str) -> None:
    text = kernel(instruction, 1)
    line = text[: text.index(instruction)].count("\n") + 1
    with pytest.raises(UnknownInstruction, match=f"line {line}:"):
        run(text, "k", 1, 32, [np.zeros(4, np.uint32)])
