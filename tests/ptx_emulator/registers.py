"""Registers: one array per register with an element for every lane of the machine.

A `Group` is the set of lanes that execute one instruction together.  Operand getters and setters
are built once per instruction, so executing is calling closures on whole groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .instruction import Imm, Instruction, Memory, Reg, Sink, Symbol, Vector
from .ptx_types import RAW, is_signed, numpy_type, type_bytes
from .report import UnknownInstruction

if TYPE_CHECKING:
    from .machine import Machine

Getter = Callable[["Group"], np.ndarray]
Setter = Callable[["Group", np.ndarray], None]


class Group:
    """Lanes in ascending order; `sel` indexes register arrays (a slice when contiguous)."""

    __slots__ = ("full", "lanes", "n", "sel")

    def __init__(self, lanes: np.ndarray, total: int) -> None:
        self.lanes = lanes
        self.n = len(lanes)
        first, last = int(lanes[0]), int(lanes[-1])
        self.sel = slice(first, last + 1) if last - first + 1 == self.n else lanes
        self.full = self.n == total

    def where(self, mask: np.ndarray) -> Group:
        return Group(self.lanes[mask], -1)


class Register:
    """`written` is None once every lane has a value."""

    __slots__ = ("data", "kind", "name", "written")

    def __init__(self, name: str, kind: str, lanes: int) -> None:
        self.name = name
        self.kind = kind
        dtype = np.dtype(bool) if kind == "pred" else RAW[type_bytes(kind)]
        self.data = np.zeros(lanes, dtype)
        self.written: np.ndarray | None = np.zeros(lanes, bool)


class RegisterFile:
    def __init__(self, machine: Machine, kinds: dict[str, str]) -> None:
        self.machine = machine
        self.registers = {
            name: Register(name, kind, machine.lane_count) for name, kind in kinds.items()
        }

    def restart(self, lanes: slice) -> None:
        """New blocks start in these lanes: nothing is written."""
        for register in self.registers.values():
            if register.written is None:
                register.written = np.ones(len(register.data), bool)
            register.written[lanes] = False

    def unwritten(self, register: Register, group: Group) -> None:
        missing = ~register.written[group.sel]  # type: ignore[index]
        if missing.any():
            self.machine.find(
                "uninitialised", f"register {register.name} was never written", missing
            )

    # ---- sources ---------------------------------------------------------------------------

    def source(self, ins: Instruction, operand, kind: str, checked: bool = True) -> Getter:
        """Getter of an operand as the numpy type of PTX type `kind`."""
        if isinstance(operand, Reg):
            return self._register_source(ins, operand, kind, checked)
        if isinstance(operand, Imm):
            value = literal(operand, kind)
            return lambda group: value
        if isinstance(operand, Symbol):
            return self._symbol_source(ins, operand, kind)
        if isinstance(operand, Vector) and kind != "pred":
            return self._packed_source(ins, operand, kind)
        raise UnknownInstruction(ins, f"operand {operand} as {kind}")

    def _register_source(self, ins: Instruction, operand: Reg, kind: str, checked: bool) -> Getter:
        register = self.registers[operand.name]
        if (register.kind == "pred") != (kind == "pred"):
            raise UnknownInstruction(ins, f"{register.kind} register as {kind}")
        want = numpy_type(kind)
        have = register.data.dtype
        if have.itemsize < want.itemsize:
            raise UnknownInstruction(ins, f"{register.kind} register as {kind}")
        narrow = have.itemsize > want.itemsize
        view = register.data if narrow else register.data.view(want)
        raw = RAW[want.itemsize]
        negated = operand.negated

        def get(group: Group) -> np.ndarray:
            if checked and register.written is not None:
                self.unwritten(register, group)
            value = view[group.sel]
            if narrow:
                value = value.astype(raw).view(want)
            return ~value if negated else value

        return get

    def _symbol_source(self, ins: Instruction, operand: Symbol, kind: str) -> Getter:
        want = numpy_type(kind)
        if operand.name.startswith("%"):
            special = self.machine.special(ins, operand.name)
            return lambda group: special(group).astype(want)
        address = np.array(self.machine.variable_address(ins, operand.name) + operand.offset)
        if address.ndim == 0:
            constant = address.astype(want)
            return lambda group: constant
        return lambda group: address[group.sel].astype(want)

    def _packed_source(self, ins: Instruction, operand: Vector, kind: str) -> Getter:
        """`mov.b32 r, {lo, hi}`: elements from the least significant bits up."""
        size = type_bytes(kind) // len(operand.items)
        parts = [self.source(ins, item, f"b{8 * size}", checked=False) for item in operand.items]
        want = RAW[type_bytes(kind)]

        def get(group: Group) -> np.ndarray:
            total = np.zeros((), want)
            for i, part in enumerate(parts):
                total = total | (part(group).astype(want) << want.type(8 * size * i))
            return total

        return get

    # ---- destinations ----------------------------------------------------------------------

    def target(self, ins: Instruction, operand, kind: str) -> Setter:
        """Setter that stores values of PTX type `kind`, extended to the register's width."""
        if operand == Sink:
            return lambda group, value: None
        if isinstance(operand, Vector):
            return self._unpacked_target(ins, operand, kind)
        if not isinstance(operand, Reg) or operand.negated:
            raise UnknownInstruction(ins, f"destination {operand}")
        register = self.registers[operand.name]
        if (register.kind == "pred") != (kind == "pred"):
            raise UnknownInstruction(ins, f"{register.kind} register as {kind}")
        have, want = register.data.dtype, numpy_type(kind)
        if have.itemsize < want.itemsize:
            raise UnknownInstruction(ins, f"{kind} into a {register.kind} register")
        wider = have.itemsize > want.itemsize
        signed = np.dtype(f"i{have.itemsize}")
        extend = wider and is_signed(kind)
        data = register.data if wider else register.data.view(want)

        def put(group: Group, value: np.ndarray) -> None:
            if wider:
                value = value.astype(signed).view(have) if extend else raw_bits(value)
            data[group.sel] = value
            if register.written is not None:
                if group.full:
                    register.written = None
                else:
                    register.written[group.sel] = True

        return put

    def _unpacked_target(self, ins: Instruction, operand: Vector, kind: str) -> Setter:
        size = type_bytes(kind) // len(operand.items)
        part = f"b{8 * size}"
        puts = [self.target(ins, item, part) for item in operand.items]
        raw, want = RAW[size], RAW[type_bytes(kind)]

        def put(group: Group, value: np.ndarray) -> None:
            bits = raw_bits(value).astype(want)
            for i, store in enumerate(puts):
                store(group, (bits >> want.type(8 * size * i)).astype(raw))

        return put

    # ---- lists of registers ----------------------------------------------------------------

    def sources(self, ins: Instruction, operand, kind: str) -> Callable[[Group], np.ndarray]:
        """A vector operand (or a single one) as an array [lanes, registers]."""
        items = operand.items if isinstance(operand, Vector) else (operand,)
        gets = [self.source(ins, item, kind) for item in items]
        want = numpy_type(kind)

        def get(group: Group) -> np.ndarray:
            out = np.empty((group.n, len(gets)), want)
            for i, part in enumerate(gets):
                out[:, i] = part(group)
            return out

        return get

    def targets(self, ins: Instruction, operand, kind: str) -> Setter:
        items = operand.items if isinstance(operand, Vector) else (operand,)
        puts = [self.target(ins, item, kind) for item in items]

        def put(group: Group, values: np.ndarray) -> None:
            for i, store in enumerate(puts):
                store(group, values[:, i])

        return put


def raw_bits(value: np.ndarray) -> np.ndarray:
    """The same bits as an unsigned integer."""
    value = np.asarray(value)
    return value.view(np.uint8) if value.dtype == bool else value.view(RAW[value.dtype.itemsize])


def literal(operand: Imm, kind: str) -> np.ndarray:
    """A literal as a value of PTX type `kind` ("Constants": floats are given as bits)."""
    want = numpy_type(kind)
    size = want.itemsize
    if kind == "pred":
        return np.array(bool(operand.value))
    bits = operand.value
    if operand.kind == "f64" and want == np.float32:
        bits = int(np.array(bits, np.uint64).view(np.float64).astype(np.float32).view(np.uint32))
    elif operand.kind == "int" and want.kind == "f":
        return np.array(operand.value, want)
    return np.array(bits % (1 << 8 * size), RAW[size]).view(want)


def memory_operand(ins: Instruction, position: int) -> Memory:
    operand = ins.operands[position]
    if not isinstance(operand, Memory):
        raise UnknownInstruction(ins, "expected an address in brackets")
    return operand
