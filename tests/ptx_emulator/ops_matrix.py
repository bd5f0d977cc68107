"""Warp-level matrix instructions: mma.sync, ldmatrix, stmatrix, movmatrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import mma
from .addresses import Resolver
from .decode import Modifiers, Operation, opcode, operand_count
from .instruction import Instruction
from .registers import Group, memory_operand
from .report import UnknownInstruction

if TYPE_CHECKING:
    from .machine import Machine

_SHAPES = {
    "f16": ("m16n8k16", "m16n8k8"),
    "bf16": ("m16n8k16", "m16n8k8"),
    "tf32": ("m16n8k8", "m16n8k4"),
}


def whole_warps(machine: Machine, group: Group, size: int = 32) -> int:
    """The number of warps (warpgroups); all of their lanes must be there."""
    first = group.lanes[::size]
    if (
        group.n % size
        or (first % size).any()
        or (group.lanes[size - 1 :: size] - first != size - 1).any()
    ):
        machine.stop("divergence", f"not all {size} lanes execute this instruction", None)
    return group.n // size


@opcode("mma")
def matrix_multiply(machine: Machine, ins: Instruction) -> Operation:
    mods = Modifiers(ins)
    mods.need("sync")
    mods.need("aligned")
    shape = mods.need("m16n8k16", "m16n8k8", "m16n8k4")
    mods.need("row")
    mods.need("col")
    if len(mods.left) != 4:
        raise UnknownInstruction(ins, "types")
    d_type, a_type, b_type, c_type = mods.left
    if a_type != b_type or d_type != c_type or shape not in _SHAPES.get(a_type, ()):
        raise UnknownInstruction(ins, "types or shape")
    if d_type not in ("f32", "f16") or (d_type == "f16" and a_type != "f16"):
        raise UnknownInstruction(ins, f"accumulator {d_type}")
    operand_count(ins, 4)
    a, b, c = (machine.registers.sources(ins, op, "b32") for op in ins.operands[1:])
    put = machine.registers.targets(ins, ins.operands[0], "b32")
    m, n, k = 16, 8, int(shape[6:])

    def run(group: Group) -> None:
        warps = whole_warps(machine, group)
        parts = (get(group).reshape(warps, 32, -1) for get in (a, b, c))
        result = mma.mma_sync(shape, a_type, d_type, *parts)
        put(group, result.reshape(group.n, -1))
        if machine.counters is not None:
            machine.counters.tensor_flops += 2 * m * n * k * warps

    return run


class _MatrixForm:
    """{ld,st}matrix.sync.aligned.m8n8.num{.trans}{.shared}.b16."""

    def __init__(self, ins: Instruction) -> None:
        mods = Modifiers(ins)
        mods.need("sync")
        mods.need("aligned")
        mods.need("m8n8")
        self.count = int(mods.need("x1", "x2", "x4")[1])
        self.trans = bool(mods.take("trans"))
        self.space = mods.take("shared", "shared::cta")
        mods.need("b16")
        mods.done()
        operand_count(ins, 2)


def _rows(machine: Machine, resolve: Resolver, group: Group, count: int):
    """Offsets [warps, count, 8] of the rows, and the lanes that gave them."""
    warps = whole_warps(machine, group)
    space, at = resolve(group)
    if space is not machine.shared:
        machine.stop("out-of-bounds", "matrix rows lie in shared memory", None)
    giving = mma.matrix_row_lanes(count)
    return at.reshape(warps, 32)[:, giving], group.lanes.reshape(warps, 32)[:, giving]


@opcode("ldmatrix")
def load_matrix(machine: Machine, ins: Instruction) -> Operation:
    form = _MatrixForm(ins)
    put = machine.registers.targets(ins, ins.operands[0], "b32")
    resolve = Resolver(machine, ins, memory_operand(ins, 1), form.space)

    def run(group: Group) -> None:
        at, lanes = _rows(machine, resolve, group, form.count)
        values = machine.shared.load(at.ravel(), 16, 8)
        machine.shared_races.load(lanes.ravel(), at.ravel(), 16)
        rows = np.ascontiguousarray(values).view(np.uint8).reshape(*at.shape, 16)
        put(group, mma.ldmatrix(rows, form.trans).reshape(group.n, form.count))
        if machine.counters is not None:
            _count_rows(machine, at, lanes)

    return run


@opcode("stmatrix")
def store_matrix(machine: Machine, ins: Instruction) -> Operation:
    form = _MatrixForm(ins)
    resolve = Resolver(machine, ins, memory_operand(ins, 0), form.space)
    get = machine.registers.sources(ins, ins.operands[1], "b32")

    def run(group: Group) -> None:
        at, lanes = _rows(machine, resolve, group, form.count)
        values = get(group).reshape(len(at), 32, form.count)
        rows = np.ascontiguousarray(mma.stmatrix(values, form.trans)).reshape(-1, 16)
        from .ops_memory import write

        write(machine, lanes.ravel(), machine.shared, at.ravel(), rows.view(np.uint64), False)
        if machine.counters is not None:
            _count_rows(machine, at, lanes)

    return run


def _count_rows(machine: Machine, at: np.ndarray, lanes: np.ndarray) -> None:
    """Each matrix (8 rows of 16 bytes) is one access of its own."""
    for i in range(at.shape[1]):
        warp = lanes[:, i, 0] >> 5
        fake = np.repeat(warp * 32, 8)
        machine.traffic.rows(fake, at[:, i].ravel())


@opcode("movmatrix")
def transpose_matrix(machine: Machine, ins: Instruction) -> Operation:
    if ins.modifiers != ("sync", "aligned", "m8n8", "trans", "b16"):
        raise UnknownInstruction(ins)
    operand_count(ins, 2)
    get = machine.registers.source(ins, ins.operands[1], "b32")
    put = machine.registers.target(ins, ins.operands[0], "b32")

    def run(group: Group) -> None:
        warps = whole_warps(machine, group)
        put(group, mma.movmatrix(get(group).reshape(warps, 32)).reshape(-1))

    return run
