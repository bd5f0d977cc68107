"""Integer arithmetic, logic, shifts, comparison and data movement between registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import ops_float
from .decode import Modifiers, Operation, opcode, operand_count
from .instruction import Instruction, Pair, Vector, type_bytes
from .ptx_types import is_signed, numpy_type
from .report import UnknownInstruction

if TYPE_CHECKING:
    from .machine import Machine

INTEGERS = frozenset({"u16", "u32", "u64", "s16", "s32", "s64"})
BITS = frozenset({"b16", "b32", "b64"})
_WIDER = {"16": "32", "32": "64"}


def elementwise(
    machine: Machine, ins: Instruction, kind: str, function, result: str = ""
) -> Operation:
    """d = function(a, b, ...) with every operand of type `kind`."""
    registers = machine.registers
    gets = [registers.source(ins, operand, kind) for operand in ins.operands[1:]]
    put = registers.target(ins, ins.operands[0], result or kind)
    if len(gets) == 2:
        first, second = gets
        return lambda group: put(group, function(first(group), second(group)))
    return lambda group: put(group, function(*(get(group) for get in gets)))


def need_type(ins: Instruction, kind: str, allowed) -> None:
    if kind not in allowed:
        raise UnknownInstruction(ins, f"type .{kind}")


@opcode("add", "sub", "min", "max", "abs", "neg")
def arithmetic(machine: Machine, ins: Instruction) -> Operation:
    mods = Modifiers(ins)
    kind = mods.last()
    if kind not in INTEGERS:
        return ops_float.arithmetic(machine, ins)
    mods.done()
    operand_count(ins, 2 if ins.opcode in ("abs", "neg") else 3)
    if ins.opcode in ("abs", "neg"):
        need_type(ins, kind, ("s16", "s32", "s64"))
    functions = {
        "add": np.add,
        "sub": np.subtract,
        "min": np.minimum,
        "max": np.maximum,
        "abs": np.abs,
        "neg": np.negative,
    }
    return elementwise(machine, ins, kind, functions[ins.opcode])


def _full_product(a: np.ndarray, b: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """High and low halves of the 2n-bit product."""
    bits = 8 * type_bytes(kind)
    if bits < 64:
        wide = numpy_type(kind[0] + _WIDER[str(bits)])
        product = a.astype(wide) * b.astype(wide)
        return (product >> wide.type(bits)).astype(a.dtype), product.astype(a.dtype)
    high = _high64(a.view(np.uint64), b.view(np.uint64))
    if is_signed(kind):
        high = high.view(np.int64) - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)
    return high.astype(a.dtype), a * b


def _high64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    return a1 * b1 + (middle >> half) + ((a0 * b1 + (middle & low)) >> half)


@opcode("mul", "mad")
def multiply(machine: Machine, ins: Instruction) -> Operation:
    """`.lo` and `.hi` keep half of the product, `.wide` all of it; mad adds c after that."""
    mods = Modifiers(ins)
    kind = mods.last()
    if kind not in INTEGERS:
        return ops_float.arithmetic(machine, ins)
    part = mods.need("lo", "hi", "wide")
    mods.done()
    operand_count(ins, 3 if ins.opcode == "mul" else 4)
    registers = machine.registers
    first = registers.source(ins, ins.operands[1], kind)
    second = registers.source(ins, ins.operands[2], kind)
    result = kind[0] + _WIDER[kind[1:]] if part == "wide" else kind
    put = registers.target(ins, ins.operands[0], result)
    add = registers.source(ins, ins.operands[3], result) if ins.opcode == "mad" else None
    wide = numpy_type(result)

    def run(group) -> None:
        a, b = first(group), second(group)
        if part == "wide":
            product = a.astype(wide) * b.astype(wide)
        elif part == "lo":
            product = a * b
        else:
            product = _full_product(a, b, kind)[0]
        put(group, product if add is None else product + add(group))

    return run


@opcode("div", "rem")
def divide(machine: Machine, ins: Instruction) -> Operation:
    """Integer division rounds toward zero; division by zero gives an unspecified value."""
    mods = Modifiers(ins)
    kind = mods.last()
    if kind not in INTEGERS:
        return ops_float.divide(machine, ins)
    mods.done()
    operand_count(ins, 3)

    def truncated(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if (b == 0).any():
            machine.find("arithmetic", "integer division by zero", None)
        safe = np.where(b == 0, 1, b).astype(b.dtype)
        if is_signed(kind):
            remainder = np.fmod(a, safe)
            quotient = (a - remainder) // safe
        else:
            remainder, quotient = a % safe, a // safe
        return quotient if ins.opcode == "div" else remainder

    return elementwise(machine, ins, kind, truncated)


@opcode("and", "or", "xor", "not")
def logic(machine: Machine, ins: Instruction) -> Operation:
    mods = Modifiers(ins)
    kind = mods.last()
    mods.done()
    need_type(ins, kind, BITS | {"pred"})
    operand_count(ins, 2 if ins.opcode == "not" else 3)
    functions = {
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "not": np.invert,
    }
    return elementwise(machine, ins, kind, functions[ins.opcode])


_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def comparison(ins: Instruction, mods: Modifiers, kind: str):
    """A comparison; float forms with a `u` suffix are also true when an operand is NaN."""
    floating = kind in ops_float.FLOATS
    if floating:
        return ops_float.comparison(mods, kind)
    name = mods.need(*_COMPARE)
    if name in ("lo", "ls", "hi", "hs"):
        need_type(ins, kind, ("u16", "u32", "u64"))
    elif kind in BITS and name not in ("eq", "ne"):
        raise UnknownInstruction(ins, f"{name} of .{kind}")
    else:
        need_type(ins, kind, INTEGERS | BITS)
    return _COMPARE[name]


@opcode("setp")
def set_predicate(machine: Machine, ins: Instruction) -> Operation:
    """p = (a cmp b) boolop c; q = !(a cmp b) boolop c."""
    mods = Modifiers(ins)
    kind = mods.last()
    boolean = mods.take("and", "or", "xor")
    compare = comparison(ins, mods, kind)
    mods.done()
    operand_count(ins, 4 if boolean else 3)
    registers = machine.registers
    first = registers.source(ins, ins.operands[1], kind)
    second = registers.source(ins, ins.operands[2], kind)
    third = registers.source(ins, ins.operands[3], "pred") if boolean else None
    target = ins.operands[0]
    pair = isinstance(target, Pair)
    put = registers.target(ins, target.first if pair else target, "pred")
    other = registers.target(ins, target.second, "pred") if pair else None
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(boolean)

    def run(group) -> None:
        result = compare(first(group), second(group))
        if combine is None:
            put(group, result)
            if other is not None:
                other(group, ~result)
        else:
            c = third(group)
            put(group, combine(result, c))
            if other is not None:
                other(group, combine(~result, c))

    return run


@opcode("selp")
def select(machine: Machine, ins: Instruction) -> Operation:
    mods = Modifiers(ins)
    kind = mods.last()
    mods.done()
    operand_count(ins, 4)
    need_type(ins, kind, BITS | INTEGERS | {"f32", "f64"})
    registers = machine.registers
    first = registers.source(ins, ins.operands[1], kind, checked=False)
    second = registers.source(ins, ins.operands[2], kind, checked=False)
    which = registers.source(ins, ins.operands[3], "pred")
    put = registers.target(ins, ins.operands[0], kind)
    return lambda group: put(group, np.where(which(group), first(group), second(group)))


@opcode("mov")
def move(machine: Machine, ins: Instruction) -> Operation:
    """Also packs and unpacks: `mov.b32 {lo, hi}, r` and back."""
    mods = Modifiers(ins)
    kind = mods.last()
    mods.done()
    operand_count(ins, 2)
    need_type(ins, kind, BITS | INTEGERS | {"f32", "f64", "pred"})
    target, source = ins.operands
    if isinstance(target, Vector) and isinstance(source, Vector):
        raise UnknownInstruction(ins, "vector to vector")
    get = machine.registers.source(ins, source, kind, checked=False)
    put = machine.registers.target(ins, target, kind)
    return lambda group: put(group, get(group))
