"""Corners of the scalar semantics, each value worked out from the sentence of the ISA it cites."""

from __future__ import annotations

import numpy as np
import pytest

from . import run
from .harness import evaluate, kernel

U32, S32, U64, S64, F32, F64, U16 = (
    np.dtype(t) for t in ("u4", "i4", "u8", "i8", "f4", "f8", "u2")
)
INF, NAN = float("inf"), float("nan")
TOP32, TOP64 = 2**32 - 1, 2**64 - 1
SMALL = 2.0**-130  # subnormal in f32

VALUES = [
    # mul: ".hi ... the upper half of the full product", signed or not by type
    ("mul.hi.s32 $0, $1, $2;", [(S32, [-(2**31)]), (S32, [-(2**31)])], S32, [2**30]),
    ("mul.hi.u32 $0, $1, $2;", [(U32, [TOP32]), (U32, [TOP32])], U32, [TOP32 - 1]),
    ("mul.hi.s64 $0, $1, $2;", [(S64, [-(2**63), -1]), (S64, [-1, -1])], S64, [0, 0]),
    ("mul.hi.u64 $0, $1, $2;", [(U64, [TOP64]), (U64, [TOP64])], U64, [TOP64 - 1]),
    (
        "mad.wide.s32 $0, $1, $2, $3;",
        [(S32, [-(2**31)]), (S32, [-1]), (S64, [-1])],
        S64,
        [TOP32 // 2],
    ),
    ("mul.wide.u16 $0, $1, $2;", [(U16, [65535]), (U16, [65535])], U32, [65535**2]),
    ("mul.wide.s16 $0, $1, $2;", [(U16, [65535]), (U16, [2])], S32, [-2]),
    # shifts: "amounts greater than the register width N are clamped to N"; shr.s keeps the sign
    ("shr.s64 $0, $1, $2;", [(S64, [-8, 8]), (U32, [64, TOP32])], S64, [-1, 0]),
    ("shr.b32 $0, $1, $2;", [(U32, [TOP32]), (U32, [32])], U32, [0]),
    ("shl.b16 $0, $1, $2;", [(U16, [3, 3]), (U32, [15, 16])], U16, [0x8000, 0]),
    ("shf.r.clamp.b32 $0, $1, $2, $3;", [(U32, [4]), (U32, [9]), (U32, [40])], U32, [9]),
    ("shf.l.wrap.b32 $0, $1, $2, $3;", [(U32, [4]), (U32, [9]), (U32, [32])], U32, [9]),
    # bfe: pos = b & 0xff, len = c & 0xff; sbit = a[min(pos + len - 1, msb)], 0 when len is 0
    ("bfe.s32 $0, $1, $2, $3;", [(S32, [-(2**31)]), (U32, [31]), (U32, [8])], S32, [-1]),
    ("bfe.s32 $0, $1, $2, $3;", [(S32, [-1]), (U32, [256 + 4]), (U32, [256])], S32, [0]),
    ("bfe.s64 $0, $1, $2, $3;", [(S64, [5 << 60]), (U32, [60]), (U32, [3])], S64, [-3]),
    ("bfe.u32 $0, $1, $2, $3;", [(U32, [TOP32]), (U32, [0]), (U32, [255])], U32, [TOP32]),
    # bfi: "for (i=0; i<len && pos+i<=msb; i++) f[pos+i] = a[i]"
    (
        "bfi.b32 $0, $1, $2, $3, $4;",
        [(U32, [TOP32] * 4), (U32, [0] * 4), (U32, [28, 32, 0, 256]), (U32, [9, 4, 32, 0])],
        U32,
        [0xF0000000, 0, TOP32, 0],
    ),
    # lop3: ta = 0xF0, tb = 0xCC, tc = 0xAA; the table of (a & b) ^ c
    (
        f"lop3.b32 $0, $1, $2, $3, {(0xF0 & 0xCC) ^ 0xAA};",
        [(U32, [0b11110000]), (U32, [0b11001100]), (U32, [0b10101010])],
        U32,
        [(0b11110000 & 0b11001100) ^ 0b10101010],
    ),
    # prmt: bytes of {b, a} are numbered b7..b0; msb = 1 replicates the sign of the byte
    ("prmt.b32 $0, $1, $2, 0x7c32;", [(U32, [0x33221100]), (U32, [0x776655F4])], U32, [0x77FF3322]),
    ("prmt.b32 $0, $1, 0, 0x3088;", [(U32, [0x7F000080])], U32, [0x7F80FFFF]),
    # clz and bfind of extreme values; bfind.s32 looks for the first bit that differs from the sign
    ("bfind.s32 $0, $1;", [(S32, [-1, -5, 0])], U32, [TOP32, 2, TOP32]),
    ("popc.b64 $0, $1;", [(U64, [TOP64])], U32, [64]),
    # integer min and max see the type, not the bits
    ("min.u32 $0, $1, $2;", [(S32, [-1]), (S32, [1])], U32, [1]),
    ("max.s16 $0, $1, $2;", [(U16, [65535]), (U16, [0])], U16, [0]),
    ("div.s32 $0, $1, $2;", [(S32, [-(2**31)]), (S32, [3])], S32, [-715827882]),
    ("rem.s32 $0, $1, $2;", [(S32, [-(2**31)]), (S32, [3])], S32, [-2]),
    # cvt among integers extends by the source's sign; .sat clamps to the target's range
    ("cvt.s32.s8 $0, $1;", [(U32, [0x1FF])], S32, [-1]),
    ("cvt.u32.u8 $0, $1;", [(U32, [0x1FF])], U32, [255]),
    ("cvt.s8.s32 $0, $1;", [(S32, [0x180])], S32, [-128]),
    ("cvt.u64.s32 $0, $1;", [(S32, [-1])], U64, [TOP64]),
    ("cvt.sat.s16.s32 $0, $1;", [(S32, [-40000, 40000])], S32, [-32768, 32767]),
    ("cvt.sat.u32.s64 $0, $1;", [(S64, [-1, 2**40])], U32, [0, TOP32]),
    # cvt to integers: clamps; NaN gives 0 "if source is not .f64 and destination is not .s64,
    # .u64", "otherwise 1 << (BitWidth(dst) - 1)"
    ("cvt.rni.s32.f32 $0, $1;", [(F32, [0.5, 1.5, -0.5, -INF])], S32, [0, 2, 0, -(2**31)]),
    ("cvt.rmi.s32.f32 $0, $1;", [(F32, [-0.25, 0.75])], S32, [-1, 0]),
    ("cvt.rpi.s32.f32 $0, $1;", [(F32, [-0.25, 0.25])], S32, [0, 1]),
    ("cvt.rzi.u64.f32 $0, $1;", [(F32, [NAN, INF, -1.0])], U64, [2**63, TOP64, 0]),
    ("cvt.rzi.s32.f64 $0, $1;", [(F64, [NAN, 3e9])], S32, [-(2**31), 2**31 - 1]),
    ("cvt.rzi.u32.f32 $0, $1;", [(F32, [NAN, 4294967040.0])], U32, [0, 4294967040]),
    ("cvt.rzi.s64.f64 $0, $1;", [(F64, [2.0**63, -(2.0**63)])], S64, [2**63 - 1, -(2**63)]),
    # integer to float is rounded once: ties to even also beyond 53 bits
    (
        "cvt.rn.f64.s64 $0, $1;",
        [(S64, [2**53 + 1, 2**53 + 3, -(2**53) - 1])],
        F64,
        [2.0**53, 2.0**53 + 4, -(2.0**53)],
    ),
    ("cvt.rn.f64.u64 $0, $1;", [(U64, [TOP64])], F64, [2.0**64]),
    ("cvt.rz.f32.u32 $0, $1;", [(U32, [TOP32])], F32, [TOP32 - 255]),
    ("cvt.rp.f32.s32 $0, $1;", [(S32, [2**24 + 1])], F32, [2.0**24 + 2]),
    # .ftz flushes f32 inputs and results, .sat clamps to [0, 1] and turns NaN to +0
    ("cvt.ftz.f64.f32 $0, $1;", [(F32, [SMALL])], F64, [0.0]),
    ("cvt.f64.f32 $0, $1;", [(F32, [SMALL])], F64, [SMALL]),
    ("cvt.rn.ftz.f32.f64 $0, $1;", [(F64, [SMALL])], F32, [0.0]),
    ("cvt.sat.f32.f32 $0, $1;", [(F32, [NAN, -2.0, 0.25, 7.0])], F32, [0.0, 0.0, 0.25, 1.0]),
    ("cvt.rpi.ftz.f32.f32 $0, $1;", [(F32, [SMALL, 0.5])], F32, [0.0, 1.0]),
    ("add.sat.f32 $0, $1, $2;", [(F32, [NAN, 3.0]), (F32, [1.0, 1.0])], F32, [0.0, 1.0]),
    # rounding modes
    ("add.rm.f32 $0, $1, $2;", [(F32, [1.0]), (F32, [-(2.0**-60)])], F32, [1 - 2.0**-24]),
    ("add.rz.f32 $0, $1, $2;", [(F32, [-1.0]), (F32, [2.0**-60])], F32, [-1 + 2.0**-24]),
    ("mul.rp.f32 $0, $1, $2;", [(F32, [3e38]), (F32, [-10.0])], F32, [-np.finfo(F32).max]),
    (
        "fma.rz.f32 $0, $1, $2, $3;",
        [(F32, [1.0]), (F32, [1.0]), (F32, [-(2.0**-60)])],
        F32,
        [1 - 2.0**-24],
    ),
    ("mul.rn.f32 $0, $1, $2;", [(F32, [2.0**-75]), (F32, [2.0**-75])], F32, [0.0]),
    # min and max: "if one of the inputs is NaN, the result is the other", "+0.0 > -0.0"
    ("min.f32 $0, $1, $2;", [(F32, [NAN, 1.0, NAN]), (F32, [1.0, NAN, NAN])], F32, [1.0, 1.0, NAN]),
    ("max.NaN.f32 $0, $1, $2;", [(F32, [1.0, 0.5]), (F32, [NAN, 0.25])], F32, [NAN, 0.5]),
    ("max.ftz.f32 $0, $1, $2;", [(F32, [SMALL]), (F32, [-1.0])], F32, [0.0]),
    # approximations are exact here; their special values are the documented ones
    ("ex2.approx.f32 $0, $1;", [(F32, [0.0, INF, NAN, -149.0])], F32, [1.0, INF, NAN, 2.0**-149]),
    ("rcp.approx.f32 $0, $1;", [(F32, [0.0, -0.0, -INF])], F32, [INF, -INF, -0.0]),
    ("rcp.approx.ftz.f32 $0, $1;", [(F32, [SMALL, 2.0**127])], F32, [INF, 0.0]),
    ("rcp.approx.ftz.f64 $0, $1;", [(F64, [2.0**-200, 2.0**-1040])], F64, [2.0**200, INF]),
    ("rsqrt.approx.f32 $0, $1;", [(F32, [0.0, -1.0, INF])], F32, [INF, NAN, 0.0]),
    ("lg2.approx.f32 $0, $1;", [(F32, [0.0, -1.0, 1.0])], F32, [-INF, NAN, 0.0]),
    ("div.full.f32 $0, $1, $2;", [(F32, [1.0, 0.0]), (F32, [-0.0, 0.0])], F32, [-INF, NAN]),
]

BITS = [
    # signs of zero
    ("max.f32 $0, $1, $2;", [(F32, [0.0, -0.0]), (F32, [-0.0, -0.0])], U32, [0, 2**31]),
    ("min.f32 $0, $1, $2;", [(F32, [0.0]), (F32, [-0.0])], U32, [2**31]),
    ("mul.ftz.f32 $0, $1, $2;", [(F32, [-SMALL]), (F32, [1.0])], U32, [2**31]),
    # fma rounds once: (1 + 2^-10)^2 - 1 = 2^-9 + 2^-20, a tie that goes to the even 2^-9
    (
        "fma.rn.f16x2 $0, $1, $2, $3;",
        [(U32, [0x3C013C01]), (U32, [0x3C013C00]), (U32, [0xBC00BC00])],
        U32,
        [0x18001400],
    ),
    # bf16: 1.0078125 ** 2 - 1 = 2^-6 + 2^-14, half an ulp of 2^-6 is 2^-14: the tie goes to even
    (
        "fma.rn.bf16 $0, $1, $2, $3;",
        [(U16, [0x3F81, 0x3F81]), (U16, [0x3F81, 0x3F80]), (U16, [0xBF80, 0xBF80])],
        U16,
        [0x3C80, 0x3C00],
    ),
    # pairs round once each: (1 + 2^-23)^2 - (1 + 2^-22) = 2^-46, and (1 + 2^-12)^2 + 2^-60 lies
    # above the tie between 1 + 2^-11 and its neighbour
    (
        "fma.rn.f32x2 $0, $1, $2, $3;",
        [(U64, [0x3F8008003F800001])] * 2 + [(U64, [0x21800000BF800002])],
        U64,
        [0x3F80100128800000],
    ),
    # subnormal pairs: kept, flushed with .ftz
    ("add.f16x2 $0, $1, $2;", [(U32, [0x80010001]), (U32, [0])], U32, [0x80010001]),
    ("add.ftz.f16x2 $0, $1, $2;", [(U32, [0x80010001]), (U32, [0])], U32, [0x00000000]),
    ("mul.ftz.f16 $0, $1, $2;", [(U16, [0x8001]), (U16, [0x3C00])], U16, [0x8000]),
    (
        "mul.ftz.f32x2 $0, $1, $2;",
        [(U64, [0x3F80000000000001]), (U64, [0x3F8000003F800000])],
        U64,
        [0x3F800000 << 32],
    ),
    ("max.NaN.bf16x2 $0, $1, $2;", [(U32, [0x7FC03F80]), (U32, [0x3F804000])], U32, [0x7FFF4000]),
    ("min.f16x2 $0, $1, $2;", [(U32, [0x7E003C00]), (U32, [0x3C00BC00])], U32, [0x3C00BC00]),
    # narrowing
    ("cvt.rn.f16.f32 $0, $1;", [(F32, [65519.0, 2.0**-24, 3 * 2.0**-25])], U16, [0x7BFF, 1, 2]),
    ("cvt.rz.f16.f32 $0, $1;", [(F32, [1e9, -1e9])], U16, [0x7BFF, 0xFBFF]),
    ("cvt.rn.bf16.f32 $0, $1;", [(F32, [2.0**-133 * 1.5, -0.0])], U16, [2, 0x8000]),
    (
        "cvt.rna.tf32.f32 $0, $1;",
        [(F32, [-(1 + 2.0**-11), 1 + 2.0**-12])],
        U32,
        [0xBF802000, 0x3F800000],
    ),
    ("cvt.rn.relu.f16x2.f32 $0, $1, $2;", [(F32, [-1.0]), (F32, [2.0])], U32, [0x00004000]),
]


@pytest.mark.parametrize(
    ("instruction", "inputs", "result", "expected"),
    VALUES + BITS,
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_value(instruction: str, inputs, result, expected) -> None:
    got = evaluate(instruction, *(np.array(v, t) for t, v in inputs), result=result)
    np.testing.assert_array_equal(got, np.array(expected, result))


COMPARE = [
    # "eq, ne, lt, ...: if either operand is NaN, the result is False"; with u: True
    *(
        ("f32", name, [NAN, 1.0, NAN], [1.0, NAN, NAN], [0] * 3)
        for name in ("lt", "le", "ge", "ne")
    ),
    *(
        ("f32", name, [NAN, 1.0, NAN], [1.0, NAN, NAN], [1] * 3)
        for name in ("ltu", "gtu", "equ", "geu")
    ),
    ("f32", "leu", [1.0, 2.0], [1.0, 1.0], [1, 0]),
    ("f32", "eq", [0.0, SMALL], [-0.0, 0.0], [1, 0]),
    ("ftz.f32", "eq", [-SMALL], [0.0], [1]),
    ("u32", "hi", [TOP32], [1], [1]),
    ("u32", "lo", [TOP32], [1], [0]),
    ("s16", "lt", [65535], [0], [1]),
]


@pytest.mark.parametrize(("kind", "name", "a", "b", "expected"), COMPARE)
def test_compare(kind: str, name: str, a: list, b: list, expected: list[int]) -> None:
    dtype = {"f32": F32, "u32": U32, "s16": U16}[kind.split(".")[-1]]
    code = f"setp.{name}.{kind} %p1, $1, $2; selp.u32 $0, 1, 0, %p1;"
    assert evaluate(code, np.array(a, dtype), np.array(b, dtype), result=U32).tolist() == expected


@pytest.mark.parametrize(
    ("load", "store", "expected"),
    [
        # "the value loaded is sign-extended to the destination register width for signed integers"
        ("ld.global.s8 %r1", "st.global.b32 [%d1], %r1", 0xFFFFFF80),
        ("ld.global.u8 %r1", "st.global.b32 [%d1], %r1", 0x80),
        ("ld.global.b8 %r1", "st.global.b32 [%d1], %r1", 0x80),
        ("ld.global.s16 %r1", "st.global.b32 [%d1], %r1", 0xFFFFFF80),
        ("ld.global.b16 %r1", "st.global.b32 [%d1], %r1", 0xFF80),
        ("ld.global.v2.s8 {%h1, %h2}", "st.global.v2.b16 [%d1], {%h1, %h2}", 0xFFFFFF80),
        ("ld.global.v4.u8 {%h1, %h2, _, %h3}", "st.global.v2.b16 [%d1], {%h1, %h2}", 0x00FF0080),
        # a store takes the low bits of a wider register
        ("ld.global.b32 %r1", "st.global.b8 [%d1], %r1", 0x80),
        ("ld.global.b32 %r1", "st.global.u16 [%d1], %r1", 0xFF80),
    ],
)
def test_narrow_accesses(load: str, store: str, expected: int) -> None:
    out = np.zeros(1, np.uint32)
    body = f"mov.b64 %d1, %a1; {load}, [%a0]; {store};"
    run(kernel(body, 2), "k", 1, 1, [np.array([0x1234FF80], np.uint32), out]).check()
    assert out.tolist() == [expected]


# ---- lanes of a warp -----------------------------------------------------------------------


def _all_lanes(body: str) -> list[int]:
    return evaluate(body, np.arange(32, dtype=np.uint32), result=U32).tolist()


def _shfl(mode: str, b: int, c: int) -> list[tuple[int, bool]]:
    """The loop of the ISA, lane by lane: (source lane, predicate)."""
    found = []
    for lane in range(32):
        clamp, segment = c & 31, c >> 8 & 31
        low, high = lane & segment, lane & segment | clamp & ~segment & 31
        at = {
            "up": lane - b,
            "down": lane + b,
            "bfly": lane ^ b,
            "idx": low | b & ~segment & 31,
        }[mode]
        inside = at >= high if mode == "up" else at <= high
        found.append((at if inside else lane, inside))
    return found


@pytest.mark.parametrize("c", [0, 31, 0x181F, 0x1800, 0x1C1F, 0x0F0A, 7])
@pytest.mark.parametrize("b", [0, 1, 5, 16, 31])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl_follows_the_loop_of_the_isa(mode: str, b: int, c: int) -> None:
    expected = [source * 2 + inside for source, inside in _shfl(mode, b, c)]
    code = (
        f"shfl.sync.{mode}.b32 %r50|%p1, $1, {b}, {c}, -1; selp.u32 %r51, 1, 0, %p1;"
        "mad.lo.u32 $0, %r50, 2, %r51;"
    )
    assert _all_lanes(code) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        # ballot: bit i is the predicate of lane i; lanes outside the mask contribute 0
        (
            "setp.ge.u32 %p1, $1, 16; mov.u32 $0, 0; @%p1 bra HIGH; bra JOIN;"
            "HIGH: setp.lt.u32 %p2, $1, 20; vote.sync.ballot.b32 $0, %p2, 0xFFFF0000; JOIN:",
            [0] * 16 + [0x000F0000] * 16,
        ),
        (
            "setp.lt.u32 %p1, $1, 32; vote.sync.uni.pred %p2, %p1, -1; selp.u32 $0, 1, 0, %p2;",
            [1] * 32,
        ),
        (
            "setp.lt.u32 %p1, $1, 31; vote.sync.uni.pred %p2, !%p1, -1; selp.u32 $0, 1, 0, %p2;",
            [0] * 32,
        ),
        # match.any: lanes with the same value; activemask: those that execute it
        (
            "shr.u32 %r50, $1, 3; match.any.sync.b32 $0, %r50, -1;",
            [0xFF << lane // 8 * 8 for lane in range(32)],
        ),
        ("setp.lt.u32 %p1, $1, 3; mov.u32 $0, 9; @%p1 activemask.b32 $0;", [7] * 3 + [9] * 29),
        # elect: one lane of the mask; all get its number
        (
            "setp.ge.u32 %p1, $1, 8; mov.u32 $0, 99; @!%p1 bra JOIN;"
            "elect.sync $0|%p2, 0xFFFFFF00; JOIN:",
            [99] * 8 + [8] * 24,
        ),
    ],
)
def test_votes(body: str, expected: list[int]) -> None:
    assert _all_lanes(body) == expected
