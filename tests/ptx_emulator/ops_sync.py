"""Barriers, fences and mbarriers ("Parallel Synchronization and Communication Instructions")."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .addresses import Resolver
from .decode import Modifiers, Operation, gate, opcode, operand_count
from .registers import Group, memory_operand
from .report import UnknownInstruction
from .syntax import Imm, Instruction

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
        self.kind = mods.take("u32", "pred") if self.action == "red" else ""
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
            put(group, votes == machine.layout.threads)

    return run


def _join_warps(machine: Machine, group: Group) -> None:
    """`bar.warp.sync` orders memory among the participating lanes."""
    clocks = machine.clocks
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
            live = members[machine.status[members] != 2]
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
    mods.need(*SCOPES)
    mods.done()
    return lambda group: machine.races.fence(group.lanes)


def _proxy_fence(machine: Machine, ins: Instruction, mods: Modifiers) -> Operation:
    kind = mods.need("async", "tensormap::generic", "alias", "async::generic")
    mods.take("global", "shared::cta", "shared::cluster", "shared::{cta,cluster}")
    if kind == "tensormap::generic":
        action = mods.need("acquire", "release")
        mods.need(*SCOPES)
        mods.done()
        operand_count(ins, 2 if action == "acquire" else 0)
        return lambda group: None
    mods.done()
    if kind != "async":
        raise UnknownInstruction(ins)
    return lambda group: machine.fence_proxy(group.lanes)


@opcode("griddepcontrol", "nanosleep")
def no_effect(machine: Machine, ins: Instruction) -> Operation:
    """Dependent launches are satisfied here; sleeping lets others run."""
    if ins.opcode == "griddepcontrol":
        Modifiers(ins).need("wait", "launch_dependents")
        return lambda group: None
    return lambda group: machine.yield_lanes(group.lanes)


# ---- mbarrier ------------------------------------------------------------------------------


@opcode("mbarrier")
def mbarrier(machine: Machine, ins: Instruction) -> Operation:
    builders = {
        "init": _mbarrier_init, "inval": _mbarrier_inval, "arrive": _mbarrier_arrive,
        "arrive_drop": _mbarrier_unknown, "expect_tx": _mbarrier_expect,
        "test_wait": _mbarrier_wait, "try_wait": _mbarrier_wait,
    }
    return builders.get(ins.modifiers[0], _mbarrier_unknown)(machine, ins)


def _mbarrier_unknown(machine: Machine, ins: Instruction) -> Operation:
    raise UnknownInstruction(ins)


def _objects(machine: Machine, resolve: Resolver, group: Group) -> np.ndarray:
    """Offsets of the mbarrier objects, 8-byte aligned and inside shared memory."""
    space, at = resolve(group)
    if space is not machine.shared:
        machine.stop("mbarrier", "an mbarrier lives in shared memory", None)
    machine.shared.check(at, 8, "store")
    return at


def _mbarrier_init(machine: Machine, ins: Instruction) -> Operation:
    mods = Modifiers(ins)
    mods.need("init")
    mods.need("b64")
    space = mods.take("shared", "shared::cta")
    mods.done()
    operand_count(ins, 2)
    resolve = Resolver(machine, ins, memory_operand(ins, 0), space)
    count = machine.registers.source(ins, ins.operands[1], "u32")

    def run(group: Group) -> None:
        at = _objects(machine, resolve, group)
        machine.shared.mark_initialised(at, 8)
        counts = np.broadcast_to(count(group), group.n)
        for lane, where, n in zip(
            group.lanes.tolist(), at.tolist(), counts.tolist(), strict=True
        ):
            machine.mbarriers.init(lane, where, n)

    return run


def _mbarrier_inval(machine: Machine, ins: Instruction) -> Operation:
    mods = Modifiers(ins)
    mods.need("inval")
    mods.need("b64")
    space = mods.take("shared", "shared::cta")
    mods.done()
    operand_count(ins, 1)
    resolve = Resolver(machine, ins, memory_operand(ins, 0), space)

    def run(group: Group) -> None:
        at = _objects(machine, resolve, group)
        for lane, where in zip(group.lanes.tolist(), at.tolist(), strict=True):
            machine.mbarriers.invalidate(lane, where)

    return run


def _mbarrier_arrive(machine: Machine, ins: Instruction) -> Operation:
    """arrive{.expect_tx}{.release|.relaxed}{.scope}{.space}.b64 {state|_,} [addr]{, count|tx}."""
    mods = Modifiers(ins)
    mods.need("arrive")
    mods.need("b64")
    expects = bool(mods.take("expect_tx"))
    release = mods.take("release", "relaxed") != "relaxed"
    mods.take("cta", "cluster")
    space = mods.take("shared::cta", "shared::cluster", "shared")
    mods.done()
    has_state = len(ins.operands) > 1 and ins.operands[0].__class__.__name__ != "Memory"
    state = ins.operands[0] if has_state else None
    rest = ins.operands[1:] if has_state else ins.operands
    resolve = Resolver(machine, ins, memory_operand(ins, 1 if has_state else 0), space)
    number = machine.registers.source(ins, rest[1], "u32") if len(rest) > 1 else None
    if expects and number is None:
        raise UnknownInstruction(ins, "expect_tx needs a byte count")
    put = machine.registers.target(ins, state, "b64") if state is not None else None

    def run(group: Group) -> None:
        at = _objects(machine, resolve, group)
        values = np.broadcast_to(1 if number is None else number(group), group.n).astype(np.int64)
        phases = np.zeros(group.n, np.uint64)
        keys = np.stack([at, values])
        for where, value in np.unique(keys, axis=1).T.tolist():
            chosen = (at == where) & (values == value)
            for lanes in _by_team(machine, group.lanes[chosen]):
                phase = machine.mbarriers.arrive(
                    lanes, where, 1 if expects else value, value if expects else 0, release
                )
                phases[np.isin(group.lanes, lanes)] = phase
        if put is not None:
            put(group, phases)

    return run


def _by_team(machine: Machine, lanes: np.ndarray):
    teams = lanes // machine.team_lanes
    return [lanes[teams == team] for team in np.unique(teams)]


def _mbarrier_expect(machine: Machine, ins: Instruction) -> Operation:
    mods = Modifiers(ins)
    mods.need("expect_tx")
    mods.need("b64")
    mods.take("relaxed")
    mods.take("cta", "cluster")
    space = mods.take("shared::cta", "shared::cluster", "shared")
    mods.done()
    operand_count(ins, 2)
    resolve = Resolver(machine, ins, memory_operand(ins, 0), space)
    size = machine.registers.source(ins, ins.operands[1], "u32")

    def run(group: Group) -> None:
        at = _objects(machine, resolve, group)
        sizes = np.broadcast_to(size(group), group.n)
        for lane, where, n in zip(group.lanes.tolist(), at.tolist(), sizes.tolist(), strict=True):
            machine.mbarriers.expect(lane, where, n)

    return run


class _WaitForm:
    """{test,try}_wait{.parity}{.acquire|.relaxed}{.scope}{.space}.b64 p, [addr], phase{, time}."""

    def __init__(self, machine: Machine, ins: Instruction) -> None:
        mods = Modifiers(ins)
        self.suspends = mods.need("test_wait", "try_wait") == "try_wait"
        mods.need("b64")
        self.by_parity = bool(mods.take("parity"))
        self.acquire = mods.take("acquire", "relaxed") != "relaxed"
        mods.take("cta", "cluster")
        space = mods.take("shared::cta", "shared")
        mods.done()
        operand_count(ins, 3, 4)
        self.resolve = Resolver(machine, ins, memory_operand(ins, 1), space)
        self.phase = machine.registers.source(
            ins, ins.operands[2], "u32" if self.by_parity else "b64")

    def groups(self, machine: Machine, group: Group):
        """(offset, parity, mask of lanes) for every distinct wait of the group."""
        at = _objects(machine, self.resolve, group)
        parity = np.broadcast_to(self.phase(group), group.n).astype(np.int64) & 1
        keys = at * 2 + parity
        for key in np.unique(keys).tolist():
            yield key >> 1, key & 1, keys == key


@gate("mbarrier")
def mbarrier_gate(machine: Machine, ins: Instruction) -> Operation:
    """try_wait suspends until the phase completes or its time limit passes."""
    form = _WaitForm(machine, ins)

    def run(group: Group) -> None:
        for at, parity, mask in form.groups(machine, group):
            lanes = group.lanes[mask]
            barrier = machine.mbarriers.get(int(lanes[0]), at)
            late = machine.mbarriers.timed_out[lanes]
            if machine.mbarriers.finished(barrier, parity) or late.all():
                machine.mbarriers.timed_out[lanes] = False
                machine.release(lanes)
            else:
                machine.mbarriers.await_phase(lanes, at, barrier, f"parity {parity}")

    return run


def _mbarrier_wait(machine: Machine, ins: Instruction) -> Operation:
    form = _WaitForm(machine, ins)
    put = machine.registers.target(ins, ins.operands[0], "pred")

    def run(group: Group) -> None:
        done = np.zeros(group.n, bool)
        for at, parity, mask in form.groups(machine, group):
            lanes = group.lanes[mask]
            barrier = machine.mbarriers.get(int(lanes[0]), at)
            if machine.mbarriers.finished(barrier, parity):
                done |= mask
                if form.acquire:
                    for members in _by_team(machine, lanes):
                        machine.mbarriers.observed(members, barrier)
        put(group, done)
        if not form.suspends:
            machine.yield_lanes(group.lanes)

    return run
