"""mbarrier instructions; the objects themselves are in mbarriers.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .addresses import Resolver
from .decode import Modifiers, Operation, gate, opcode, operand_count
from .instruction import Instruction, Memory
from .registers import Group, memory_operand
from .report import UnknownInstruction

if TYPE_CHECKING:
    from .machine import Machine


@opcode("mbarrier")
def mbarrier(machine: Machine, ins: Instruction) -> Operation:
    builders = {
        "init": _mbarrier_init,
        "inval": _mbarrier_inval,
        "arrive": _mbarrier_arrive,
        "arrive_drop": _mbarrier_arrive,
        "expect_tx": _mbarrier_expect,
        "complete_tx": _mbarrier_expect,
        "pending_count": _mbarrier_pending,
        "test_wait": _mbarrier_wait,
        "try_wait": _mbarrier_wait,
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
        for lane, where, n in zip(group.lanes.tolist(), at.tolist(), counts.tolist(), strict=True):
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
    """arrive{_drop}{.expect_tx|.noComplete}{.release|.relaxed}{.scope}{.space}.b64
    {state|_,} [addr]{, count|tx}."""
    mods = Modifiers(ins)
    drop = mods.need("arrive", "arrive_drop") == "arrive_drop"
    mods.need("b64")
    expects = bool(mods.take("expect_tx"))
    may_complete = not mods.take("noComplete")
    release = mods.take("release", "relaxed") != "relaxed"
    mods.take("cta", "cluster")
    space = mods.take("shared::cta", "shared::cluster", "shared")
    mods.done()
    has_state = len(ins.operands) > 1 and not isinstance(ins.operands[0], Memory)
    state = ins.operands[0] if has_state else None
    rest = ins.operands[1:] if has_state else ins.operands
    resolve = Resolver(machine, ins, memory_operand(ins, 1 if has_state else 0), space)
    number = machine.registers.source(ins, rest[1], "u32") if len(rest) > 1 else None
    if (expects or not may_complete) and number is None:
        raise UnknownInstruction(ins, "expect_tx and noComplete need a count")
    put = machine.registers.target(ins, state, "b64") if state is not None else None

    def run(group: Group) -> None:
        at = _objects(machine, resolve, group)
        values = np.broadcast_to(1 if number is None else number(group), group.n).astype(np.int64)
        states = np.zeros(group.n, np.uint64)
        keys = np.stack([at, values])
        for where, value in np.unique(keys, axis=1).T.tolist():
            chosen = (at == where) & (values == value)
            for lanes in _by_team(machine, group.lanes[chosen]):
                count, size = (1, value) if expects else (value, 0)
                states[np.isin(group.lanes, lanes)] = machine.mbarriers.arrive(
                    lanes, where, count, size, release, drop, may_complete
                )
        if put is not None:
            put(group, states)

    return run


def _by_team(machine: Machine, lanes: np.ndarray):
    teams = lanes // machine.team_lanes
    return [lanes[teams == team] for team in np.unique(teams)]


def _mbarrier_pending(machine: Machine, ins: Instruction) -> Operation:
    """pending_count.b64 count, state: what was pending before the arrival that returned it."""
    mods = Modifiers(ins)
    mods.need("pending_count")
    mods.need("b64")
    mods.done()
    operand_count(ins, 2)
    put = machine.registers.target(ins, ins.operands[0], "b32")
    state = machine.registers.source(ins, ins.operands[1], "b64")
    return lambda group: put(
        group, (np.broadcast_to(state(group), group.n) >> np.uint64(32)).astype(np.uint32)
    )


def _mbarrier_expect(machine: Machine, ins: Instruction) -> Operation:
    """expect_tx, and complete_tx, which simulates the completion of an asynchronous copy."""
    mods = Modifiers(ins)
    sign = 1 if mods.need("expect_tx", "complete_tx") == "expect_tx" else -1
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
            machine.mbarriers.expect(lane, where, sign * n)

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
            ins, ins.operands[2], "u32" if self.by_parity else "b64"
        )

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
            late = machine.mbarriers.timed_out
            if machine.mbarriers.finished(barrier, parity):
                late[lanes] = False
                machine.release(lanes)
            elif late[lanes].all() or machine.mbarriers.gives_up(lanes, barrier):
                late[lanes] = True
                machine.release(lanes)
            else:
                machine.mbarriers.await_phase(lanes, at, barrier, f"parity {parity}")

    return run


def _mbarrier_wait(machine: Machine, ins: Instruction) -> Operation:
    form = _WaitForm(machine, ins)
    put = machine.registers.target(ins, ins.operands[0], "pred")

    def run(group: Group) -> None:
        done = np.zeros(group.n, bool)
        late = machine.mbarriers.timed_out[group.lanes]
        machine.mbarriers.timed_out[group.lanes] = False
        for at, parity, mask in form.groups(machine, group):
            mask &= ~late
            lanes = group.lanes[mask]
            if not len(lanes):
                continue
            barrier = machine.mbarriers.get(int(lanes[0]), at)
            if machine.mbarriers.finished(barrier, parity):
                done |= mask
                machine.thread_sync.meet(lanes, barrier.posted_done)
                if form.acquire:
                    for members in _by_team(machine, lanes):
                        machine.mbarriers.observed(members, barrier)
        put(group, done)
        if not form.suspends:
            machine.yield_lanes(group.lanes)

    return run
