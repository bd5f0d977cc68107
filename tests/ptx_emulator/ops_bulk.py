"""Bulk copies without tensor maps ("Data Movement ... cp.async.bulk"), and what tensor copies share
with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .addresses import Resolver
from .async_work import Job
from .decode import Modifiers, Operation, operand_count
from .instruction import Instruction
from .registers import Group, memory_operand

if TYPE_CHECKING:
    from .machine import Machine


class EngineWrite:
    """An asynchronous write to shared memory that will signal an mbarrier."""

    def __init__(self, machine: Machine, lane: int, at: int, size: int, barrier: int) -> None:
        self.machine, self.barrier, self.size = machine, barrier, size
        team, _ = machine.team_and_member(lane)
        self.team = team
        machine.mbarriers.get(lane, barrier)
        self.column = column = machine.mbarriers.column(barrier)
        self.tick = machine.clocks.tick_engine(team, column)
        shift = machine.shared_races.shift
        cells = np.arange(at >> shift, ((at + size - 1) >> shift) + 1)
        machine.shared_races.engine_store(lane, cells, column, self.tick, "asynchronous write")

    def complete(self) -> None:
        self.machine.mbarriers.complete(self.barrier, self.size, self.tick)


def bulk_load(machine: Machine, ins: Instruction, mods: Modifiers) -> Operation:
    """cp.async.bulk.shared.{global|shared::cta}...complete_tx{.multicast}{.hint}
    [dst], [src], size, [mbar]{, mask}{, policy}."""
    target = mods.need("shared::cluster", "shared::cta")
    origin = mods.need("global", "shared::cta") if target == "shared::cluster" else "global"
    if target == "shared::cta":
        mods.need("global")
    mods.need("mbarrier::complete_tx::bytes")
    several = origin == "global" and bool(mods.take("multicast::cluster"))
    hint = origin == "global" and bool(mods.take("L2::cache_hint"))
    mods.done()
    operand_count(ins, 4 + several + hint)
    to = Resolver(machine, ins, memory_operand(ins, 0), target)
    source = Resolver(machine, ins, memory_operand(ins, 1), origin)
    size = machine.registers.source(ins, ins.operands[2], "u32")
    signal = Resolver(machine, ins, memory_operand(ins, 3), target)
    ranks = machine.registers.source(ins, ins.operands[4], "u16") if several else None

    def run(group: Group) -> None:
        space, origins = source(group)
        masks = np.broadcast_to(ranks(group) if ranks else 0, group.n).tolist()
        sizes = np.broadcast_to(size(group), group.n).tolist()
        ats, barriers = to(group)[1].tolist(), signal(group)[1].tolist()
        rows = zip(group.lanes.tolist(), ats, origins.tolist(), sizes, barriers, masks, strict=True)
        for lane, at, start, n, barrier, mask in rows:
            for shift in multicast(machine, at, mask) if several else [0]:
                _start_load(machine, ins, lane, at + shift, space, start, n, barrier + shift)

    return run


def multicast(machine: Machine, at: int, mask: int) -> list[int]:
    """The way from `at` to the same offset in every block of the cluster whose bit is set."""
    size, stride = machine.layout.cluster_size, machine.shared.stride
    if mask >> size or not mask:
        machine.stop("multicast", f"mask {mask:#x} in a cluster of {size}", None)
    slot = at // stride
    first = slot // size * size
    ranks = [rank for rank in range(size) if mask >> rank & 1]
    machine.check_running(first + np.array(ranks))
    return [(first + rank - slot) * stride for rank in ranks]


def _chunks(start: int, size: int) -> np.ndarray:
    return np.arange(start, start + size, 16)


def check_bulk(machine: Machine, at: int, origin: int, size: int) -> None:
    if at % 16 or origin % 16 or size % 16:
        machine.stop("misaligned", "bulk copies move multiples of 16 aligned bytes", None)


def _start_load(
    machine: Machine, ins, lane: int, at: int, space, origin: int, size: int, barrier: int
):
    check_bulk(machine, at, origin, size)
    machine.shared.check(_chunks(at, size), 16, "store")
    write = EngineWrite(machine, lane, at, size, barrier)
    pieces = _chunks(origin, size)
    if space is machine.shared:
        shift = machine.shared_races.shift
        cells = np.arange(origin >> shift, ((origin + size - 1) >> shift) + 1)
        what = "asynchronous read"
        machine.shared_races.engine_load(lane, cells, write.column, write.tick, what)

    def land() -> None:
        values = space.load(pieces, 16, 8)
        if space is machine.memory:
            machine.races.load(np.full(len(pieces), lane), pieces, 16, engine=True)
        machine.shared.store(_chunks(at, size), values)
        write.complete()

    machine.async_work.submit(Job(ins, write.team, land))


def bulk_store(machine: Machine, ins: Instruction, mods: Modifiers) -> Operation:
    """cp.async.bulk.global.shared::cta.bulk_group{.hint} [dst], [src], size{, policy}."""
    mods.need("global")
    mods.need("shared::cta")
    mods.need("bulk_group")
    hint = bool(mods.take("L2::cache_hint"))
    mods.done()
    operand_count(ins, 3 + hint)
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
