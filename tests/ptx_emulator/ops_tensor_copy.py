"""Tensor copies, their bulk groups, and tensor maps in memory.

"Tensor copy" and "Tensor-map" in the ISA: a box of a tensor of up to five dimensions moves between
global and shared memory; elements outside the tensor read as zero and are not written.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from . import bulk_reduce, tensor_map
from .addresses import Resolver
from .async_work import Job
from .decode import Modifiers, Operation, opcode, operand_count
from .instruction import Instruction, Memory
from .layouts import IllegalOperand
from .ops_async import constant
from .ops_bulk import EngineWrite, bulk_load, bulk_store, multicast, start_store
from .ptx_types import RAW
from .registers import Group, memory_operand
from .report import UnknownInstruction

if TYPE_CHECKING:
    from .machine import Machine

_decode = lru_cache(maxsize=256)(tensor_map.decode)


def bulk(machine: Machine, ins: Instruction, mods: Modifiers, reduce: bool) -> Operation:
    if mods.take("commit_group"):
        mods.done()
        return _each_lane(machine.async_work.commit_bulk)
    if mods.take("wait_group"):
        read_only = bool(mods.take("read"))
        mods.done()
        newest = constant(ins, 0)
        return _each_lane(lambda lane: machine.async_work.wait_bulk(lane, newest, read_only))
    if mods.take("prefetch"):
        return _prefetch(ins, mods)
    if not mods.take("tensor"):
        if reduce:
            raise UnknownInstruction(ins)
        return (bulk_store if mods.left[0] == "global" else bulk_load)(machine, ins, mods)
    rank = int(mods.need("1d", "2d", "3d", "4d", "5d")[0])
    mods.take("tile")
    if mods.left and mods.left[0] == "global":
        return _tensor_store(machine, ins, mods, rank, reduce)
    if reduce:
        raise UnknownInstruction(ins)
    return _tensor_load(machine, ins, mods, rank)


def _prefetch(ins: Instruction, mods: Modifiers) -> Operation:
    """cp.async.bulk.prefetch[.tensor.Nd].L2.global: no effect on values."""
    if mods.take("tensor"):
        mods.need("1d", "2d", "3d", "4d", "5d")
        mods.take("tile")
    mods.need("L2")
    mods.need("global")
    mods.take("L2::cache_hint")
    mods.done()
    memory_operand(ins, 0)
    return lambda group: None


def _each_lane(action) -> Operation:
    def run(group: Group) -> None:
        for lane in group.lanes.tolist():
            action(lane)

    return run


class TensorOperand:
    """`[map, {c0, c1, ...}]`: the decoded map and the coordinates, innermost first."""

    def __init__(self, machine: Machine, ins: Instruction, position: int, rank: int) -> None:
        operand = memory_operand(ins, position)
        if operand.coordinates is None or len(operand.coordinates.items) != rank:
            raise UnknownInstruction(ins, f"{rank} coordinates expected")
        self.machine = machine
        self.rank = rank
        self.where = Resolver(machine, ins, Memory(operand.base, operand.offset), "")
        self.coordinates = machine.registers.sources(ins, operand.coordinates, "s32")

    def each(self, group: Group):
        space, at = self.where(group)
        if space is self.machine.memory:
            for lane, offset in zip(group.lanes.tolist(), at.tolist(), strict=True):
                self.machine.tensor_map_proxy.check(lane, offset)
        maps = [self._read(space, offset) for offset in at.tolist()]
        return zip(maps, self.coordinates(group).tolist(), strict=True)

    def _read(self, space, offset: int) -> tensor_map.TensorMap:
        if offset % 64:
            self.machine.stop("misaligned", "tensor maps are aligned to 64 bytes", None)
        space.check(np.arange(offset, offset + 128, 8), 8, "load")
        decoded = self._decoded(space.data[offset : offset + 128].tobytes())
        if decoded.rank != self.rank:
            self.machine.stop(
                "tensor-map", f"map of rank {decoded.rank} in a {self.rank}d copy", None
            )
        return decoded

    def _decoded(self, raw: bytes) -> tensor_map.TensorMap:
        try:
            return _decode(raw)
        except IllegalOperand as error:
            self.machine.stop("tensor-map", str(error), None)
            raise


def _box(machine: Machine, decoded, coordinates, shared_at: int, store: bool):
    """The box with shared addresses inside its window, and where that window begins."""
    window = shared_at // machine.shared.stride * machine.shared.stride
    try:
        box = tensor_map.tile_box(decoded, coordinates, shared_at - window, store=store)
    except IllegalOperand as error:
        machine.stop("tensor-map", str(error), None)
        raise
    return box, box.shared_address + window


def _tensor_load(machine: Machine, ins: Instruction, mods: Modifiers, rank: int) -> Operation:
    target = mods.need("shared::cluster", "shared::cta")
    mods.need("global")
    mods.need("mbarrier::complete_tx::bytes")
    several = bool(mods.take("multicast::cluster"))
    hint = bool(mods.take("L2::cache_hint"))
    mods.take("cta_group::1")
    mods.done()
    operand_count(ins, 3 + several + hint)
    to = Resolver(machine, ins, memory_operand(ins, 0), target)
    tensor = TensorOperand(machine, ins, 1, rank)
    signal = Resolver(machine, ins, memory_operand(ins, 2), target)
    ranks = machine.registers.source(ins, ins.operands[3], "u16") if several else None

    def run(group: Group) -> None:
        ats, barriers = to(group)[1].tolist(), signal(group)[1].tolist()
        masks = np.broadcast_to(ranks(group) if ranks else 0, group.n).tolist()
        rows = zip(group.lanes.tolist(), tensor.each(group), ats, barriers, masks, strict=True)
        for lane, (decoded, coordinates), at, barrier, mask in rows:
            shifts = multicast(machine, at, mask) if several else [0]
            for i, shift in enumerate(shifts):
                to_one = at + shift, barrier + shift
                _start_load(machine, ins, lane, decoded, coordinates, *to_one, counted=i == 0)

    return run


def _start_load(
    machine: Machine, ins, lane: int, decoded, coordinates, at: int, barrier: int, counted: bool
) -> None:
    """Into one block. A multicast reads global memory once: `counted` for its first block."""
    box, shared_at = _box(machine, decoded, coordinates, at, store=False)
    size = box.element_bytes
    machine.shared.check(shared_at, size, "store")
    write = EngineWrite(machine, lane, at, decoded.box_bytes, barrier)

    def land() -> None:
        inside = box.in_bounds
        origin = box.global_address[inside] - machine.memory.base
        values = np.full(len(inside), tensor_map.fill_bits(decoded), RAW[size])
        values[inside] = machine.memory.load(origin, size, size)[:, 0]
        _read_globally(machine, lane, origin, size)
        machine.shared.store(shared_at, values[:, None])
        if machine.counters is not None and counted:
            machine.traffic.access("load", machine.memory, np.full(len(origin), lane), origin, size)
        write.complete()

    machine.async_work.submit(Job(ins, write.team, land))


def _read_globally(machine: Machine, lane: int, origin: np.ndarray, size: int) -> None:
    step = 1 << machine.races.shift
    cells = np.unique(origin // step) * step
    machine.races.load(np.full(len(cells), lane), cells, min(step, size), engine=True)


def _tensor_store(machine, ins: Instruction, mods: Modifiers, rank: int, reduce: bool) -> Operation:
    mods.need("global")
    mods.need("shared::cta")
    name = mods.need("add", "min", "max", "inc", "dec", "and", "or", "xor") if reduce else ""
    mods.take("tile")
    mods.need("bulk_group")
    hint = bool(mods.take("L2::cache_hint"))
    mods.done()
    operand_count(ins, 2 + hint)
    tensor = TensorOperand(machine, ins, 0, rank)
    source = Resolver(machine, ins, memory_operand(ins, 1), "shared::cta")

    def run(group: Group) -> None:
        rows = zip(group.lanes.tolist(), tensor.each(group), source(group)[1].tolist(), strict=True)
        for lane, (decoded, coordinates), at in rows:
            _start_store(machine, ins, lane, decoded, coordinates, at, name)

    return run


def _start_store(machine: Machine, ins, lane: int, decoded, coordinates, at: int, name: str):
    box, shared_at = _box(machine, decoded, coordinates, at, store=True)
    size, inside = box.element_bytes, box.in_bounds
    to = box.global_address[inside] - machine.memory.base
    machine.memory.check(to, size, "load" if name else "store")
    if machine.counters is not None:
        machine.traffic.access("store", machine.memory, np.full(len(to), lane), to, size)

    def read() -> np.ndarray:
        values = machine.shared.load(shared_at[inside], size, size)
        if name:
            old = machine.memory.load(to, size, size)
            return bulk_reduce.reduce(name, decoded.element_type, old, values)
        return values

    start_store(machine, ins, lane, to, size, at, decoded.box_bytes, read, machine.memory.store)


# ---- tensor maps in memory -----------------------------------------------------------------


@opcode("tensormap")
def tensormap(machine: Machine, ins: Instruction) -> Operation:
    mods = Modifiers(ins)
    if mods.take("cp_fenceproxy"):
        return _copy_map(machine, ins, mods)
    mods.need("replace")
    mods.need("tile")
    field = mods.left.pop(0)
    space = mods.need("global", "shared::cta")
    mods.need("b1024")
    kind = mods.need("b32", "b64")
    mods.done()
    operand_count(ins, 2, 3)
    where = Resolver(machine, ins, memory_operand(ins, 0), space)
    ordinal = constant(ins, 1) if len(ins.operands) == 3 else None
    value = machine.registers.source(ins, ins.operands[-1], kind)

    def run(group: Group) -> None:
        target, at = where(group)
        values = np.broadcast_to(value(group), group.n)
        for offset, number in zip(at.tolist(), values.tolist(), strict=True):
            target.check(np.arange(offset, offset + 128, 8), 8, "load")
            part = slice(offset, offset + 128)
            raw = tensor_map.replace_field(target.data[part].tobytes(), field, number, ordinal)
            target.data[part] = np.frombuffer(raw, np.uint8)
            if target is machine.memory:
                machine.tensor_map_proxy.edited(offset)

    return run


def _copy_map(machine: Machine, ins: Instruction, mods: Modifiers) -> Operation:
    """tensormap.cp_fenceproxy: copy the map to global memory and fence the tensormap proxy."""
    for name in ("global", "shared::cta", "tensormap::generic", "release"):
        mods.need(name)
    mods.need("cta", "cluster", "gpu", "sys")
    mods.need("sync")
    mods.need("aligned")
    mods.done()
    operand_count(ins, 3)
    to = Resolver(machine, ins, memory_operand(ins, 0), "global")
    source = Resolver(machine, ins, memory_operand(ins, 1), "shared::cta")

    def run(group: Group) -> None:
        ats, origins = to(group)[1], source(group)[1]
        pairs = np.unique(np.stack([ats, origins]), axis=1)
        for at, origin in pairs.T.tolist():
            steps = np.arange(0, 128, 8)
            machine.memory.store(at + steps, machine.shared.load(origin + steps, 8, 8))
            machine.tensor_map_proxy.edited(at)
        machine.progress += 1

    return run
