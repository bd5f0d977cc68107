"""Floating-point arithmetic ("Floating Point Instructions" and "Half Precision ...").

Every operation is computed in a wider format and rounded once.  f32 subnormals are kept unless
`.ftz` is given; approximate functions are computed exactly, which is inside their stated error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .decode import Modifiers, Operation, opcode, operand_count
from .instruction import Instruction
from .report import UnknownInstruction
from .rounding import from_float, round_f64_to_f32, to_float

if TYPE_CHECKING:
    from .machine import Machine

FLOATS = frozenset({"f16", "f16x2", "bf16", "bf16x2", "f32", "f32x2", "f64"})
_ROUNDINGS = ("rn", "rz", "rm", "rp")
_ARITY = {"add": 2, "sub": 2, "mul": 2, "fma": 3, "mad": 3, "min": 2, "max": 2, "abs": 1, "neg": 1}
_SMALLEST_NORMAL = {"f16": 2.0**-14, "bf16": 2.0**-126, "f32": 2.0**-126, "f64": 2.0**-1022}
_FLUSHING = ("f32", "f32x2", "f16", "f16x2")


def flush(value: np.ndarray, kind: str = "f32") -> np.ndarray:
    """`.ftz`: subnormal values become zero of the same sign."""
    tiny = _SMALLEST_NORMAL[kind.removesuffix("x2")]
    return np.where(np.abs(value) < tiny, np.copysign(value.dtype.type(0), value), value)


def _minmax(name: str, nan: bool):
    pick = np.fmin if name == "min" else np.fmax

    def several(first: np.ndarray, *others: np.ndarray) -> np.ndarray:
        """The three-input form is the two-input form applied twice."""
        for other in others:
            first = result(first, other)
        return first

    def result(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """NaN loses unless `.NaN`; +0 is greater than -0."""
        value = pick(a, b)
        zeros = (a == 0) & (b == 0)
        negative = np.signbit(a) | np.signbit(b) if name == "min" else np.signbit(a) & np.signbit(b)
        value = np.where(zeros, np.where(negative, -0.0, 0.0).astype(value.dtype), value)
        return np.where(np.isnan(a) | np.isnan(b), np.nan, value).astype(a.dtype) if nan else value

    return several


def _exact(name: str):
    """The operation on float64 operands: exact for products, for sums rounded to odd enough."""
    return {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "abs": np.abs,
        "neg": np.negative,
    }.get(name)


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a*b+c of f32 in f64: the product is exact, the sum is rounded to odd for one rounding."""
    product = a.astype(np.float64) * b.astype(np.float64)
    return sum_to_odd(product, c.astype(np.float64))


def sum_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b rounded to odd in f64, so that rounding to a narrower format is correct."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    bits = np.atleast_1d(total).view(np.int64)
    even = (bits & 1) == 0
    inexact = np.isfinite(total) & (error != 0)
    away = (error > 0) == (total > 0)
    adjusted = np.where(inexact & even, np.where(away, bits + 1, bits - 1), bits)
    return np.where(inexact & (total != 0), adjusted.view(np.float64), total)


def arithmetic(machine: Machine, ins: Instruction) -> Operation:
    mods = Modifiers(ins)
    kind = mods.last()
    if kind not in FLOATS:
        raise UnknownInstruction(ins, f"type .{kind}")
    name = ins.opcode
    if "f32" in mods.left and name in ("add", "sub", "fma") and kind in ("f16", "bf16"):
        return _mixed(machine, ins, mods, kind)
    three = name in ("min", "max") and kind == "f32"
    operand_count(ins, 1 + _ARITY[name], *([4] if three else []))
    rounding = mods.take(*_ROUNDINGS) if name not in ("min", "max", "abs", "neg") else "rn"
    ftz = kind in _FLUSHING and bool(mods.take("ftz"))
    sums = name in ("add", "sub", "mul", "fma", "mad")
    sat = sums and kind in ("f32", "f16", "f16x2") and bool(mods.take("sat"))
    nan = name in ("min", "max") and bool(mods.take("NaN"))
    mods.done()
    rounding = rounding or "rn"
    if rounding != "rn" and kind != "f32":
        raise UnknownInstruction(ins, f"rounding .{rounding} of .{kind}")
    compute = _compute(name, kind, rounding, nan)
    gets = [machine.registers.source(ins, operand, kind) for operand in ins.operands[1:]]
    put = machine.registers.target(ins, ins.operands[0], kind)

    def run(group) -> None:
        values = [to_float(get(group), kind) for get in gets]
        if ftz:
            values = [flush(value, kind) for value in values]
        result = compute(*values)
        if sat:
            result = np.where(np.isnan(result), 0, np.clip(result, 0, 1)).astype(result.dtype)
        put(group, from_float(flush(result, kind) if ftz else result, kind))

    return run


def _mixed(machine: Machine, ins: Instruction, mods: Modifiers, kind: str) -> Operation:
    """add, sub, fma{.rnd}.f32.atype: a (and b of fma) are widened, the last operand is f32."""
    mods.need("f32")
    rounding = mods.take(*_ROUNDINGS) or "rn"
    mods.done()
    operand_count(ins, 1 + _ARITY[ins.opcode])
    *narrow, last = ins.operands[1:]
    gets = [machine.registers.source(ins, operand, kind) for operand in narrow]
    get_last = machine.registers.source(ins, last, "f32")
    put = machine.registers.target(ins, ins.operands[0], "f32")
    compute = _compute(ins.opcode, "f32", rounding, False)
    return lambda group: put(
        group, compute(*(to_float(get(group), kind) for get in gets), get_last(group))
    )


def _compute(name: str, kind: str, rounding: str, nan: bool):
    if name in ("min", "max"):
        return _minmax(name, nan)
    if kind == "f64":
        if name in ("fma", "mad"):
            return _fused_f64
        return _exact(name)
    if name in ("fma", "mad"):
        return lambda a, b, c: (
            round_f64_to_f32(_fused(a, b, c), rounding) if kind[0:2] == "f3" else _fused(a, b, c)
        )
    operation = _exact(name)
    if rounding == "rn" and kind in ("f32", "f32x2"):
        return operation
    if name in ("abs", "neg"):
        return operation
    if kind == "f32":
        if name == "mul":
            return lambda a, b: round_f64_to_f32(
                a.astype(np.float64) * b.astype(np.float64), rounding
            )
        sign = -1 if name == "sub" else 1
        return lambda a, b: round_f64_to_f32(
            sum_to_odd(a.astype(np.float64), sign * b.astype(np.float64)), rounding
        )
    return lambda *values: operation(*(value.astype(np.float64) for value in values))


def _fused_f64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    from fractions import Fraction

    def one(x: float, y: float, z: float) -> float:
        if not (np.isfinite(x) and np.isfinite(y) and np.isfinite(z)):
            return x * y + z
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        return float(exact) if exact else x * y + z

    return np.vectorize(one, otypes=[np.float64])(a, b, c)


@opcode("fma")
def fused_multiply_add(machine: Machine, ins: Instruction) -> Operation:
    return arithmetic(machine, ins)


def divide(machine: Machine, ins: Instruction) -> Operation:
    """div.{rn,full,approx}: `.full` and `.approx` allow 2 ulp; the quotient here is exact."""
    mods = Modifiers(ins)
    kind = mods.last()
    if ins.opcode != "div" or kind not in ("f32", "f64"):
        raise UnknownInstruction(ins, f"type .{kind}")
    form = mods.need("rn", "full", "approx")
    ftz = kind == "f32" and bool(mods.take("ftz"))
    mods.done()
    if kind == "f64" and form != "rn":
        raise UnknownInstruction(ins, f"div.{form} of .f64")
    operand_count(ins, 3)

    def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if ftz:
            a, b = flush(a), flush(b)
        return flush(a / b) if ftz else a / b

    gets = [machine.registers.source(ins, operand, kind) for operand in ins.operands[1:]]
    put = machine.registers.target(ins, ins.operands[0], kind)
    return lambda group: put(group, quotient(*(get(group) for get in gets)))


_UNARY = {
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@opcode(*_UNARY)
def unary(machine: Machine, ins: Instruction) -> Operation:
    mods = Modifiers(ins)
    kind = mods.last()
    allowed = (
        ("f32", "f16", "bf16", "f16x2", "bf16x2")
        if ins.opcode in ("ex2", "tanh")
        else ("f32", "f64")
    )
    if kind not in allowed:
        raise UnknownInstruction(ins, f"type .{kind}")
    mods.need("approx", *(("rn",) if ins.opcode in ("rcp", "sqrt") else ()))
    ftz = bool(mods.take("ftz"))
    mods.done()
    operand_count(ins, 2)
    function = _UNARY[ins.opcode]
    get = machine.registers.source(ins, ins.operands[1], kind)
    put = machine.registers.target(ins, ins.operands[0], kind)

    def run(group) -> None:
        value = to_float(get(group), kind)
        if ftz:
            value = flush(value, kind)
        wide = function(value.astype(np.float64))
        result = wide.astype(np.float32) if kind == "f32" else wide
        put(group, from_float(flush(result, kind) if ftz else result, kind))

    return run


_ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def comparison(mods: Modifiers, kind: str):
    """setp on floats: ordered forms are false, `u` forms true when an operand is NaN."""
    name = mods.need(*_ORDERED, *(f"{n}u" for n in _ORDERED), "num", "nan")
    ftz = kind in ("f16", "f32") and bool(mods.take("ftz"))
    if kind not in ("f16", "bf16", "f32", "f64"):
        raise UnknownInstruction(mods.ins, f"type .{kind}")

    def compare(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = to_float(a, kind), to_float(b, kind)
        if ftz:
            a, b = flush(a, kind), flush(b, kind)
        unordered = np.isnan(a) | np.isnan(b)
        if name == "nan":
            return unordered
        if name == "num":
            return ~unordered
        if name.endswith("u"):
            return _ORDERED[name[:-1]](a, b) | unordered
        return _ORDERED[name](a, b) & ~unordered

    return compare


@opcode("copysign")
def copy_sign(machine: Machine, ins: Instruction) -> Operation:
    """The sign of a with the value of b."""
    mods = Modifiers(ins)
    kind = mods.need("f32", "f64")
    mods.done()
    operand_count(ins, 3)
    sign, value = (machine.registers.source(ins, operand, kind) for operand in ins.operands[1:])
    put = machine.registers.target(ins, ins.operands[0], kind)
    return lambda group: put(group, np.copysign(value(group), sign(group)))
