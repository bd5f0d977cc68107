"""The parser, the order of blocks, and the checks made at launch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from . import Struct, parse, run
from .harness import kernel
from .instruction import Imm, Memory, Pair, Reg, Symbol, Vector
from .program import Program
from .syntax import PtxSyntaxError
from .testing import FIXTURES, module


def instructions(body: str):
    return parse(kernel(body, 0)).kernel("k").instructions


def test_operands() -> None:
    load, shuffle, copy, half, *_ = instructions(
        "ld.global.v2.b32 {%r1, %r2}, [%a0+-16]; @!%p1 shfl.sync.idx.b32 %r1|%p2, %r2, 0f3F800000,"
        "0x1f, -1; mov.b64 %d1, {%r1, %r2}; mov.f64 %d2, 1.5; mov.u32 %r3, smem+8;"
    )[1:]
    assert load.operands == (Vector((Reg("%r1"), Reg("%r2"))), Memory(Reg("%a0"), -16))
    assert load.modifiers == ("global", "v2", "b32")
    assert shuffle.guard == Reg("%p1", negated=True)
    assert shuffle.operands[0] == Pair(Reg("%r1"), Reg("%p2"))
    assert shuffle.operands[2:] == (Imm(0x3F800000, "f32"), Imm(31, "int"), Imm(-1, "int"))
    assert copy.operands[1] == Vector((Reg("%r1"), Reg("%r2")))
    assert half.operands[1] == Imm(0x3FF8000000000000, "f64")


def test_tensor_operand_and_symbols() -> None:
    copy, move, _ = instructions(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d1, {%r1, -4}], [%r2];"
        "mov.u32 %r3, smem+8;"
    )[1:]
    assert copy.operands[0] == Memory(Reg("%d1"), 0, Vector((Reg("%r1"), Imm(-4, "int"))))
    assert "shared::cta" in copy.modifiers
    assert move.operands[1] == Symbol("smem", 8)


def test_scopes_hide_registers_and_labels() -> None:
    """Inline assembly repeats names; each block of braces has its own."""
    body = """mov.u32 %r1, 0;
        { .reg .pred done; .reg.b32 x; mov.u32 x, 5; add.s32 %r1, %r1, x; setp.eq.u32 done, x, 5;
          @done bra OUT; add.s32 %r1, %r1, 100; OUT: }
        { .reg .pred done; .reg .b32 x; mov.u32 x, 7; add.s32 %r1, %r1, x; setp.ne.u32 done, x, 7;
          @done bra OUT; add.s32 %r1, %r1, 1000; OUT: }
        st.global.b32 [%a0], %r1;"""
    out = np.zeros(1, np.uint32)
    run(kernel(body, 1), "k", 1, 1, [out]).check()
    assert out.tolist() == [1012]


def test_lines_and_sources() -> None:
    text = kernel(".loc 1 42 7\nadd.s32 %r1, %r2, 1;", 0, declarations='.file 1 "a/b.cu"')
    found = parse(text).kernel("k").instructions[1]
    assert text.splitlines()[found.line - 1].startswith("add.s32")
    assert found.source == "b.cu:42"


def test_errors_name_the_line() -> None:
    with pytest.raises(PtxSyntaxError, match="no label NOWHERE"):
        instructions("bra NOWHERE;")
    with pytest.raises(PtxSyntaxError, match="not PTX"):
        parse("int main() {}")


def test_a_loop_comes_before_what_follows_it() -> None:
    """The exit is written first, yet ordered after the loop."""
    body = """bra HEAD; EXIT: st.global.b32 [%a0], 1; bra END;
        HEAD: add.s32 %r1, %r1, 1; setp.gt.u32 %p1, %r1, 9; @%p1 bra EXIT;
        BODY: add.s32 %r2, %r2, 1; bra HEAD; END:"""
    program = Program(parse(kernel(body, 1)).kernel("k"))
    order = [program.target(label) for label in ("HEAD", "BODY", "EXIT", "END")]
    assert order == sorted(order)


def test_launch_must_fit_the_kernel() -> None:
    with pytest.raises(ValueError, match=r"allows .128, 1, 1. threads"):
        run(module("tile_gemm"), "tile_gemm", 1, 256, [])
    with pytest.raises(ValueError, match="needs clusters of"):
        run(module("hopper_gemm"), "hopper_gemm", 2, 256, [])
    with pytest.raises(ValueError, match="needs blocks of"):
        run(module("softmax_bf16_90"), "softmax_kernel", 1, 64, [])
    with pytest.raises(ValueError, match="takes 3 arguments"):
        run(module("blocks"), "sum", 1, 256, [1, 2, 3, 4])
    with pytest.raises(ValueError, match="contiguous"):
        run(module("blocks"), "sum", 1, 256, [np.zeros((4, 4), np.float32)[:, 1]])
    with pytest.raises(ValueError, match="multiple of the cluster"):
        run(kernel("", 0), "k", 3, 32, [], cluster=2)


def test_struct_fields_are_aligned() -> None:
    out = np.zeros(2, np.uint64)
    text = kernel(
        "ld.param.u64 %d1, [p+8]; ld.param.u64 %d2, [p+16]; ld.param.u8 %h1, [p];"
        "cvt.u64.u16 %d3, %h1; st.global.v2.b64 [%d1], {%d2, %d3};",
        0,
    )
    text = text.replace("k()", "k(.param .align 8 .b8 p[24])")
    run(text, "k", 1, 1, [Struct(np.uint8(3), out, np.int64(-2))]).check()
    assert out.tolist() == [2**64 - 2, 3]


def test_command_line() -> None:
    command = [sys.executable, "-m", __package__, str(FIXTURES / "blocks.ptx")]
    options = {"cwd": Path(__file__).parents[2], "capture_output": True, "text": True}
    listing = subprocess.run(command, check=True, **options).stdout
    assert "histogram" in listing and "UNKNOWN" not in listing
    ran = [*command, "--kernel", "sum", "--block", "256", "f32:100", "f32:1"]
    assert subprocess.run([*ran, "100"], **options).returncode == 0
    outside = subprocess.run([*ran, "101"], **options)
    assert outside.returncode == 1 and "out-of-bounds" in outside.stdout
