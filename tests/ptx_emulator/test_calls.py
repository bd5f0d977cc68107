"""Calls of device functions: arguments, results, local variables, returns, what is refused."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from tests.cuda.compile import CompilerMissing, toolkit

from . import EVERY_SCHEDULE, Uninitialised, UnknownInstruction, run
from .census import unknown_instructions
from .harness import findings
from .syntax import parse

# max(a, b) + c, with an early return; a local array; a jump table and a loop
FUNCTIONS = """
.func (.param .b32 out) most(.param .b32 most_0, .param .b32 most_1)
{
.reg .pred %p<3>; .reg .b32 %r<4>;
ld.param.b32 %r1, [most_0]; ld.param.b32 %r2, [most_1];
setp.gt.s32 %p1, %r1, %r2; @%p1 bra FIRST;
st.param.b32 [out+0], %r2; ret;
FIRST: st.param.b32 [out+0], %r1; ret;
}
.func store(.param .b64 store_0, .param .align 8 .b8 store_1[16]);
.func store(.param .b64 store_0, .param .align 8 .b8 store_1[16])
{
.reg .b64 %d<4>;
ld.param.b64 %d1, [store_0]; ld.param.b64 %d2, [store_1]; ld.param.b64 %d3, [store_1+8];
st.global.b64 [%d1], %d2; st.global.b64 [%d1+8], %d3;
ret;
}
.func (.param .b32 out) picked(.param .b32 picked_0)
{
.local .align 16 .b8 depot[16]; .reg .pred %p<3>; .reg .b32 %r<6>;
ld.param.b32 %r1, [picked_0]; st.local.b32 [depot], %r1; and.b32 %r2, %r1, 1;
TABLE: .branchtargets EVEN, ODD; brx.idx %r2, TABLE;
EVEN: mov.b32 %r3, 100; bra JOIN; ODD: mov.b32 %r3, 200; JOIN:
mov.b32 %r4, 0;
AGAIN: add.s32 %r3, %r3, 1; add.s32 %r4, %r4, 1; setp.lt.u32 %p1, %r4, %r1; @%p1 bra AGAIN;
{
.param .b32 a; .param .b32 b; .param .b32 got;
st.param.b32 [a+0], %r3; st.param.b32 [b+0], 105;
call.uni (got), most, (a, b);
ld.param.b32 %r5, [got+0];
}
st.param.b32 [out+0], %r5;
ret;
}
.func (.param .b32 out) endless(.param .b32 endless_0)
{
.param .b32 a; .param .b32 got; st.param.b32 [a], 1; call.uni (got), endless, (a); ret;
}
.extern .func (.param .b32 out) elsewhere(.param .b32 elsewhere_0);
"""


def call(name: str, result: str, *arguments: str, guard: str = "") -> str:
    """A call as compilers write it, in a scope of its own."""
    names = [f"param{i}" for i in range(len(arguments))]
    declared = "".join(f".param .b32 {name};" for name in names)
    stored = "".join(
        f"st.param.b32 [{name}+0], {value};" for name, value in zip(names, arguments, strict=True)
    )
    return f"""{{ {declared} .param .b32 retval0; {stored} {guard}
        call.uni (retval0), {name}, ({", ".join(names)});
        {guard} ld.param.b32 {result}, [retval0+0]; }}"""


def results(body: str, threads: int = 32) -> list[int]:
    out = np.zeros(threads, np.uint32)
    store = "mul.wide.u32 %w, %t, 4; add.s64 %d60, %a0, %w; st.global.b32 [%d60], %r1;"
    for schedule in EVERY_SCHEDULE:
        args, options = Uninitialised(out), {"threads": threads, "schedule": schedule}
        findings(body + store, args, declarations=FUNCTIONS, **options).check()
    return out.tolist()


def test_arguments_and_result() -> None:
    assert results(call("most", "%r1", "%t", "7")) == [max(t, 7) for t in range(32)]


def test_two_calls_do_not_share_their_registers() -> None:
    body = call("most", "%r2", "%t", "3") + call("most", "%r1", "%r2", "9")
    assert results(body) == [max(t, 9) for t in range(32)]


def test_a_call_in_a_call_with_a_table_a_loop_and_local_memory() -> None:
    expected = [max(105, (200 if t % 2 else 100) + max(t, 1)) for t in range(32)]
    assert results(call("picked", "%r1", "%t")) == expected


def test_a_call_of_some_lanes() -> None:
    body = "mov.b32 %r1, 1; setp.lt.u32 %p1, %t, 4;"
    body += call("most", "%r1", "%t", "2", guard="@%p1")
    assert results(body) == [2, 2, 2, 3] + [1] * 28


def test_a_structure_by_value() -> None:
    out = np.zeros(2, np.uint64)
    body = """{ .param .b64 param0; .param .align 8 .b8 param1[16]; st.param.b64 [param0+0], %a0;
        st.param.b64 [param1+0], 5; st.param.b64 [param1+8], 6;
        call.uni store, (param0, param1); }"""
    findings(body, Uninitialised(out), threads=1, declarations=FUNCTIONS).check()
    assert out.tolist() == [5, 6]


def test_a_fault_in_a_function_is_found_there() -> None:
    """An argument that nobody stored."""
    body = call("most", "%r1", "%t", "7").replace("st.param.b32 [param1+0], 7;", "")
    report = findings(body, threads=1, declarations=FUNCTIONS)
    assert report.kinds() == {"uninitialised"} and "most_1" in report.findings[0].text


@pytest.mark.parametrize(
    "text",
    [
        call("endless", "%r1", "1"),
        call("elsewhere", "%r1", "1"),
        "call.uni nowhere;",
        "call (%r1), %d1, (%r2), prototype;",
        call("most", "%r1", "1"),
    ],
)
def test_what_cannot_be_put_in_place_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(UnknownInstruction, match=r"line .*call"):
        findings(text, threads=1, declarations=FUNCTIONS)


SOURCE = """
__device__ __noinline__ int power(int x, int n) {
  int y = 1;
  for (int i = 0; i < n; ++i) y *= x;
  return y;
}
__device__ __noinline__ float2 halves(float2 v) { return make_float2(v.x / 2, v.y / 2); }
extern "C" __global__ void k(int* out, float2* f) {
  int t = threadIdx.x;
  out[t] = power(t, 3) + power(2, t);
  f[t] = halves(f[t]);
}
"""


def test_functions_that_nvcc_did_not_inline(tmp_path) -> None:
    try:
        nvcc = toolkit().nvcc
    except CompilerMissing as reason:
        pytest.skip(str(reason))
    (tmp_path / "k.cu").write_text(SOURCE)
    command = [nvcc, "-arch=sm_80", "-ptx", "k.cu", "-o", "k.ptx"]
    subprocess.run(command, check=True, cwd=tmp_path)
    module = parse((tmp_path / "k.ptx").read_text())
    assert "call.uni" in module.text
    assert unknown_instructions(module, module.kernel("k")) == []
    out, f = np.zeros(16, np.uint32), np.arange(32, dtype=np.float32)
    run(module, "k", 1, 16, [Uninitialised(out), f.view(np.uint32)]).check()
    assert out.tolist() == [t**3 + 2**t for t in range(16)]
    assert f.tolist() == [t / 2 for t in range(32)]
