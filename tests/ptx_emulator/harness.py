"""Runs a few PTX instructions on chosen inputs: the unit tests of single opcodes."""

from __future__ import annotations

import re

import numpy as np

from . import TOGETHER, Report, Schedule, Uninitialised, run

_KINDS = {np.dtype("u1"): "b8", np.dtype("u2"): "b16", np.dtype("u4"): "b32", np.dtype("u8"): "b64"}


def kernel(body: str, pointers: int, target: str = "sm_100a", declarations: str = "") -> str:
    """A kernel around `body`: pointers in %a0.., thread number in %t, all kinds of registers."""
    params = ", ".join(f".param .u64 k_param_{i}" for i in range(pointers))
    loads = "\n".join(f"ld.param.u64 %a{i}, [k_param_{i}];" for i in range(pointers))
    return f"""
.version 8.8
.target {target}
.address_size 64
{declarations}
.visible .entry k({params})
{{
.reg .pred %p<16>; .reg .b16 %h<32>; .reg .b32 %r<300>; .reg .b64 %d<64>; .reg .b64 %a<8>;
.reg .b32 %t; .reg .b64 %w;
{loads}
mov.u32 %t, %tid.x;
{body}
ret;
}}
"""


def evaluate(instruction: str, *inputs: np.ndarray, result: str) -> np.ndarray:
    """`instruction` with operands `$0` (destination), `$1`, ... for arrays of equal length.

    Inputs are loaded and `$0` is stored as raw bits; `result` is the numpy type to view it as."""
    n = len(inputs[0])
    out = np.zeros(n, result)
    arrays = [np.ascontiguousarray(array) for array in inputs] + [out]
    lines, names = [], {}
    for i, array in enumerate(arrays):
        size = array.itemsize
        register = {1: "%h", 2: "%h", 4: "%r", 8: "%d"}[size] + str(i + 1)
        names["0" if i == len(inputs) else str(i + 1)] = register
        lines.append(f"mul.wide.u32 %w, %t, {size}; add.s64 %a{i}, %a{i}, %w;")
        if i < len(inputs):
            lines.append(f"ld.global.{_KINDS[np.dtype(f'u{size}')]} {register}, [%a{i}];")
    lines.append(re.sub(r"\$(\d)", lambda m: names[m[1]], instruction))
    lines.append(
        f"st.global.{_KINDS[np.dtype(f'u{out.itemsize}')]} [%a{len(inputs)}], {names['0']};"
    )
    args = [*(raw(array) for array in arrays[:-1]), Uninitialised(raw(out))]
    run(kernel("\n".join(lines), len(arrays)), "k", 1, n, args).check()
    return out


def raw(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.itemsize}")


def findings(
    body: str,
    *args,
    threads: int = 32,
    grid: int = 1,
    shared: int = 0,
    cluster: int = 1,
    schedule: Schedule = TOGETHER,
    declarations: str = ".extern .shared .align 16 .b8 smem[];",
) -> Report:
    text = kernel(body, len(args), declarations=declarations)
    return run(text, "k", grid, threads, args, shared=shared, cluster=cluster, schedule=schedule)
