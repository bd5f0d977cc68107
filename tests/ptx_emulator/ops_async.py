"""cp.async and bulk copies without tensor maps ("Data Movement ... Asynchronous copy")."""

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


class EngineWrite:
    """An asynchronous write to shared memory that will signal an mbarrier."""

    def __init__(self, machine: Machine, lane: int, at: int, size: int, barrier: int) -> None:
        self.machine, self.barrier, self.size = machine, barrier, size
        team, _ = machine.team_and_member(lane)
        self.team = team
        machine.mbarriers.get(lane, barrier)
        column = machine.mbarriers.column(barrier)
        self.tick = machine.clocks.tick_engine(team, column)
        shift = machine.shared_races.shift
        cells = np.arange(at >> shift, ((at + size - 1) >> shift) + 1)
        machine.shared_races.engine_store(lane, cells, column, self.tick, "asynchronous write")

    def complete(self) -> None:
        self.machine.mbarriers.complete(self.barrier, self.size, self.tick)


def bulk_load(machine: Machine, ins: Instruction, mods: Modifiers) -> Operation:
    """cp.async.bulk.shared.global...complete_tx [dst], [src], size, [mbar]."""
    target = mods.need("shared::cluster", "shared::cta")
    mods.need("global")
    mods.need("mbarrier::complete_tx::bytes")
    mods.done()
    operand_count(ins, 4)
    to = Resolver(machine, ins, memory_operand(ins, 0), target)
    source = Resolver(machine, ins, memory_operand(ins, 1), "global")
    size = machine.registers.source(ins, ins.operands[2], "u32")
    signal = Resolver(machine, ins, memory_operand(ins, 3), target)

    def run(group: Group) -> None:
        sizes = np.broadcast_to(size(group), group.n)
        rows = zip(
            group.lanes.tolist(),
            to(group)[1].tolist(),
            source(group)[1].tolist(),
            sizes.tolist(),
            signal(group)[1].tolist(),
            strict=True,
        )
        for lane, at, origin, n, barrier in rows:
            _start_load(machine, ins, lane, at, origin, n, barrier)

    return run


def _chunks(start: int, size: int) -> np.ndarray:
    return np.arange(start, start + size, 16)


def check_bulk(machine: Machine, at: int, origin: int, size: int) -> None:
    if at % 16 or origin % 16 or size % 16:
        machine.stop("misaligned", "bulk copies move multiples of 16 aligned bytes", None)


def _start_load(machine: Machine, ins, lane: int, at: int, origin: int, size: int, barrier: int):
    check_bulk(machine, at, origin, size)
    machine.shared.check(_chunks(at, size), 16, "store")
    write = EngineWrite(machine, lane, at, size, barrier)

    def land() -> None:
        pieces = _chunks(origin, size)
        values = machine.memory.load(pieces, 16, 8)
        machine.races.load(np.full(len(pieces), lane), pieces, 16, engine=True)
        machine.shared.store(_chunks(at, size), values)
        write.complete()

    machine.async_work.submit(Job(ins, write.team, land))


def bulk_store(machine: Machine, ins: Instruction, mods: Modifiers) -> Operation:
    """cp.async.bulk.global.shared::cta.bulk_group [dst], [src], size."""
    mods.need("global")
    mods.need("shared::cta")
    mods.need("bulk_group")
    mods.done()
    operand_count(ins, 3)
    to = Resolver(machine, ins, memory_operand(ins, 0), "global")
    source = Resolver(machine, ins, memory_operand(ins, 1), "shared::cta")
    size = machine.registers.source(ins, ins.operands[2], "u32")

    def run(group: Group) -> None:
        sizes = np.broadcast_to(size(group), group.n)
        rows = zip(
            group.lanes.tolist(),
            to(group)[1].tolist(),
            source(group)[1].tolist(),
            sizes.tolist(),
            strict=True,
        )
        for lane, at, origin, n in rows:
            check_bulk(machine, at, origin, n)
            pieces = _chunks(at, n)
            start_store(
                machine,
                ins,
                lane,
                pieces,
                16,
                origin,
                n,
                lambda origin=origin, n=n: machine.shared.load(_chunks(origin, n), 16, 8),
                machine.memory.store,
            )

    return run


def start_store(
    machine: Machine,
    ins,
    lane: int,
    pieces: np.ndarray,
    unit: int,
    origin: int,
    size: int,
    read,
    write,
) -> None:
    """A bulk store of shared bytes [origin, origin + size) to global `pieces` of `unit` bytes."""
    team, member = machine.team_and_member(lane)
    races, clocks = machine.shared_races, machine.clocks
    column = machine.mbarriers.column(-1 - member)
    tick = clocks.tick_engine(team, column)
    cells = np.arange(origin >> races.shift, ((origin + size - 1) >> races.shift) + 1)
    races.engine_load(lane, cells, column, tick, "asynchronous read")
    lanes = np.full(len(pieces), lane)
    machine.races.store(lanes, pieces, unit, None, engine=True)
    global_cells = np.unique(machine.races.granules(pieces, unit))
    job = Job(ins, team, lambda: write(pieces, read()))

    def source_free() -> None:
        known = np.zeros(clocks.known.shape[2], np.int32)
        known[column] = tick
        clocks.acquire(team, np.array([member]), known)

    def written() -> None:
        machine.races.landed(lane, global_cells)

    machine.async_work.store(lane, job, source_free, written)
