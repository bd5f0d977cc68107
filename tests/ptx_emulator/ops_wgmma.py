"""wgmma: asynchronous matrix multiply of a warpgroup ("Asynchronous Warpgroup Level Matrix ...").

The four warps act as one.  An operation may read shared memory and write its accumulators at any
time between issue and the wait that covers its group; any warp's wait counts for all four.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from . import wgmma as model
from .async_work import Job
from .decode import Modifiers, Operation, opcode, operand_count
from .instruction import Instruction, Vector
from .layouts import IllegalOperand
from .operand_tiles import OperandTile
from .ops_async import constant
from .ops_matrix import whole_warps
from .program import registers_in
from .registers import Group
from .report import UnknownInstruction
from .warpgroups import Outstanding, Warpgroup, held_registers

if TYPE_CHECKING:
    from .machine import Machine

_TYPES = ("f16", "bf16", "tf32")


@opcode("wgmma")
def warpgroup_matrix(machine: Machine, ins: Instruction) -> Operation:
    mods = Modifiers(ins)
    action = mods.need("fence", "commit_group", "wait_group", "mma_async")
    mods.need("sync")
    mods.need("aligned")
    if action == "mma_async":
        return _multiply(machine, ins, mods)
    mods.done()
    newest = constant(ins, 0) if action == "wait_group" else 0

    def run(group: Group) -> None:
        whole_warps(machine, group, 128)
        for number in (group.lanes[::128] // 128).tolist():
            queue = machine.warpgroups.of(number)
            if action == "fence":
                queue.fenced = True
                queue.touched.clear()
            elif action == "commit_group":
                queue.committed += 1
            else:
                machine.warpgroups.wait(number, newest)

    return run


class _Form:
    """Types, shape and operands of one wgmma.mma_async."""

    def __init__(self, machine: Machine, ins: Instruction, mods: Modifiers) -> None:
        shape = re.fullmatch(r"m64n(\d+)k(\d+)", mods.left.pop(0))
        if shape is None or len(mods.left) != 3:
            raise UnknownInstruction(ins, "shape or types")
        self.d_type, self.type, b_type = mods.left
        self.n, self.k = int(shape[1]), int(shape[2])
        if self.type != b_type or self.type not in _TYPES or self.k != model.k_of(self.type):
            raise UnknownInstruction(ins, "types")
        registers = machine.registers
        d, a, b, scale_d, *flags = ins.operands
        self.registers = held_registers(ins)
        self.accumulators = frozenset(registers_in(d))
        self.in_registers = isinstance(a, Vector)
        self.fragments = set(registers_in(a)) if self.in_registers else set()
        self.get = registers.sources(ins, d, "b32")
        self.get_unchecked = self._unchecked(machine, ins, d)
        self.put = registers.targets(ins, d, "b32")
        self.a = (
            registers.sources(ins, a, "b32")
            if self.in_registers
            else registers.source(ins, a, "b64")
        )
        self.b = registers.source(ins, b, "b64")
        self.scale_d = registers.source(ins, scale_d, "pred")
        values = [constant(ins, len(ins.operands) - len(flags) + i) for i in range(len(flags))]
        self.scale_a, self.scale_b = values[:2]
        trans = (
            values[2:] + [0] * (2 - len(values[2:]))
            if not self.in_registers
            else [0, *(values[2:] or [0])]
        )
        self.trans_a, self.trans_b = bool(trans[0]), bool(trans[1])
        operand_count(ins, 6 if self.type == "tf32" else 7 if self.in_registers else 8)
        try:
            model.check_operands(self.d_type, self.type, self.trans_a, self.trans_b)
            model.accumulator_table(self.n, self.d_type)
        except IllegalOperand as error:
            raise UnknownInstruction(ins, str(error)) from error

    @staticmethod
    def _unchecked(machine: Machine, ins: Instruction, d: Vector):
        """Accumulators before their first use (scale-d false) may hold anything."""
        gets = [machine.registers.source(ins, item, "b32", checked=False) for item in d.items]
        return lambda group: np.stack([get(group) for get in gets], axis=1)


def _multiply(machine: Machine, ins: Instruction, mods: Modifiers) -> Operation:
    form = _Form(machine, ins, mods)

    def run(group: Group) -> None:
        count = whole_warps(machine, group, 128)
        if machine.schedule.landing == "early":
            _start(machine, ins, form, group, count, True)
            return
        for lanes in group.lanes.reshape(count, 128):
            _start(machine, ins, form, Group(lanes, machine.lane_count), 1, False)

    return run


def _start(machine: Machine, ins, form: _Form, group: Group, count: int, early: bool) -> None:
    """Issue for `count` warpgroups; one job serves all of them."""
    leaders = group.lanes[::128]
    tiles_b = _tiles(machine, form, group, form.b, form.n, form.trans_b, count)
    if form.in_registers:
        a_bits = model.read_a_fragment(form.a(group).reshape(count, 128, 4), form.type)
        tiles_a = []
    else:
        tiles_a = _tiles(machine, form, group, form.a, 64, form.trans_a, count)
    scale_d = _uniform(machine, form.scale_d(group), group, count)
    job = Job(ins, int(leaders[0]) // machine.team_lanes, lambda: None)

    def compute() -> None:
        a = a_bits if form.in_registers else np.stack([tile.read() for tile in tiles_a])
        b = np.stack([tile.read() for tile in tiles_b])
        if scale_d.all():
            old = form.get(group).reshape(count, 128, -1)
        else:
            old = form.get_unchecked(group).reshape(count, 128, -1) * scale_d[:, None, None]
        result = model.wgmma(
            form.d_type, form.type, a, b, old.astype(np.uint32), True, form.scale_a, form.scale_b
        )
        form.put(group, result.reshape(group.n, -1))

    job.run = compute
    for row, leader in enumerate(leaders.tolist()):
        queue = machine.warpgroups.of(leader // 128)
        _check_order(machine, form, queue)
        team = leader // machine.team_lanes
        tick = machine.clocks.tick_engine(team, queue.column)
        for tile in [*tiles_a[row : row + 1], tiles_b[row]]:
            tile.issue(leader, queue.column, tick)
        if queue.jobs and not early:
            job.after = queue.jobs[-1].job
        held = form.registers, form.accumulators
        queue.jobs.append(Outstanding(queue.committed, job, tick, *held))
    machine.flying = machine.flying | form.registers
    if machine.counters is not None:
        machine.counters.tensor_flops += 2 * 64 * form.n * form.k * count
    if early or machine.picker.lands_now():
        machine.async_work.finish(job)


def _check_order(machine: Machine, form: _Form, queue: Warpgroup) -> None:
    """`wgmma.fence` stands between other accesses to a register and a wgmma that uses it; only
    accumulators follow each other without."""
    stale = form.registers & queue.touched
    if not queue.fenced:
        machine.find("missing-fence", "wgmma without any wgmma.fence before it", None)
    elif stale:
        message = f"register {min(stale)} was used since the last wgmma.fence"
        machine.find("missing-fence", message, None)
    if any(form.fragments & entry.accumulators for entry in queue.jobs):
        machine.find("in-flight", "A is the result of a wgmma nobody waited for", None)


def _tiles(machine, form: _Form, group: Group, get, rows: int, mn_major: bool, count: int):
    values = np.broadcast_to(get(group), group.n).reshape(count, 128)
    if (values != values[:, :1]).any():
        machine.stop("divergence", "matrix descriptors differ within a warpgroup", None)
    tiles = []
    for value, lane in zip(values[:, 0].tolist(), group.lanes[::128].tolist(), strict=True):
        try:
            descriptor = model.decode_descriptor(value)
        except IllegalOperand as error:
            machine.stop("descriptor", str(error), None)
            raise
        slot = lane // machine.block_lanes
        tiles.append(OperandTile(machine, slot, descriptor, rows, form.k, form.type, mn_major))
    return tiles


def _uniform(machine: Machine, values: np.ndarray, group: Group, count: int) -> np.ndarray:
    values = np.broadcast_to(values, group.n).reshape(count, 128)
    if (values != values[:, :1]).any():
        machine.stop("divergence", "scale-d differs within a warpgroup", None)
    return values[:, 0].copy()  # not a view: the register may change before the operation runs
