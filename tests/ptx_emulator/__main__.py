"""Looks at a PTX file: kernels, parameters, opcodes, and what the emulator does not know.

python -m tests.ptx_emulator FILE.ptx [--kernel NAME [--grid X,Y,Z] [--block X,Y,Z] [ARG ...]]

With arguments the kernel is run: `f32:1024` is a buffer of random values (also bf16, f16, u32),
`out:f32:1024` one that starts uninitialised, `7` and `0.5` are scalars.  All checks are on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from . import EVERY_SCHEDULE, Schedule, Uninitialised, parse, run
from .census import census, unknown_instructions
from .syntax import Module


def argument(text: str):
    kind, _, count = text.removeprefix("out:").partition(":")
    if not count:
        return float(text) if "." in text else int(text, 0)
    values = np.random.default_rng(0).standard_normal(int(count)).astype(np.float32)
    arrays = {
        "f32": lambda: values,
        "f16": lambda: values.astype(np.float16),
        "bf16": lambda: (values.view(np.uint32) >> 16).astype(np.uint16),
        "u32": lambda: np.arange(len(values), dtype=np.uint32),
    }
    array = arrays[kind]()
    return Uninitialised(array) if text.startswith("out:") else array


def describe(module: Module) -> None:
    print(f"target {module.target}")
    for name in module.entries:
        kernel = module.kernel(name)
        print(f"\n{name}: {len(kernel.instructions)} instructions, {kernel.directives}")
        for param in kernel.params:
            print(f"    {param.size:4} bytes  {param.name}")
        for opcode, count in sorted(census(kernel).items()):
            print(f"    {count:5}  {opcode}")
        for problem in unknown_instructions(module, kernel):
            print(f"    UNKNOWN {problem}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx_emulator", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("args", nargs="*", help="arguments of the kernel")
    parser.add_argument("--kernel", help="name of the kernel or a part of it")
    parser.add_argument("--grid", default="1")
    parser.add_argument("--block", default="32")
    parser.add_argument("--shared", type=int, default=0, help="dynamic shared memory in bytes")
    parser.add_argument("--every-schedule", action="store_true")
    options = parser.parse_intermixed_args()
    module = parse(options.file.read_text())
    if options.kernel is None:
        describe(module)
        return 0
    failed = False
    for schedule in EVERY_SCHEDULE if options.every_schedule else (Schedule(),):
        report = run(
            module,
            options.kernel,
            *(tuple(map(int, text.split(","))) for text in (options.grid, options.block)),
            [argument(text) for text in options.args],
            shared=options.shared,
            schedule=schedule,
            counters=True,
        )
        failed |= not report.ok
        print(f"{report.kernel} under {schedule}: {report.counters}")
        for finding in report.findings:
            print(finding)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
