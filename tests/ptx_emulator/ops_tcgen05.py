"""tcgen05 ("TensorCore 5th Generation Family Instructions"): kinds f16 and tf32, one block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import tcgen05 as model
from .addresses import Resolver, address_source
from .async_work import Job
from .decode import Modifiers, Operation, gate, opcode, operand_count
from .instruction import Instruction, Memory
from .layouts import element_bytes
from .operand_tiles import OperandTile
from .ops_async import constant
from .ops_matrix import whole_warps
from .ops_memory import write
from .program import registers_in
from .registers import Group, memory_operand
from .report import UnknownInstruction
from .tensor_memory import legal

if TYPE_CHECKING:
    from .machine import Machine


@opcode("tcgen05")
def tcgen05(machine: Machine, ins: Instruction) -> Operation:
    mods = Modifiers(ins)
    action = mods.left.pop(0)
    builders = {
        "alloc": _alloc,
        "dealloc": _dealloc,
        "relinquish_alloc_permit": _relinquish,
        "mma": _mma,
        "commit": _commit,
        "ld": _load,
        "st": _store,
        "wait::ld": _wait,
        "wait::st": _wait,
        "fence::before_thread_sync": _fence,
        "fence::after_thread_sync": _fence,
    }
    if action not in builders:
        raise UnknownInstruction(ins)
    return builders[action](machine, ins, mods)


def _collective(mods: Modifiers) -> None:
    mods.need("sync")
    mods.need("aligned")


def _slots(machine: Machine, group: Group) -> list[tuple[int, int]]:
    """(slot, warp in its block) of every warp of the group."""
    whole_warps(machine, group)
    return [divmod(int(lane) // 32, machine.block_lanes // 32) for lane in group.lanes[::32]]


# ---- allocation ----------------------------------------------------------------------------


@gate("tcgen05")
def alloc_gate(machine: Machine, ins: Instruction) -> Operation:
    """The warp converges; if too few columns are free it waits for a dealloc."""
    count = constant(ins, 1)

    def run(group: Group) -> None:
        lanes = machine.barriers.converged(group)
        for warp in np.unique(lanes >> 5).tolist():
            mine = lanes[lanes >> 5 == warp]
            core = machine.tensor_memory.core(int(mine[0]) // machine.block_lanes)
            if legal(machine, core.can_allocate, count):
                machine.release(mine)
            else:
                machine.block(mine, f"{count} free tensor memory columns")

    return run


def _alloc(machine: Machine, ins: Instruction, mods: Modifiers) -> Operation:
    mods.need("cta_group::1")
    _collective(mods)
    space = mods.take("shared::cta", "shared")
    mods.need("b32")
    mods.done()
    operand_count(ins, 2)
    count = constant(ins, 1)
    resolve = Resolver(machine, ins, memory_operand(ins, 0), space)

    def run(group: Group) -> None:
        space, at = resolve(group)
        for row, (slot, _) in enumerate(_slots(machine, group)):
            column = legal(machine, machine.tensor_memory.core(slot).allocator.alloc, 0, count)
            first = slice(32 * row, 32 * row + 1)
            address = np.array([[model.tmem_address(0, column)]], np.uint32)
            write(machine, group.lanes[first], space, at[first], address, False)

    return run


def _dealloc(machine: Machine, ins: Instruction, mods: Modifiers) -> Operation:
    mods.need("cta_group::1")
    _collective(mods)
    mods.need("b32")
    mods.done()
    operand_count(ins, 2)
    address = machine.registers.source(ins, ins.operands[0], "b32")
    count = constant(ins, 1)

    def run(group: Group) -> None:
        values = np.broadcast_to(address(group), group.n)
        for row, (slot, _) in enumerate(_slots(machine, group)):
            core = machine.tensor_memory.core(slot)
            core.dealloc(int(group.lanes[32 * row]), int(values[32 * row]), count)
            machine.progress += 1

    return run


def _relinquish(machine: Machine, ins: Instruction, mods: Modifiers) -> Operation:
    mods.need("cta_group::1")
    _collective(mods)
    mods.done()

    def run(group: Group) -> None:
        for slot, _ in _slots(machine, group):
            machine.tensor_memory.core(slot).allocator.relinquish(0)

    return run


# ---- the tensor core -----------------------------------------------------------------------


class _MmaForm:
    """tcgen05.mma [d], a-desc | [a], b-desc, idesc, enable-input-d."""

    def __init__(self, machine: Machine, ins: Instruction, mods: Modifiers) -> None:
        mods.need("cta_group::1")
        self.kind = mods.need("kind::f16", "kind::tf32")[6:]
        mods.done()
        operand_count(ins, 5)
        registers = machine.registers
        a = ins.operands[1]
        self.d = address_source(machine, ins, memory_operand(ins, 0))
        self.a_in_tensor_memory = isinstance(a, Memory)
        self.a = (
            address_source(machine, ins, a)
            if self.a_in_tensor_memory
            else registers.source(ins, a, "b64")
        )
        self.b = registers.source(ins, ins.operands[2], "b64")
        self.shape = registers.source(ins, ins.operands[3], "b32")
        self.accumulate = registers.source(ins, ins.operands[4], "pred")

    def values(self, group: Group):
        """One row per lane: d, a, b, instruction descriptor, accumulate."""
        gets = (self.d, self.a, self.b, self.shape, self.accumulate)
        columns = [np.broadcast_to(get(group), group.n).tolist() for get in gets]
        return zip(group.lanes.tolist(), *columns, strict=True)


def _mma(machine: Machine, ins: Instruction, mods: Modifiers) -> Operation:
    form = _MmaForm(machine, ins, mods)

    def run(group: Group) -> None:
        for lane, d, a, b, shape, accumulate in form.values(group):
            idesc = legal(machine, model.decode_instruction_descriptor, shape, form.kind)
            _start(machine, ins, form, lane, d, a, b, idesc, accumulate)

    return run


def _start(machine, ins, form: _MmaForm, lane: int, d, a, b, idesc, accumulate) -> None:
    slot = lane // machine.block_lanes
    core = machine.tensor_memory.core(slot)
    column, tick = core.tick(lane)
    d_cells = legal(machine, model.accumulator_cells, idesc.m, idesc.n, idesc.d_type, d)
    tile_b = _tile(machine, slot, b, idesc.n, idesc.k, idesc.b_type, idesc.b_mn_major)
    tile_b.issue(lane, column, tick)
    a_cells = None
    if form.a_in_tensor_memory:
        a_cells = legal(machine, model.a_cells, idesc.m, idesc.k, idesc.a_type, a)

        def read_a() -> np.ndarray:
            return _halves(core.read(*a_cells[:2]), a_cells[2], idesc.a_type)
    else:
        tile_a = _tile(machine, slot, a, idesc.m, idesc.k, idesc.a_type, idesc.a_mn_major)
        tile_a.issue(lane, column, tick)
        read_a = tile_a.read

    def compute() -> None:
        old = core.read(*d_cells) if accumulate else None
        core.write(*d_cells, model.mma(idesc, read_a(), tile_b.read(), old))

    if machine.counters is not None:
        machine.counters.tensor_flops += 2 * idesc.m * idesc.n * idesc.k
    job = Job(ins, lane // machine.team_lanes, compute)
    accumulator = (d, idesc.m, idesc.n, idesc.d_type, form.kind)
    core.start(lane, accumulator, d_cells, None if a_cells is None else a_cells[:2], job)


def _halves(cells: np.ndarray, half: np.ndarray, kind: str) -> np.ndarray:
    if element_bytes(kind) == 4:
        return cells
    return (cells >> (np.uint32(16) * half.astype(np.uint32))).astype(np.uint16)


def _tile(machine, slot: int, value: int, rows: int, k: int, kind: str, mn_major: bool):
    descriptor = legal(machine, model.decode_smem_descriptor, value)
    legal(machine, model.check_majorness, kind, mn_major, descriptor.swizzle)
    return OperandTile(machine, slot, descriptor, rows, k, kind, mn_major)


def _commit(machine: Machine, ins: Instruction, mods: Modifiers) -> Operation:
    for name in ("cta_group::1", "mbarrier::arrive::one"):
        mods.need(name)
    space = mods.take("shared::cluster", "shared")
    mods.need("b64")
    mods.done()
    operand_count(ins, 1)
    resolve = Resolver(machine, ins, memory_operand(ins, 0), space)

    def run(group: Group) -> None:
        _, at = resolve(group)
        for lane, barrier in zip(group.lanes.tolist(), at.tolist(), strict=True):
            machine.mbarriers.get(lane, barrier)
            machine.tensor_memory.core(lane // machine.block_lanes).commit(ins, lane, barrier)

    return run


# ---- loads and stores ----------------------------------------------------------------------


class _AccessForm:
    """tcgen05.{ld,st}.sync.aligned.shape.num.b32, with the half offset of 16x32bx2."""

    def __init__(self, machine: Machine, ins: Instruction, mods: Modifiers, position: int) -> None:
        _collective(mods)
        self.shape = mods.need(*model.LOAD_SHAPES)
        self.number = int(mods.left.pop(0)[1:])
        mods.need("b32")
        mods.done()
        split = self.shape == "16x32bx2"
        operand_count(ins, 3 if split else 2)
        offset = constant(ins, position + 1) if split and position == 0 else 0
        if split and position == 1:
            offset = constant(ins, 2)
        self.lane, self.column = legal(machine, model.load_table, self.shape, self.number, offset)
        self.address = address_source(machine, ins, memory_operand(ins, position))

    def cells(self, machine: Machine, group: Group):
        """(row, core, warp, lanes [32, regs], columns [32, regs]) of each warp."""
        addresses = self.address(group)
        for row, (slot, warp) in enumerate(_slots(machine, group)):
            mine = addresses[32 * row : 32 * row + 32]
            if (mine != mine[0]).any():
                machine.stop("divergence", "tensor memory addresses differ within a warp", None)
            legal(machine, model.check_warp_access, warp, int(mine[0]), self.shape)
            lane, column = model.split_address(int(mine[0]))
            yield (
                row,
                machine.tensor_memory.core(slot),
                warp,
                self.lane + lane,
                self.column + column,
            )


def _load(machine: Machine, ins: Instruction, mods: Modifiers) -> Operation:
    form = _AccessForm(machine, ins, mods, 1)
    put = machine.registers.targets(ins, ins.operands[0], "b32")
    names = set(registers_in(ins.operands[0]))

    def run(group: Group) -> None:
        out = np.zeros((group.n, form.lane.shape[1]), np.uint32)
        for row, core, warp, lane, column in form.cells(machine, group):
            core.warp_access(warp, (lane, column), store=False)
            out[32 * row : 32 * row + 32] = core.read(lane, column)
            number = int(group.lanes[32 * row]) // 32
            machine.tensor_memory.loading.setdefault(number, set()).update(names)
        put(group, out)
        machine.flying = machine.flying | names

    return run


def _store(machine: Machine, ins: Instruction, mods: Modifiers) -> Operation:
    form = _AccessForm(machine, ins, mods, 0)
    get = machine.registers.sources(ins, ins.operands[-1], "b32")

    def run(group: Group) -> None:
        values = get(group)
        for row, core, warp, lane, column in form.cells(machine, group):
            core.warp_access(warp, (lane, column), store=True)
            core.write(lane, column, values[32 * row : 32 * row + 32])

    return run


def _wait(machine: Machine, ins: Instruction, mods: Modifiers) -> Operation:
    _collective(mods)
    mods.done()
    memory = machine.tensor_memory
    done = memory.wait_stores if ins.modifiers[0] == "wait::st" else memory.wait_loads
    return lambda group: done(np.unique(group.lanes // 32).tolist())


def _fence(machine: Machine, ins: Instruction, mods: Modifiers) -> Operation:
    mods.done()
    operand_count(ins, 0)
    sync = machine.thread_sync
    fence = sync.before if ins.modifiers[0] == "fence::before_thread_sync" else sync.after
    return lambda group: fence(group.lanes)
