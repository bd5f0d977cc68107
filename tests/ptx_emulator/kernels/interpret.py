"""Triton's interpreter on the Triton cases: `python -m tests.ptx_emulator.kernels.interpret DIR`.

The inputs are those of `cases.py`; the result of each case is saved as DIR/<fixture>.npy. Needs
TRITON_INTERPRET=1, and so a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import Report, TensorMap, Uninitialised, cases
from .compile import triton_kernels

_KERNELS = {name: (fn, constants) for name, fn, _, constants, *_ in triton_kernels()}


def _bf16_to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _float_to_bf16(values: np.ndarray) -> np.ndarray:
    """To nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    quiet = np.uint16(0x7FC0) | ((bits >> 16).astype(np.uint16) & np.uint16(0x8000))
    return np.where(np.isnan(values), quiet, rounded)


def mend_bf16() -> None:
    """Triton 3.8's interpreter multiplies the bit patterns of bf16 and truncates to it."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(value, source, target, rounding):
        if source == tl.bfloat16 and target == tl.float32:
            return _bf16_to_float(value).view(np.uint32)
        toward_zero = interpreter._ir.ROUNDING_MODE.RTZ
        if source == tl.float32 and target == tl.bfloat16 and rounding != toward_zero:
            return _float_to_bf16(value.view(np.float32))
        return convert(value, source, target, rounding)

    def as_float(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(_bf16_to_float(handle.data), tl.float32)

    def create_dot(self, a, b, d, precision, imprecise):
        return dot(self, as_float(a), as_float(b), d, precision, imprecise)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


def _tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(dtype) if array.itemsize == dtype.itemsize else tensor.view(torch.float32)


def _arguments(args, dtype: torch.dtype):
    """Emulator arguments as a Triton launch takes them, without what comes along with a map."""
    for arg in args:
        array = arg.array if isinstance(arg, Uninitialised) else arg
        if isinstance(arg, TensorMap):
            yield TensorDescriptor.from_tensor(_tensor(arg.array, dtype), list(arg.box))
        elif isinstance(array, np.ndarray):
            yield _tensor(array, dtype)
        elif not isinstance(arg, np.generic):
            yield arg


def launch(case, parsed, kernel, grid, block, args, schedule, **options) -> Report:
    """In place of the emulator's launch."""
    fn, constants = _KERNELS[case.fixture]
    dtype = cases.DTYPES[case.fixture.split("_")[1]]
    wanted = [name for name in fn.arg_names if name not in constants]
    given = dict(zip(wanted, _arguments(args, dtype), strict=False))
    fn[(*np.atleast_1d(grid).tolist(), 1, 1)[:3]](**given, **constants)
    return Report(case.fixture)


def main() -> None:
    mend_bf16()
    cases._launch = launch
    for case in cases.matrix_cases() + cases.other_cases():
        if case.fixture in _KERNELS:
            np.save(Path(sys.argv[1]) / f"{case.fixture}.npy", case.run().result.float().numpy())


if __name__ == "__main__":
    main()
