"""bfloat16 in Triton's interpreter.

Triton 3.8's interpreter holds bf16 as 16-bit integers and computes with those: `tl.dot` multiplies
the bit patterns, and a conversion from fp32 truncates. `patch` makes conversions round to nearest
even and `tl.dot` work on the values. Element-wise arithmetic on bf16 stays wrong; kernels convert
to fp32 before it, as they should on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def to_fp32(bits: np.ndarray) -> np.ndarray:
    """bf16, as uint16, to float32: exact."""
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 to bf16, as uint16: to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    sign = (bits >> 16).astype(np.uint16) & np.uint16(0x8000)
    return np.where(np.isnan(values), np.uint16(0x7FC0) | sign, rounded)


def patch() -> None:
    """Change the interpreter of this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.bfloat16 and target == tl.float32:
            return to_fp32(values).view(np.uint32)
        toward_zero = rounding == interpreter._ir.ROUNDING_MODE.RTZ
        if source == tl.float32 and target == tl.bfloat16 and not toward_zero:
            return to_bf16(values.view(np.float32))
        return convert(values, source, target, rounding)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        def widened(handle: Any) -> Any:
            if handle.dtype.scalar != tl.bfloat16:
                return handle
            return interpreter.TensorHandle(to_fp32(handle.data), tl.float32)

        return dot(self, widened(a), widened(b), *rest)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
