"""cp.async of single threads ("Data Movement ... Asynchronous copy")."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .addresses import Resolver
from .async_work import Job
from .decode import Modifiers, Operation, opcode, operand_count
from .instruction import Imm, Instruction
from .ops_memory import PREFETCH_SIZES
from .registers import Group, memory_operand
from .report import UnknownInstruction

if TYPE_CHECKING:
    from .machine import Machine


@opcode("cp")
def copy(machine: Machine, ins: Instruction) -> Operation:
    mods = Modifiers(ins)
    reduce = mods.take("reduce")
    mods.need("async")
    if mods.take("bulk"):
        from .ops_tensor_copy import bulk

        return bulk(machine, ins, mods, bool(reduce))
    if reduce:
        raise UnknownInstruction(ins)
    if mods.take("commit_group"):
        mods.done()
        return lambda group: machine.async_work.commit(group.lanes)
    if mods.take("mbarrier"):
        return _arrive_on(machine, ins, mods)
    if mods.take("wait_all"):
        mods.done()
        return lambda group: machine.async_work.wait(group.lanes, None)
    if mods.take("wait_group"):
        mods.done()
        newest = constant(ins, 0)
        return lambda group: machine.async_work.wait(group.lanes, newest)
    return _copy(machine, ins, mods)


def _arrive_on(machine: Machine, ins: Instruction, mods: Modifiers) -> Operation:
    """cp.async.mbarrier.arrive{.noinc}: arrive when the thread's earlier copies are complete.

    Without `.noinc` the pending count is raised now, so that the phase waits for the copies
    though no arrival is counted for them at init."""
    mods.need("arrive")
    raised = not mods.take("noinc")
    space = mods.take("shared", "shared::cta")
    mods.need("b64")
    mods.done()
    operand_count(ins, 1)
    resolve = Resolver(machine, ins, memory_operand(ins, 0), space)

    def run(group: Group) -> None:
        for lane, at in zip(group.lanes.tolist(), resolve(group)[1].tolist(), strict=True):
            barrier = machine.mbarriers.get(lane, at)
            barrier.pending += raised
            lanes, earlier = np.array([lane]), list(machine.async_work.copies)

            def land(lanes=lanes, at: int = at, earlier=earlier) -> None:
                machine.async_work.wait(lanes, None, earlier)
                machine.mbarriers.arrive(lanes, at, 1, 0, True)

            machine.async_work.submit(Job(ins, lane // machine.team_lanes, land))

    return run


def constant(ins: Instruction, position: int) -> int:
    operand = ins.operands[position]
    if not isinstance(operand, Imm):
        raise UnknownInstruction(ins, "expected a constant")
    return operand.value


def _copy(machine: Machine, ins: Instruction, mods: Modifiers) -> Operation:
    """cp.async.{ca,cg}.shared.global [dst], [src], size{, src-size}: the rest is zero-filled."""
    cache = mods.need("ca", "cg")
    target = mods.need("shared", "shared::cta")
    mods.need("global")
    policy = bool(mods.take("L2::cache_hint"))
    mods.take(*PREFETCH_SIZES)
    mods.done()
    operands = ins.operands[:-1] if policy else ins.operands
    if len(operands) not in (3, 4):
        raise UnknownInstruction(ins, f"{len(operands)} operands")
    size = constant(ins, 2)
    if size not in (4, 8, 16) or (cache == "cg" and size != 16):
        raise UnknownInstruction(ins, f"{size} bytes")
    to = Resolver(machine, ins, memory_operand(ins, 0), target)
    source = Resolver(machine, ins, memory_operand(ins, 1), "global")
    take = machine.registers.source(ins, operands[3], "u32") if len(operands) > 3 else None

    def run(group: Group) -> None:
        _, at = to(group)
        _, origin = source(group)
        machine.shared.check(at, size, "store")
        taken = np.full(group.n, size) if take is None else np.broadcast_to(take(group), group.n)
        data = np.zeros((group.n, size), np.uint8)
        for n in np.unique(taken).tolist():
            if n > size:
                machine.stop("cp.async", f"source size {n} exceeds {size}", taken == n)
            if n:
                _read(machine, group, origin, data, taken == n, n, size)
        machine.shared_races.store(group.lanes, at, size, None, pending=True)
        machine.async_work.copy(group.lanes, at, data)
        if machine.counters is not None:
            machine.traffic.access("store", machine.shared, group.lanes, at, size)

    return run


def _read(machine, group: Group, origin, data: np.ndarray, rows: np.ndarray, n: int, size: int):
    at = origin[rows]
    if (at % size).any():
        machine.stop("misaligned", f"cp.async source not aligned to {size} bytes", rows)
    unit = next(u for u in (8, 4, 2, 1) if n % u == 0)
    if n in (1, 2, 4, 8, 16):
        values = machine.memory.load(at, n, unit)
    else:
        values = np.concatenate(
            [machine.memory.load(at + i, unit, unit) for i in range(0, n, unit)], axis=1
        )
    data[rows, :n] = np.ascontiguousarray(values).view(np.uint8)
    machine.races.load(group.lanes[rows], at, n if n in (1, 2, 4, 8, 16) else unit)
    if machine.counters is not None:
        machine.traffic.access("load", machine.memory, group.lanes[rows], at, n)
