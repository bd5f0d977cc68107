"""Shifts, bit fields and other operations on single bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .decode import Modifiers, Operation, opcode, operand_count
from .instruction import Instruction, type_bytes
from .ops_integer import BITS, INTEGERS, elementwise, need_type
from .ptx_types import RAW, is_signed, numpy_type
from .report import UnknownInstruction

if TYPE_CHECKING:
    from .machine import Machine


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
    mods = Modifiers(ins)
    kind = mods.last()
    mods.done()
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
        if size > 0 and start + size <= width:
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
    mods = Modifiers(ins)
    kind = mods.last()
    mods.done()
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
        ones = np.where(
            size >= width,
            bits(-1 % (1 << width)),
            (bits(1) << (size % width).astype(bits)) - bits(1),
        )
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
        "brev": lambda a: (
            bits_of(a)[:, ::-1].astype(RAW[width // 8]) << np.arange(width, dtype=RAW[width // 8])
        ).sum(axis=1, dtype=RAW[width // 8]),
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
