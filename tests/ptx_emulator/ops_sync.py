"""Barriers and fences ("Parallel Synchronization and Communication Instructions")."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .decode import Modifiers, Operation, gate, opcode, operand_count
from .global_races import strength
from .instruction import Imm, Instruction
from .registers import Group
from .report import UnknownInstruction
from .states import EXITED
from .tensor_map_proxy import acquire_map

if TYPE_CHECKING:
    from .machine import Machine

SEMANTICS = ("release", "relaxed", "acquire", "acq_rel", "sc")
SCOPES = ("cta", "cluster", "gpu", "sys", "gl")


# ---- bar, barrier --------------------------------------------------------------------------


class BarrierForm:
    """bar{.cta}.{sync,arrive,red}, barrier{.cta}...{.aligned}, barrier.cluster, bar.warp.sync."""

    def __init__(self, ins: Instruction) -> None:
        mods = Modifiers(ins)
        self.level = mods.take("warp", "cluster", "cta") or "cta"
        self.action = mods.need("sync", "arrive", "red", "wait")
        self.aligned = ins.opcode == "bar" or bool(mods.take("aligned"))
        self.semantics = mods.take(*SEMANTICS) if self.level == "cluster" else ""
        self.reduction = mods.take("popc", "and", "or") if self.action == "red" else ""
        self.kind = mods.need("u32", "pred") if self.action == "red" else ""
        mods.done()
        cluster_action = self.action in ("arrive", "wait")
        if (self.level == "cluster") != (self.action == "wait") and not (
            self.level == "cluster" and cluster_action
        ):
            raise UnknownInstruction(ins)


@gate("bar", "barrier")
def barrier_gate(machine: Machine, ins: Instruction) -> Operation:
    form = BarrierForm(ins)
    if form.level == "warp":
        return masked_gate(machine, ins, ins.operands[0])
    if form.level == "cluster":
        return _cluster_gate(machine, form)
    first = 1 if form.action == "red" else 0
    registers = machine.registers
    names = registers.source(ins, ins.operands[first], "u32")
    rest = ins.operands[first + 1 :]
    vote = None
    if form.action == "red":
        vote = registers.source(ins, rest[-1], "pred")
        rest = rest[:-1]
    counts = registers.source(ins, rest[0], "u32") if rest else None
    if form.action == "arrive" and counts is None:
        raise UnknownInstruction(ins, "arrive needs a thread count")

    def run(group: Group) -> None:
        if form.aligned:
            lanes = machine.barriers.converged(group)
            if not len(lanes):
                return
            group = Group(lanes, -1)
        n = np.broadcast_to(names(group).astype(np.int64), group.n)
        c = machine.block_lanes if counts is None else counts(group).astype(np.int64)
        if vote is not None:
            machine.barriers.votes[group.lanes] = vote(group)
        machine.barriers.arrive(
            group.lanes, n, np.broadcast_to(c, group.n), form.aligned, form.action != "arrive"
        )

    return run


def _cluster_gate(machine: Machine, form: BarrierForm) -> Operation:
    def run(group: Group) -> None:
        lanes = machine.barriers.converged(group) if form.aligned else group.lanes
        if not len(lanes):
            return
        if form.action == "arrive":
            machine.release(lanes)
        else:
            machine.cluster_barriers.wait(lanes, form.semantics != "relaxed")

    return run


@opcode("bar", "barrier")
def barrier(machine: Machine, ins: Instruction) -> Operation:
    form = BarrierForm(ins)
    if form.level == "warp":
        operand_count(ins, 1)
        return lambda group: _join_warps(machine, group)
    if form.level == "cluster":
        operand_count(ins, 0)
        if form.action == "arrive":
            release = form.semantics != "relaxed"
            return lambda group: machine.cluster_barriers.arrive(group.lanes, release)
        return lambda group: None
    if form.action != "red":
        operand_count(ins, 1, 2)
        return lambda group: None
    return _reduction(machine, ins, form)


def _reduction(machine: Machine, ins: Instruction, form: BarrierForm) -> Operation:
    put = machine.registers.target(ins, ins.operands[0], "u32" if form.kind == "u32" else "pred")
    if (form.reduction == "popc") != (form.kind == "u32"):
        raise UnknownInstruction(ins)

    def run(group: Group) -> None:
        votes = machine.barriers.results[group.lanes]
        if form.reduction == "popc":
            put(group, votes.astype(np.uint32))
        elif form.reduction == "or":
            put(group, votes > 0)
        else:
            put(group, votes == machine.barriers.voters[group.lanes])

    return run


def _join_warps(machine: Machine, group: Group) -> None:
    """`bar.warp.sync` orders memory among the participating lanes."""
    clocks = machine.clocks
    for warp in np.unique(group.lanes >> 5) if machine.thread_sync.used else ():
        lanes = group.lanes[group.lanes >> 5 == warp]
        machine.thread_sync.meet(lanes, machine.thread_sync.arrive(lanes, None))
    if group.n % 32 == 0 and (group.lanes.reshape(-1, 32)[:, 0] % 32 == 0).all():
        lanes = group.lanes.reshape(-1, 32)
        if (np.diff(lanes, axis=1) == 1).all():
            teams, members = machine.team_of(lanes)
            clocks.join_warps(teams[:, :1], members)
            if machine.races.known_by.any():
                for warp in lanes:
                    machine.races.joined(warp)
            return
    for warp in np.unique(group.lanes >> 5):
        lanes = group.lanes[group.lanes >> 5 == warp]
        clocks.join(int(lanes[0]) // machine.team_lanes, lanes % machine.team_lanes)
        machine.races.joined(lanes)


def masked_gate(machine: Machine, ins: Instruction, operand) -> Operation:
    """Wait until every lane named by the member mask is here ("must specify the same mask")."""
    get = machine.registers.source(ins, operand, "b32")
    whole = isinstance(operand, Imm) and operand.value in (-1, 0xFFFFFFFF)
    gather = machine.gather_warps

    def run(group: Group) -> None:
        if whole:
            gather(group)
            return
        masks = np.broadcast_to(get(group), group.n)
        order = machine.pc[group.lanes[0]]
        for warp in np.unique(group.lanes >> 5).tolist():
            mine = group.lanes >> 5 == warp
            mask = int(masks[mine][0])
            if (masks[mine] != mask).any():
                machine.find("divergence", "lanes of a warp name different member masks", mine)
            members = warp * 32 + np.nonzero([(mask >> i) & 1 for i in range(32)])[0]
            lanes = group.lanes[mine]
            if not np.isin(lanes, members).all():
                machine.find("divergence", "a lane is not in its own member mask", mine)
            live = members[machine.status[members] != EXITED]
            if (machine.pc[live] == order).all():
                machine.release(live)
            else:
                machine.block(lanes, "the other lanes of its warp")

    return run


# ---- fences --------------------------------------------------------------------------------


@opcode("fence", "membar")
def fence(machine: Machine, ins: Instruction) -> Operation:
    mods = Modifiers(ins)
    if mods.take("proxy"):
        return _proxy_fence(machine, ins, mods)
    if mods.take("mbarrier_init"):
        mods.need("release")
        mods.need("cluster")
        mods.done()
        return lambda group: machine.mbarriers.fence_init(group.lanes)
    mods.take("sc", "acq_rel", "acquire", "release")
    scope = strength(mods.need(*SCOPES))
    mods.done()
    return lambda group: machine.flags.fence(group.lanes, scope)


def _proxy_fence(machine: Machine, ins: Instruction, mods: Modifiers) -> Operation:
    kind = mods.need("async", "tensormap::generic", "alias", "async::generic")
    space = mods.take("global", "shared::cta", "shared::cluster", "shared::{cta,cluster}")
    spaces = {space.split("::")[0]} if space else {"global", "shared"}
    if kind == "tensormap::generic":
        action = mods.need("acquire", "release")
        mods.need(*SCOPES)
        mods.done()
        operand_count(ins, 2 if action == "acquire" else 0)
        return acquire_map(machine, ins) if action == "acquire" else lambda group: None
    mods.done()
    if kind != "async":
        raise UnknownInstruction(ins)
    return lambda group: machine.fence_proxy(group.lanes, spaces)


@opcode("nanosleep")
def nanosleep(machine: Machine, ins: Instruction) -> Operation:
    """Sleeping lets others run."""
    mods = Modifiers(ins)
    mods.need("u32")
    mods.done()
    operand_count(ins, 1)
    return lambda group: machine.yield_lanes(group.lanes)
