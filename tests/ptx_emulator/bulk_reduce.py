"""The element operations of cp.reduce.async.bulk and cp.reduce.async.bulk.tensor."""

import numpy as np

from .layouts import IllegalOperand, from_float, to_float

INTEGER = {"u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64}
BITS = {"b32": np.uint32, "b64": np.uint64}
FLOAT_BITS = {"f16": np.uint16, "bf16": np.uint16, "f32": np.uint32, "f64": np.uint64}
OPERATIONS = {
    "add": ("u32", "s32", "u64", "f32", "f64", "f16", "bf16"),
    "min": ("u32", "s32", "u64", "s64", "f16", "bf16"),
    "max": ("u32", "s32", "u64", "s64", "f16", "bf16"),
    "inc": ("u32",),
    "dec": ("u32",),
    "and": ("b32", "b64"),
    "or": ("b32", "b64"),
    "xor": ("b32", "b64"),
}
BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _flush_subnormals(values: np.ndarray) -> np.ndarray:
    tiny = np.finfo(np.float32).tiny
    return np.where(np.abs(values) < tiny, np.copysign(np.float32(0), values), values)


def _float_reduce(op: str, dtype: str, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "f64":
            return (old.view(np.float64) + new.view(np.float64)).view(np.uint64)
        x, y = to_float(old, dtype), to_float(new, dtype)
        if op == "add" and dtype == "f32":
            return from_float(_flush_subnormals(_flush_subnormals(x) + _flush_subnormals(y)), dtype)
        if op == "add":
            return from_float(x + y, dtype)
        return from_float((np.fmin if op == "min" else np.fmax)(x, y), dtype)


def reduce(op: str, dtype: str, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The destination's new bits from its old ones and the source's, element by element.

    Integer addition wraps; .inc counts up to the source value and then returns to 0, .dec counts
    down and wraps to it; .add of floats rounds to nearest even, that of f32 with subnormal inputs
    and results flushed, as the ISA says of the current implementation.
    """
    if dtype not in OPERATIONS.get(op, ()):
        raise IllegalOperand(f"cp.reduce.async.bulk has no .{op}.{dtype}")
    if op in BITWISE:
        return BITWISE[op](old.view(BITS[dtype]), new.view(BITS[dtype]))
    if dtype in FLOAT_BITS:
        bits = FLOAT_BITS[dtype]
        return _float_reduce(op, dtype, old.view(bits), new.view(bits))
    x, y = old.view(INTEGER[dtype]), new.view(INTEGER[dtype])
    one = INTEGER[dtype](1)
    if op == "add":
        result = x + y
    elif op == "inc":
        result = np.where(x >= y, INTEGER[dtype](0), x + one)
    elif op == "dec":
        result = np.where((x == 0) | (x > y), y, x - one)
    else:
        result = np.minimum(x, y) if op == "min" else np.maximum(x, y)
    return result.view(old.dtype)
