"""atom and red ("Atomic operations").

Lanes of one instruction are performed one after the other in ascending order of lanes; that is
one of the legal orders.  Without duplicate addresses whole groups are updated at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .addresses import Resolver
from .decode import Modifiers, Operation, opcode, operand_count
from .global_races import strength
from .instruction import Instruction, type_bytes
from .ops_memory import SCOPES, SPACES
from .ptx_types import RAW, numpy_type
from .registers import Group, memory_operand
from .report import UnknownInstruction
from .rounding import from_float, to_float

if TYPE_CHECKING:
    from .machine import Machine

_ALLOWED = {
    "add": ("u32", "s32", "u64", "f32", "f64", "f16", "bf16", "f16x2", "bf16x2"),
    "min": ("u32", "s32", "u64", "s64", "f16", "bf16", "f16x2", "bf16x2"),
    "max": ("u32", "s32", "u64", "s64", "f16", "bf16", "f16x2", "bf16x2"),
    "inc": ("u32",),
    "dec": ("u32",),
    "and": ("b32", "b64"),
    "or": ("b32", "b64"),
    "xor": ("b32", "b64"),
    "exch": ("b32", "b64"),
    "cas": ("b16", "b32", "b64"),
}
_FLOATS = ("f16", "bf16", "f16x2", "bf16x2")


def _new_value(name: str, kind: str):
    """f(old, b[, c]) for arrays of the numpy type of `kind`."""
    if name == "add" and kind in _FLOATS:
        return lambda old, b: from_float(
            to_float(old, kind).astype(np.float64) + to_float(b, kind).astype(np.float64), kind
        )
    if name in ("min", "max") and kind in _FLOATS:
        pick = np.fmin if name == "min" else np.fmax
        return lambda old, b: from_float(pick(to_float(old, kind), to_float(b, kind)), kind)
    return {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "exch": lambda old, b: b,
        "inc": lambda old, b: np.where(old >= b, 0, old + np.uint32(1)).astype(np.uint32),
        "dec": lambda old, b: np.where((old == 0) | (old > b), b, old - np.uint32(1)).astype(
            np.uint32
        ),
        "cas": lambda old, b, c: np.where(old == b, c, old).astype(old.dtype),
    }[name]


class AtomicForm:
    def __init__(self, ins: Instruction) -> None:
        mods = Modifiers(ins)
        self.kind = mods.last()
        self.order = mods.take("relaxed", "acquire", "release", "acq_rel") or "relaxed"
        self.scope = strength(mods.take(*SCOPES) or "gpu")
        self.space = mods.take(*(space for space in SPACES if space != "param"))
        vector = mods.take("v2", "v4", "v8")
        self.count = int(vector[1:]) if vector else 1
        self.name = mods.need(*_ALLOWED)
        if self.kind in _FLOATS:
            mods.need("noftz")
        mods.done()
        if self.kind not in _ALLOWED[self.name]:
            raise UnknownInstruction(ins, f"{self.name} of .{self.kind}")
        if self.count > 1 and self.space != "global":
            raise UnknownInstruction(ins, "vectors only in global memory")
        self.unit = type_bytes(self.kind)


@opcode("atom", "red")
def atomic(machine: Machine, ins: Instruction) -> Operation:
    form = AtomicForm(ins)
    returns = ins.opcode == "atom"
    sources = 2 if form.name == "cas" else 1
    operand_count(ins, 1 + returns + sources)
    resolve = Resolver(machine, ins, memory_operand(ins, int(returns)), form.space)
    gets = [
        machine.registers.sources(ins, operand, form.kind)
        for operand in ins.operands[1 + returns :]
    ]
    put = machine.registers.targets(ins, ins.operands[0], form.kind) if returns else None
    function = _new_value(form.name, form.kind)
    dtype = numpy_type(form.kind)
    size = form.unit * form.count

    def run(group: Group) -> None:
        space, at = resolve(group)
        values = [np.ascontiguousarray(get(group)) for get in gets]
        space.check(at, size, "load")
        _order(machine, group.lanes, space, at, size, form, reads=returns)
        cells = (at // form.unit)[:, None] + np.arange(form.count)
        memory = space.values[form.unit].view(dtype)
        old = _update(memory, cells, values, function)
        machine.progress += 1
        if returns:
            machine.yield_lanes(group.lanes)
        if machine.counters is not None:
            machine.traffic.access("atomic", space, group.lanes, at, size)
        if put is not None:
            put(group, old.view(RAW[form.unit]).view(dtype))

    return run


def _update(memory: np.ndarray, cells: np.ndarray, values: list, function) -> np.ndarray:
    if len(np.unique(cells)) == cells.size:
        old = memory[cells]
        memory[cells] = function(old, *values)
        return old
    old = np.empty(cells.shape, memory.dtype)
    for row in range(len(cells)):
        old[row] = memory[cells[row]]
        memory[cells[row]] = function(old[row], *(value[row] for value in values))
    return old


def _order(machine: Machine, lanes, space, at, size: int, form: AtomicForm, reads: bool) -> None:
    """Races, release and acquire."""
    ticks = machine.ticks(lanes)  # of the write itself, which its own release covers
    if space is machine.shared:
        machine.shared_races.store(lanes, at, size, None, strong=True)
    if space in (machine.shared, machine.memory):
        machine.flags.update(lanes, space, at, form.order, form.scope, reads)
    if space is machine.memory:
        machine.races.store(lanes, at, size, None, form.scope, ticks=ticks)
