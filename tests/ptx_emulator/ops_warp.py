"""Operations among the lanes of a warp: shfl, vote, redux, match, elect, activemask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .addresses import RANK_SHIFT
from .decode import Modifiers, Operation, gate, opcode, operand_count
from .instruction import Imm, Instruction, Pair
from .ops_sync import masked_gate
from .placement import SHARED_WINDOW
from .ptx_types import numpy_type
from .registers import Group
from .report import UnknownInstruction

if TYPE_CHECKING:
    from .machine import Machine

_MASK_OPERAND = {"shfl": 4, "vote": 2, "match": 2, "redux": 2, "elect": 1}
_LANE = np.arange(32)


@gate(*_MASK_OPERAND)
def warp_gate(machine: Machine, ins: Instruction) -> Operation:
    position = _MASK_OPERAND[ins.opcode]
    if len(ins.operands) <= position:
        raise UnknownInstruction(ins, "no member mask")
    return masked_gate(machine, ins, ins.operands[position])


class Warps:
    """A group's lanes spread over whole warps: arrays [warps, 32] and who is there."""

    def __init__(self, group: Group) -> None:
        self.whole = group.n % 32 == 0 and bool(
            (group.lanes[::32] % 32 == 0).all()
            and (group.lanes[31::32] - group.lanes[::32] == 31).all()
        )
        self.shape = (group.n // 32, 32)
        if not self.whole:
            warps, row = np.unique(group.lanes >> 5, return_inverse=True)
            self.row, self.column = row, group.lanes & 31
            self.shape = (len(warps), 32)
        self.present = np.ones(self.shape, bool)
        if not self.whole:
            self.present[:] = False
            self.present[self.row, self.column] = True

    def spread(self, values: np.ndarray) -> np.ndarray:
        values = np.asarray(values)
        if values.ndim == 0:
            return np.full(self.shape, values)
        if self.whole:
            return values.reshape(self.shape)
        out = np.zeros(self.shape, values.dtype)
        out[self.row, self.column] = values
        return out

    def collect(self, values: np.ndarray) -> np.ndarray:
        return values.reshape(-1) if self.whole else values[self.row, self.column]


@opcode("shfl")
def shuffle(machine: Machine, ins: Instruction) -> Operation:
    """shfl.sync.mode.b32 d[|p], a, b, c, mask.

    c holds the clamp value (bits 4:0) and the segment mask (bits 12:8).  A lane whose source is
    out of range keeps its own value and gets a false predicate."""
    mods = Modifiers(ins)
    mods.need("sync")
    mode = mods.need("up", "down", "bfly", "idx")
    mods.need("b32")
    mods.done()
    operand_count(ins, 5)
    registers = machine.registers
    target = ins.operands[0]
    pair = isinstance(target, Pair)
    put = registers.target(ins, target.first if pair else target, "b32")
    put_valid = registers.target(ins, target.second, "pred") if pair else None
    value = registers.source(ins, ins.operands[1], "b32")
    offset = registers.source(ins, ins.operands[2], "u32")
    clamp = registers.source(ins, ins.operands[3], "u32")

    def run(group: Group) -> None:
        warps = Warps(group)
        a = warps.spread(value(group))
        b = warps.spread(offset(group)).astype(np.int64) & 31
        c = warps.spread(clamp(group)).astype(np.int64)
        source, valid = _source_lane(mode, b, c & 31, (c >> 8) & 31)
        source = np.where(valid, source, _LANE)
        missing = ~np.take_along_axis(warps.present, source, axis=1)
        if (missing & warps.present).any():
            machine.find("divergence", "shfl reads a lane that does not take part", None)
        put(group, warps.collect(np.take_along_axis(a, source, axis=1)))
        if put_valid is not None:
            put_valid(group, warps.collect(np.broadcast_to(valid, warps.shape)))

    return run


def _source_lane(mode: str, b: np.ndarray, clamp: np.ndarray, segment: np.ndarray):
    low = _LANE & segment
    high = low | (clamp & ~segment)
    if mode == "up":
        source = _LANE - b
        return source, source >= high
    if mode == "down":
        source = _LANE + b
    elif mode == "bfly":
        source = _LANE ^ b
    else:
        source = low | (b & ~segment)
    return source, source <= high


@opcode("vote")
def vote(machine: Machine, ins: Instruction) -> Operation:
    mods = Modifiers(ins)
    mods.need("sync")
    mode = mods.need("all", "any", "uni", "ballot")
    kind = mods.need("b32") if mode == "ballot" else mods.need("pred")
    mods.done()
    operand_count(ins, 3)
    put = machine.registers.target(ins, ins.operands[0], kind)
    get = machine.registers.source(ins, ins.operands[1], "pred")

    def run(group: Group) -> None:
        warps = Warps(group)
        votes = warps.spread(get(group)) & warps.present
        yes = votes.any(axis=1, keepdims=True)
        every = (votes | ~warps.present).all(axis=1, keepdims=True)
        if mode == "ballot":
            bits = (votes.astype(np.uint64) << _LANE.astype(np.uint64)).sum(axis=1, keepdims=True)
            result = bits.astype(np.uint32)
        else:
            result = {"all": every, "any": yes, "uni": every | ~yes}[mode]
        put(group, warps.collect(np.broadcast_to(result, warps.shape)))

    return run


@opcode("redux")
def reduce_across(machine: Machine, ins: Instruction) -> Operation:
    """redux.sync.op.type: integers, and min/max of f32 ({.abs}{.NaN}) on sm_100a."""
    mods = Modifiers(ins)
    mods.need("sync")
    name = mods.need("add", "min", "max", "and", "or", "xor")
    kind = mods.last()
    absolute, nan = mods.take("abs"), mods.take("NaN")
    mods.done()
    operand_count(ins, 3)
    logical = name in ("and", "or", "xor")
    allowed = ("b32",) if logical else ("u32", "s32", "f32")
    if (
        kind not in allowed
        or (kind == "f32" and name == "add")
        or (kind != "f32" and (absolute or nan))
    ):
        raise UnknownInstruction(ins)
    ufunc = {"add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    if kind == "f32":
        ufunc |= {"min": np.minimum if nan else np.fmin, "max": np.maximum if nan else np.fmax}
    else:
        ufunc |= {"min": np.minimum, "max": np.maximum}
    put = machine.registers.target(ins, ins.operands[0], kind)
    get = machine.registers.source(ins, ins.operands[1], kind)

    def run(group: Group) -> None:
        warps = Warps(group)
        values = warps.spread(get(group))
        values = np.abs(values) if absolute else values
        out = np.zeros(warps.shape, values.dtype)
        for row in range(len(out)):
            mine = values[row, warps.present[row]]
            out[row] = ufunc[name].reduce(mine, dtype=values.dtype)
        put(group, warps.collect(out))

    return run


@opcode("match")
def match(machine: Machine, ins: Instruction) -> Operation:
    """match.any.sync: the mask of lanes that hold the same value."""
    mods = Modifiers(ins)
    mods.need("any")
    mods.need("sync")
    kind = mods.need("b32", "b64")
    mods.done()
    operand_count(ins, 3)
    put = machine.registers.target(ins, ins.operands[0], "b32")
    get = machine.registers.source(ins, ins.operands[1], kind)

    def run(group: Group) -> None:
        warps = Warps(group)
        values = warps.spread(get(group))
        equal = (values[:, :, None] == values[:, None, :]) & warps.present[:, None, :]
        bits = (equal.astype(np.uint64) << _LANE.astype(np.uint64)).sum(axis=2)
        put(group, warps.collect(bits.astype(np.uint32)))

    return run


@opcode("elect")
def elect(machine: Machine, ins: Instruction) -> Operation:
    """elect.sync d|p, mask: one leader of the member mask; here always the lowest lane."""
    if ins.modifiers != ("sync",) or not isinstance(ins.operands[0], Pair):
        raise UnknownInstruction(ins)
    operand_count(ins, 2)
    leader = machine.registers.target(ins, ins.operands[0].first, "b32")
    chosen = machine.registers.target(ins, ins.operands[0].second, "pred")

    def run(group: Group) -> None:
        warps = Warps(group)
        first = warps.present.argmax(axis=1)[:, None]
        leader(group, warps.collect(np.broadcast_to(first, warps.shape)).astype(np.uint32))
        chosen(group, warps.collect(first == _LANE))

    return run


@opcode("activemask")
def activemask(machine: Machine, ins: Instruction) -> Operation:
    if ins.modifiers != ("b32",) or len(ins.operands) != 1 or isinstance(ins.operands[0], Imm):
        raise UnknownInstruction(ins)
    put = machine.registers.target(ins, ins.operands[0], "b32")

    def run(group: Group) -> None:
        warps = Warps(group)
        bits = (warps.present.astype(np.uint64) << _LANE.astype(np.uint64)).sum(axis=1)
        put(group, warps.collect(np.broadcast_to(bits[:, None], warps.shape)).astype(np.uint32))

    return run


@opcode("mapa")
def map_address(machine: Machine, ins: Instruction) -> Operation:
    """The address of the same variable in another block of the cluster."""
    mods = Modifiers(ins)
    shared = mods.take("shared::cluster")
    kind = mods.need("u32", "u64")
    mods.done()
    operand_count(ins, 3)
    get = machine.registers.source(ins, ins.operands[1], kind)
    rank = machine.registers.source(ins, ins.operands[2], "u32")
    put = machine.registers.target(ins, ins.operands[0], kind)
    window = 0 if shared else SHARED_WINDOW

    def run(group: Group) -> None:
        ranks = np.broadcast_to(rank(group), group.n).astype(np.int64)
        if (ranks >= machine.layout.cluster_size).any():
            machine.stop("out-of-bounds", f"mapa of rank {int(ranks.max())}", None)
        inside = (get(group).astype(np.int64) - window) & ((1 << RANK_SHIFT) - 1)
        put(group, (window + ((ranks + 1) << RANK_SHIFT) + inside).astype(numpy_type(kind)))

    return run
