"""ld and st, with vectors, cache operators and memory-ordering qualifiers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .addresses import Resolver
from .decode import Modifiers, Operation, opcode, operand_count
from .global_races import WEAK, strength
from .instruction import Instruction, type_bytes
from .ptx_types import RAW, is_type, numpy_type
from .registers import memory_operand
from .report import UnknownInstruction

if TYPE_CHECKING:
    from .machine import Machine

SPACES = ("global", "shared", "shared::cta", "shared::cluster", "local", "param", "const")
_STRONG = ("volatile", "relaxed", "acquire", "release")
_CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt")
_L2_EVICTION = [f"L2::evict_{kind}" for kind in ("normal", "first", "last")]
_L1_EVICTION = [f"L1::evict_{kind}" for kind in ("normal", "unchanged", "first", "last")]
PREFETCH_SIZES = ("L2::64B", "L2::128B", "L2::256B")
SCOPES = ("cta", "cluster", "gpu", "sys")


class AccessForm:
    """What the modifiers of a load or store say."""

    def __init__(self, ins: Instruction) -> None:
        mods = Modifiers(ins)
        self.kind = mods.last()
        if not is_type(self.kind) or self.kind in ("pred", "bf16", "tf32"):
            raise UnknownInstruction(ins, f"type .{self.kind}")
        self.order = mods.take(*_STRONG)
        mods.take("weak")
        self.scope = mods.take(*SCOPES) if self.order else ""
        self.space = mods.take(*SPACES)
        vector = mods.take("v2", "v4", "v8")
        self.count = int(vector[1:]) if vector else 1
        mods.take(*_CACHE)
        if ins.opcode == "ld":
            mods.take("nc")
            mods.take(*PREFETCH_SIZES)
        hint = mods.take("L2::cache_hint")
        mods.take("L1::no_allocate", *_L1_EVICTION)
        mods.take(*_L2_EVICTION)
        mods.done()
        expected = 3 if hint else 2
        if len(ins.operands) != expected:
            raise UnknownInstruction(ins, f"{len(ins.operands)} operands")
        if self.order and not self.scope and self.order != "volatile":
            raise UnknownInstruction(ins, "no scope")
        self.unit = type_bytes(self.kind)
        self.size = self.unit * self.count
        self.strong = strength(self.scope) if self.order else WEAK


@opcode("ld")
def load(machine: Machine, ins: Instruction) -> Operation:
    form = AccessForm(ins)
    resolve = Resolver(machine, ins, memory_operand(ins, 1), form.space)
    put = machine.registers.targets(ins, ins.operands[0], form.kind)
    dtype = numpy_type(form.kind)

    def run(group) -> None:
        space, at = resolve(group)
        values = space.load(at, form.size, form.unit)
        if form.strong:
            if space in (machine.memory, machine.shared):
                machine.flags.read(group.lanes, space, at, form.order == "acquire", form.strong)
            machine.looked(group.lanes)
        if space is machine.shared:
            machine.shared_races.load(group.lanes, at, form.size, form.strong)
        elif space is machine.memory:
            machine.races.load(group.lanes, at, form.size, form.strong)
        if machine.counters is not None:
            machine.traffic.access("load", space, group.lanes, at, form.size)
        put(group, values.view(dtype))

    return run


@opcode("st")
def store(machine: Machine, ins: Instruction) -> Operation:
    form = AccessForm(ins)
    resolve = Resolver(machine, ins, memory_operand(ins, 0), form.space)
    get = machine.registers.sources(ins, ins.operands[1], form.kind)
    raw = RAW[form.unit]

    def run(group) -> None:
        space, at = resolve(group)
        values = get(group).view(raw)
        write(machine, group.lanes, space, at, values, form.strong)
        if form.strong and space in (machine.memory, machine.shared):
            machine.flags.write(group.lanes, space, at, form.order == "release", form.strong)
        if machine.counters is not None:
            machine.traffic.access("store", space, group.lanes, at, form.size)

    return run


def write(machine: Machine, lanes, space, at: np.ndarray, values: np.ndarray, strong: int) -> None:
    """Check, order and perform a store of values [n, k]."""
    size = values.shape[1] * values.dtype.itemsize
    machine.progress += 1
    tracker = None
    if space is machine.shared:
        tracker = machine.shared_races
        if machine.mbarriers.objects:
            hit = machine.mbarriers.overwritten(at, size)
            if hit.any():
                machine.find("mbarrier", "store over a live mbarrier object", hit)
    elif space is machine.memory:
        tracker = machine.races
    elif space is machine.params:
        machine.stop("out-of-bounds", "store to parameter memory", None)
    if tracker is None:
        space.store(at, values)
        return
    space.check(at, size, "store")

    def same(rows: np.ndarray) -> np.ndarray:
        return space.holds(at[rows], values[rows])

    tracker.store(lanes, at, size, same, strong)
    space.store(at, values)
    if not strong:
        tracker.overlaps(lanes, at, size, same)


@opcode("createpolicy")
def create_policy(machine: Machine, ins: Instruction) -> Operation:
    """A cache policy is opaque; here it is zero."""
    mods = Modifiers(ins)
    mods.need("fractional")
    mods.need(*(f"L2::evict_{kind}" for kind in ("last", "normal", "first", "unchanged")))
    mods.take("L2::evict_unchanged", "L2::evict_first")
    mods.need("b64")
    mods.done()
    operand_count(ins, 1, 2)
    put = machine.registers.target(ins, ins.operands[0], "b64")
    return lambda group: put(group, np.uint64(0))


@opcode("prefetch")
def prefetch(machine: Machine, ins: Instruction) -> Operation:
    """Without effect on values; also of a tensor map."""
    mods = Modifiers(ins)
    if mods.take("tensormap"):
        mods.take("param", "const")
    else:
        mods.take("global", "local")
        mods.need("L1", "L2", "L2::evict_last", "L2::evict_normal")
    mods.done()
    operand_count(ins, 1)
    memory_operand(ins, 0)
    return lambda group: None
