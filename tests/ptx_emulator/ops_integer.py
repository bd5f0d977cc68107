"""Integer arithmetic, logic, shifts, comparison and data movement between registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import ops_float
from .decode import Modifiers, Operation, opcode, operand_count
from .report import UnknownInstruction
from .syntax import Instruction, Pair, Vector, type_bytes
from .ptx_types import RAW, is_signed, numpy_type

if TYPE_CHECKING:
    from .machine import Machine

INTEGERS = frozenset({"u16", "u32", "u64", "s16", "s32", "s64"})
BITS = frozenset({"b16", "b32", "b64"})
_WIDER = {"16": "32", "32": "64"}


def elementwise(machine: Machine, ins: Instruction, kind: str, function, result: str = "") -> Operation:
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
        "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
        "abs": np.abs, "neg": np.negative,
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
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    }
    return elementwise(machine, ins, kind, functions[ins.opcode])


@opcode("shl", "shr")
def shift(machine: Machine, ins: Instruction) -> Operation:
    """Amounts past the width clamp to it; shr of signed types fills with the sign."""
    mods = Modifiers(ins)
    kind = mods.last()
    mods.done()
    need_type(ins, kind, BITS if ins.opcode == "shl" else BITS | INTEGERS)
    operand_count(ins, 3)
    registers = machine.registers
    value = registers.source(ins, ins.operands[1], kind)
    amount = registers.source(ins, ins.operands[2], "u32")
    put = registers.target(ins, ins.operands[0], kind)
    dtype = numpy_type(kind)
    bits = 8 * dtype.itemsize
    signed = is_signed(kind)

    def run(group) -> None:
        a, n = value(group), amount(group)
        inside = np.minimum(n, bits - 1).astype(dtype)
        shifted = a << inside if ins.opcode == "shl" else a >> inside
        put(group, shifted if signed else np.where(n < bits, shifted, dtype.type(0)))

    return run


@opcode("shf")
def funnel_shift(machine: Machine, ins: Instruction) -> Operation:
    """shf.l gives the high word of {b,a} << c, shf.r the low word of {b,a} >> c."""
    mods = Modifiers(ins)
    side, mode = mods.need("l", "r"), mods.need("wrap", "clamp")
    need_type(ins, mods.last(), ("b32",))
    mods.done()
    operand_count(ins, 4)

    def funnel(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        n = (c & np.uint32(31) if mode == "wrap" else np.minimum(c, 32)).astype(np.uint64)
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        if side == "l":
            return ((both << n) >> np.uint64(32)).astype(np.uint32)
        return (both >> n).astype(np.uint32)

    return elementwise(machine, ins, "b32", funnel)


@opcode("bfe")
def bit_field_extract(machine: Machine, ins: Instruction) -> Operation:
    """Length c at position b; a signed field is extended from its top bit, which is clamped to
    the most significant bit of a."""
    kind = Modifiers(ins).last()
    need_type(ins, kind, ("u32", "s32", "u64", "s64"))
    operand_count(ins, 4)
    registers = machine.registers
    value = registers.source(ins, ins.operands[1], kind)
    position = registers.source(ins, ins.operands[2], "u32")
    length = registers.source(ins, ins.operands[3], "u32")
    put = registers.target(ins, ins.operands[0], kind)
    width = 8 * type_bytes(kind)

    def run(group) -> None:
        a = np.atleast_1d(value(group)).astype(object)
        start = np.atleast_1d(position(group)).astype(object) & 0xFF
        size = np.atleast_1d(length(group)).astype(object) & 0xFF
        put(group, _extract(a, start, size, width, is_signed(kind)).astype(numpy_type(kind)))

    def quick(group) -> None:
        a, start, size = value(group), int(position(group)), int(length(group))
        left = width - start - size
        bits = a.dtype.type
        put(group, (a << bits(left)) >> bits(width - size))

    constant = all(not hasattr(op, "name") for op in ins.operands[2:])
    if constant:
        start, size = (op.value for op in ins.operands[2:])
        if 0 < size and start + size <= width:
            return quick
    return run


def _extract(a, start, size, width: int, signed: bool) -> np.ndarray:
    unsigned = a % (1 << width)
    field = (unsigned >> np.minimum(start, width)) % (1 << np.minimum(size, width))
    if not signed:
        return field
    top = np.minimum(start + size - 1, width - 1)
    sign = np.where(size == 0, 0, (unsigned >> np.maximum(top, 0)) & 1)
    present = np.clip(np.minimum(size, width - start), 0, width)
    extended = field - sign * (1 << present) * 1
    return np.where((sign == 1) & (present == 0), -1, extended)


@opcode("bfi")
def bit_field_insert(machine: Machine, ins: Instruction) -> Operation:
    """Insert the low d bits of a into b at position c."""
    kind = Modifiers(ins).last()
    need_type(ins, kind, ("b32", "b64"))
    operand_count(ins, 5)
    registers = machine.registers
    field = registers.source(ins, ins.operands[1], kind)
    base = registers.source(ins, ins.operands[2], kind)
    position = registers.source(ins, ins.operands[3], "u32")
    length = registers.source(ins, ins.operands[4], "u32")
    put = registers.target(ins, ins.operands[0], kind)
    bits, width = numpy_type(kind).type, 8 * type_bytes(kind)

    def run(group) -> None:
        start = position(group) & np.uint32(0xFF)
        size = np.minimum(length(group) & np.uint32(0xFF), width)
        ones = np.where(size >= width, bits(-1 % (1 << width)),
                        (bits(1) << (size % width).astype(bits)) - bits(1))
        inside = start < width
        by = np.where(inside, start, 0).astype(bits)
        mask = np.where(inside, ones << by, bits(0)).astype(bits)
        put(group, (base(group) & ~mask) | ((field(group) << by) & mask))

    return run


@opcode("popc", "clz", "brev", "bfind")
def bit_counting(machine: Machine, ins: Instruction) -> Operation:
    mods = Modifiers(ins)
    kind = mods.last()
    mods.done()
    need_type(ins, kind, ("u32", "s32", "u64") if ins.opcode == "bfind" else ("b32", "b64"))
    width = 8 * type_bytes(kind)

    def bits_of(a: np.ndarray) -> np.ndarray:
        positions = np.arange(width, dtype=RAW[width // 8])
        return ((np.atleast_1d(a).view(RAW[width // 8])[:, None] >> positions) & 1).astype(bool)

    def highest(a: np.ndarray) -> np.ndarray:
        bits = bits_of(a)
        return np.where(bits.any(axis=1), width - 1 - bits[:, ::-1].argmax(axis=1), -1)

    functions = {
        "popc": lambda a: bits_of(a).sum(axis=1).astype(np.uint32),
        "clz": lambda a: (width - 1 - highest(a)).astype(np.uint32),
        "bfind": lambda a: highest(np.where(a < 0, ~a, a)).astype(np.int32).view(np.uint32),
        "brev": lambda a: (bits_of(a)[:, ::-1].astype(RAW[width // 8])
                           << np.arange(width, dtype=RAW[width // 8])).sum(
                               axis=1, dtype=RAW[width // 8]),
    }
    result = kind if ins.opcode == "brev" else "u32"
    return elementwise(machine, ins, kind, functions[ins.opcode], result)


@opcode("lop3")
def three_input_logic(machine: Machine, ins: Instruction) -> Operation:
    """Bit i of the table is the result for (a, b, c) bits that spell i."""
    if ins.modifiers != ("b32",):
        raise UnknownInstruction(ins)
    operand_count(ins, 5)
    table = ins.operands[4].value
    registers = machine.registers
    gets = [registers.source(ins, operand, "b32") for operand in ins.operands[1:4]]
    put = registers.target(ins, ins.operands[0], "b32")

    def run(group) -> None:
        a, b, c = (get(group) for get in gets)
        total = np.zeros(group.n, np.uint32)
        for i in range(8):
            if table >> i & 1:
                total |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        put(group, total)

    return run


@opcode("prmt")
def permute_bytes(machine: Machine, ins: Instruction) -> Operation:
    """Each selector nibble picks one of the 8 bytes of {b, a}; its top bit replicates the sign."""
    if ins.modifiers != ("b32",):
        raise UnknownInstruction(ins)
    operand_count(ins, 4)

    def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
        total = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint32)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = (both >> ((nibble & 7).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)
            sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            byte = np.where(nibble & 8, sign, byte)
            total = total | (byte.astype(np.uint32) << np.uint32(8 * i))
        return total

    return elementwise(machine, ins, "b32", permute)


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal,
    "hi": np.greater, "hs": np.greater_equal,
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
