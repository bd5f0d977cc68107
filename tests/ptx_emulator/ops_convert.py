"""cvt and cvta ("Data Movement and Conversion Instructions")."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .decode import Modifiers, Operation, opcode, operand_count
from .instruction import Instruction, type_bytes
from .ops_float import flush
from .placement import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW
from .ptx_types import numpy_type
from .report import UnknownInstruction
from .rounding import bf16_bits, f16_bits, round_to, to_float

if TYPE_CHECKING:
    from .machine import Machine

_INTEGER_KINDS = "us"
_FLOAT = ("f16", "bf16", "f32", "f64", "tf32")
_PACKED = {"bf16x2": "bf16", "f16x2": "f16"}
_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _is_integer(kind: str) -> bool:
    return kind[0] in _INTEGER_KINDS


@opcode("cvt")
def convert(machine: Machine, ins: Instruction) -> Operation:
    mods = Modifiers(ins)
    source, target = mods.last(), mods.last()
    rounding = mods.take("rn", "rz", "rm", "rp", "rna", *_TO_INTEGER)
    options = {name for name in ("ftz", "sat", "relu", "satfinite") if mods.take(name)}
    mods.done()
    if target in _PACKED:
        return _pack(machine, ins, _PACKED[target], source, rounding, options)
    operand_count(ins, 2)
    known = [*_FLOAT, *(f"{s}{n}" for s in "us" for n in (8, 16, 32, 64))]
    if source not in known or target not in known:
        raise UnknownInstruction(ins, f"{source} to {target}")
    allowed = {"sat"} if target not in ("bf16", "tf32") else set()
    allowed |= {"ftz"} if "f32" in (source, target) and "bf16" not in (source, target) else set()
    if options - allowed:
        raise UnknownInstruction(ins, f"options {sorted(options)}")
    get = machine.registers.source(ins, ins.operands[1], "b32" if source == "tf32" else source)
    put = machine.registers.target(ins, ins.operands[0], "b32" if target == "tf32" else target)
    change = _conversion(ins, source, target, rounding, options)
    return lambda group: put(group, change(get(group)))


def _conversion(ins: Instruction, source: str, target: str, rounding: str, options: set[str]):
    if _is_integer(source) and _is_integer(target):
        return _integer_to_integer(source, target, "sat" in options)
    if _is_integer(source):
        if rounding not in ("rn", "rz", "rm", "rp"):
            raise UnknownInstruction(ins, "integer to float needs a rounding")
        if target == "f64":
            if rounding != "rn":
                raise UnknownInstruction(ins, f"rounding .{rounding} to .f64")
            return lambda value: value.astype(np.float64)
        return lambda value: _finish(_wide(value), target, rounding, options)
    if _is_integer(target):
        if rounding not in _TO_INTEGER:
            raise UnknownInstruction(ins, "float to integer needs an integer rounding")
        return _float_to_integer(source, target, rounding, options)
    if rounding in _TO_INTEGER:
        if source != target:
            raise UnknownInstruction(ins)
        return lambda value: _finish(
            _TO_INTEGER[rounding](_widened(value, source, options)), target, "rn", options
        )
    if type_bytes(target) < type_bytes(source) and not rounding:
        raise UnknownInstruction(ins, "narrowing needs a rounding")
    return lambda value: _finish(
        _widened(value, source, options), target, rounding or "rn", options
    )


def _wide(value: np.ndarray) -> np.ndarray:
    """Integers as float64, rounded to odd when they have more than 53 bits."""
    wide = value.astype(np.float64)
    if value.dtype.itemsize == 8:
        bits = np.array(wide, ndmin=1).view(np.int64).copy()
        exact = [int(x) for x in np.atleast_1d(value).tolist()]
        for i, (x, rounded) in enumerate(zip(exact, np.atleast_1d(wide).tolist(), strict=True)):
            if int(rounded) != x and not bits[i] & 1:
                bits[i] += 1 if abs(x) > abs(int(rounded)) else -1
        wide = bits.view(np.float64)
    return wide


def _widened(value: np.ndarray, source: str, options: set[str]) -> np.ndarray:
    """Floats as float64; `.ftz` flushes subnormal f32 sources."""
    wide = to_float(value, source)
    return (flush(wide) if "ftz" in options and source == "f32" else wide).astype(np.float64)


def _finish(value: np.ndarray, target: str, rounding: str, options: set[str]) -> np.ndarray:
    """float64 values as register contents of a float type."""
    if "sat" in options:
        value = np.where(np.isnan(value), 0.0, np.clip(value, 0.0, 1.0))
    if "relu" in options:
        value = np.where(value < 0, 0.0, value)
    if target == "f64":
        return value
    if target == "f32" and rounding == "rn":
        result = value.astype(np.float32)
    else:
        result = round_to(value, target, rounding).astype(np.float32)
    if target in ("f32", "tf32"):
        result = flush(result) if "ftz" in options else result
        return result if target == "f32" else result.view(np.uint32)
    if target == "f16":
        return f16_bits(result).view(np.float16)
    return bf16_bits(result)


def _integer_to_integer(source: str, target: str, saturate: bool):
    dtype = numpy_type(target)
    if not saturate:
        return lambda value: value.astype(dtype)
    info = np.iinfo(dtype)
    return lambda value: np.array(
        [min(max(int(x), info.min), info.max) for x in np.atleast_1d(value).tolist()], dtype
    )


def _float_to_integer(source: str, target: str, rounding: str, options: set[str]):
    """Out of range clamps; NaN gives 0, or 1 << (bits-1) when either side has 64 bits."""
    dtype = numpy_type(target)
    info = np.iinfo(dtype)
    invalid = dtype.type(0)
    if source == "f64" or dtype.itemsize == 8:
        invalid = np.array(1 << (8 * dtype.itemsize - 1), f"u{dtype.itemsize}").view(dtype)[()]

    def change(value: np.ndarray) -> np.ndarray:
        whole = np.atleast_1d(_TO_INTEGER[rounding](_widened(value, source, options)))
        inside = (whole >= float(info.min)) & (whole < float(info.max) + 1.0)
        result = np.where(inside, whole, 0.0).astype(dtype)
        result = np.where(whole >= float(info.max) + 1.0, info.max, result)
        result = np.where(whole < float(info.min), info.min, result)
        return np.where(np.isnan(whole), invalid, result).astype(dtype)

    return change


def _pack(machine: Machine, ins: Instruction, half: str, source: str, rounding: str, options):
    """Two f32 to a packed pair: the first source becomes the upper half."""
    operand_count(ins, 3)
    if source != "f32" or rounding not in ("rn", "rz") or options - {"relu"}:
        raise UnknownInstruction(ins)
    upper = machine.registers.source(ins, ins.operands[1], "f32")
    lower = machine.registers.source(ins, ins.operands[2], "f32")
    put = machine.registers.target(ins, ins.operands[0], "b32")
    if rounding == "rn" and not options:
        bits = bf16_bits if half == "bf16" else f16_bits
    else:

        def bits(value: np.ndarray) -> np.ndarray:
            return _finish(value.astype(np.float64), half, rounding, options).view(np.uint16)

    def run(group) -> None:
        high = bits(upper(group)).astype(np.uint32)
        put(group, (high << np.uint32(16)) | bits(lower(group)).astype(np.uint32))

    return run


_WINDOWS = {
    "shared": SHARED_WINDOW,
    "local": LOCAL_WINDOW,
    "param": PARAM_WINDOW,
    "global": 0,
    "const": 0,
}


@opcode("cvta")
def convert_address(machine: Machine, ins: Instruction) -> Operation:
    """Between generic addresses and addresses of one state space (windows, see placement.py)."""
    mods = Modifiers(ins)
    kind = mods.last()
    back = mods.take("to")
    space = mods.need(*_WINDOWS)
    mods.done()
    if kind != "u64":
        raise UnknownInstruction(ins, f"type .{kind}")
    operand_count(ins, 2)
    window = np.uint64(_WINDOWS[space])
    get = machine.registers.source(ins, ins.operands[1], "u64")
    put = machine.registers.target(ins, ins.operands[0], "u64")
    if back:
        return lambda group: put(group, get(group) - window)
    return lambda group: put(group, get(group) + window)
