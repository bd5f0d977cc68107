"""The machine: resident blocks, their lanes, and the loop that runs them.

All resident blocks live in one set of arrays; lane `l` belongs to block slot `l // block_lanes`.
Lanes of one cluster are neighbours and form a team (see `clocks.py`).
"""

from __future__ import annotations

from collections import deque

import numpy as np

from . import decode
from .async_work import AsyncWork
from .barriers import BlockBarriers, ClusterBarriers
from .clocks import Clocks
from .code import Code
from .deadlock import report_deadlock
from .dependent_launch import DependentLaunch
from .flags import Flags
from .global_races import GlobalTracker
from .instruction import Instruction, Kernel
from .mbarriers import TransactionBarriers
from .memory import GlobalSpace, SharedSpace, Space
from .placement import Layout, Variables, access_granule
from .program import Program
from .races import SharedTracker
from .register_pool import RegisterPool
from .registers import Group, RegisterFile
from .report import EmulationStopped, Finding, Report, UnknownInstruction
from .schedule import Picker, Schedule
from .special import SpecialRegisters
from .states import ARRIVED, BLOCKED, EXITED, READY
from .syntax import Module
from .tensor_map_proxy import TensorMapProxy
from .tensor_memory import TensorMemory
from .thread_sync import ThreadSync
from .traffic import Traffic
from .visits import Visits
from .warpgroups import WarpgroupQueues

_FAR = np.int32(2**31 - 1)
_STALL_ROUNDS = 40
_EAGER_LOOKS = 1000  # a loop that stores while it waits must not keep the others from running
MAX_FINDINGS = 50


class Machine:
    def __init__(
        self,
        module: Module,
        kernel: Kernel,
        layout: Layout,
        variables: Variables,
        schedule: Schedule,
        count: bool,
        registers: int | None = None,
    ) -> None:
        self.module, self.kernel, self.layout, self.schedule = module, kernel, layout, schedule
        self.report = Report(kernel.name)
        self.counters = self.report.counters if count else None
        self.lane_count = layout.lanes
        self.block_lanes, self.team_lanes = layout.block_lanes, layout.team_lanes
        self.cluster_threads = layout.team_lanes
        self.cluster_of_team = np.full(layout.teams, -1)
        self.at: Instruction = kernel.instructions[0]
        self.group: Group | None = None
        self._seen: set[tuple[str, int]] = set()

        self.status = np.full(layout.lanes, EXITED, np.uint8)
        self.pc = np.zeros(layout.lanes, np.int32)
        self.through = np.zeros(layout.lanes, bool)
        self.yielded = np.zeros(layout.lanes, bool)
        # of eager schedules: where, when and how often a lane looked, and whether it ever spun
        self.looked_at = np.full((2, layout.lanes), -1, np.int64)
        self.looks = np.zeros(layout.lanes, np.int64)
        self.spinning = np.zeros(layout.lanes, bool)
        self.seen_progress = 0
        self.reasons: list[str] = [""]
        self.reason_of = {"": 0}
        self.waiting = np.zeros(layout.lanes, np.int32)
        self.progress = 0

        self.clocks = Clocks(layout.teams, layout.team_lanes, layout.team_threads())
        self.program = Program(kernel)
        self.variables = variables
        self.memory = GlobalSpace(self, variables.global_sizes)
        self.shared = SharedSpace(self, layout.slots, variables.shared_size)
        self.local = Space(self, "local", variables.local_stride * layout.lanes + 16)
        self.local.allocate(0, variables.local_stride * layout.lanes)
        self.params = Space(self, "param", variables.param_size + 16)
        self.shared_races = SharedTracker(
            self, self.shared.size, access_granule(kernel, "shared", 16)
        )
        self.races = GlobalTracker(self, self.memory.size, access_granule(kernel, "global", 4))
        self.flags = Flags(self)
        self.fence_ticks = np.zeros(layout.clusters * layout.team_lanes, np.int32)
        self.registers = RegisterFile(self, kernel.registers)
        self.special_registers = SpecialRegisters(self)
        self.picker = Picker(schedule, layout.block_lanes // 32)
        self.barriers = BlockBarriers(self)
        self.cluster_barriers = ClusterBarriers(self)
        self.visits = Visits(self)
        self.mbarriers = TransactionBarriers(self)
        self.async_work = AsyncWork(self)
        self.tensor_memory = TensorMemory(self)
        self.thread_sync = ThreadSync(self)
        self.tensor_map_proxy = TensorMapProxy(self)
        self.register_pool = RegisterPool(self, registers)
        self.dependent_launch = DependentLaunch(self)
        self.warpgroups = WarpgroupQueues(self)
        self.flying: set[str] = set()
        self.queue = deque(range(layout.clusters))
        self.traffic = Traffic(self)
        self.gather_warps = self.gathering(32)

    def build(self) -> None:
        """Turn the instructions into closures; parameters and addresses are known by now."""
        self.code = Code(self)

    # ---- lanes -----------------------------------------------------------------------------

    def gathering(self, size: int) -> decode.Operation:
        """Lanes wait until all live lanes of their warp (warpgroup) are here."""

        def wait(group: Group) -> None:
            order = int(self.pc[group.lanes[0]])
            teams = np.unique(group.lanes // size)
            pcs = self.pc.reshape(-1, size)[teams]
            live = self.status.reshape(-1, size)[teams] != EXITED
            complete = ((pcs == order) | ~live).all(axis=1)
            lanes = teams[:, None] * size + np.arange(size)
            self.release(lanes[complete][live[complete]])
            rest = group.lanes[~np.isin(group.lanes // size, teams[complete])]
            self.block(rest, "the other lanes of its " + ("warp" if size == 32 else "warpgroup"))

        return wait

    def release(self, lanes: np.ndarray) -> None:
        """The lanes may pass the gate they stand before."""
        self.through[lanes] = True
        self.status[lanes] = READY
        self.yielded[lanes] = False

    def block(self, lanes: np.ndarray, why: str, arrived: bool = False) -> None:
        if len(lanes):
            self.status[lanes] = ARRIVED if arrived else BLOCKED
            if why not in self.reason_of:
                self.reason_of[why] = len(self.reasons)
                self.reasons.append(why)
            self.waiting[lanes] = self.reason_of[why]

    def why(self, lane: int) -> str:
        if self.status[lane] == READY:
            return "its turn (spinning)"
        return self.reasons[self.waiting[lane]]

    def retry(self, lanes: np.ndarray) -> None:
        """Blocked lanes look at their gate again."""
        again = lanes[(self.status[lanes] == BLOCKED) & ~self.through[lanes]]
        self.status[again] = READY

    def yield_lanes(self, lanes: np.ndarray) -> None:
        """The lanes looked at something others may change: let others run first."""
        self.yielded[lanes] = True

    def looked(self, lanes: np.ndarray) -> None:
        """A strong load: others run first, but eager lanes only if they look once more in vain."""
        if self.schedule.eager:
            now = np.stack([self.pc[lanes], np.full(len(lanes), self.progress)])
            same = self.looked_at[:, lanes] == now
            self.looks[lanes] = np.where(same[0], self.looks[lanes] + 1, 0)
            vain = same[0] & (same[1] | (self.looks[lanes] % _EAGER_LOOKS == 0))
            self.looked_at[:, lanes] = now
            self.spinning[lanes] |= vain
            lanes = lanes[vain]
        self.yielded[lanes] = True

    def team_of(self, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return lanes // self.team_lanes, lanes % self.team_lanes

    def team_and_member(self, lane: int) -> tuple[int, int]:
        return divmod(lane, self.team_lanes)

    def thread_ids(self, lanes: np.ndarray) -> np.ndarray:
        team, member = self.team_of(lanes)
        return self.cluster_of_team[team] * self.team_lanes + member

    def ticks(self, lanes: np.ndarray) -> np.ndarray:
        return self.clocks.now[self.team_of(lanes)]

    def thread_name(self, uid: int) -> str:
        cluster, member = divmod(uid, self.team_lanes)
        rank, thread = divmod(member, self.block_lanes)
        return f"block {self.layout.block_of(cluster, rank)} thread {thread}"

    def lane_name(self, lane: int) -> str:
        return self.thread_name(int(self.thread_ids(np.array([lane]))[0]))

    def slots_of(self, lanes: np.ndarray) -> np.ndarray:
        return lanes // self.block_lanes

    def instruction(self, index: int) -> Instruction:
        return self.kernel.instructions[index]

    def special(self, ins: Instruction, name: str):
        return self.special_registers.getter(ins, name)

    def variable_address(self, ins: Instruction, name: str):
        address = self.variables.addresses.get(name)
        if address is None:
            raise UnknownInstruction(ins, f"no variable {name}")
        return address

    def check_running(self, slots: np.ndarray) -> None:
        """Shared memory of a block may be used by others only while that block runs."""
        for slot in np.unique(slots).tolist():
            lanes = slice(slot * self.block_lanes, (slot + 1) * self.block_lanes)
            if (self.status[lanes] == EXITED).all():
                self.find("exited-block", "shared memory of a block that has exited", None)

    def flying_registers(self) -> set[str]:
        """Registers that asynchronous operations of some warp still own."""
        queues = self.warpgroups.queues.values()
        return set().union(*(q.flying for q in queues), *self.tensor_memory.loading.values())

    def fence_proxy(self, lanes: np.ndarray, spaces: set[str]) -> None:
        team, member = self.team_of(lanes)
        if "global" in spaces:
            self.fence_ticks[self.thread_ids(lanes)] = self.clocks.now[team, member]
            self.races.proxy_view[lanes] = self.races.known_by[lanes]
        self.clocks.fence_proxy(team, member, spaces)

    # ---- findings --------------------------------------------------------------------------

    def find(self, kind: str, message: str, rows: np.ndarray | None) -> None:
        """Record a finding at the current instruction; `rows` are the group's lanes at fault."""
        ins = self.at
        if (kind, ins.line) in self._seen:
            return
        self._seen.add((kind, ins.line))
        if self.group is not None:
            lanes = self.group.lanes
            if rows is not None and len(rows) == len(lanes):
                lanes = lanes[rows]
            more = f" and {len(lanes) - 1} more" if len(lanes) > 1 else ""
            message = f"{message} [{self.lane_name(int(lanes[0]))}{more}]"
        self.report.findings.append(Finding(kind, message, ins.line, ins.source, ins.text))
        if len(self.report.findings) >= MAX_FINDINGS:
            raise EmulationStopped

    def stop(self, kind: str, message: str, rows: np.ndarray | None) -> None:
        self.find(kind, message, rows)
        raise EmulationStopped

    # ---- running ---------------------------------------------------------------------------

    def run(self) -> Report:
        for team in range(self.layout.teams):
            self._start(team)
        stalled, seen = 0, -1
        try:
            with np.errstate(all="ignore"):
                while True:
                    if self._step():
                        continue
                    if not (self.status != EXITED).any():
                        break
                    if self.progress != seen:
                        seen, stalled = self.progress, 0
                    stalled += 1
                    if not self._unstick(stalled):
                        report_deadlock(self)
                self.async_work.check_left()
        except EmulationStopped:
            pass
        return self.report

    def _step(self) -> bool:
        """Run one block of a chosen set of lanes; False when nobody can run."""
        if self.schedule.landing != "early":
            self.async_work.maybe_land()
        if self.schedule.eager:
            self._let_look()
        ready = (self.status == READY) & ~self.yielded
        eager = (ready & self.spinning).reshape(-1, 32).any(axis=1)
        if eager.any():
            ready &= np.repeat(eager, 32)  # whole warps: they may stand before a collective
        if self.schedule.slow_block is not None:
            slow = self.layout.lane_block == self.schedule.slow_block
            if (ready & ~slow).any():
                ready &= ~slow
        lowest = np.where(ready, self.pc, _FAR).reshape(-1, 32)
        first = lowest.min(axis=1)
        warps = np.nonzero(first < _FAR)[0]
        if not len(warps):
            return False
        warps = self.picker.choose(warps)
        order = int(first[warps].min())
        chosen = warps[first[warps] == order]
        if self.program.blocks[order].gate == "warpgroup":
            near = (np.unique(chosen >> 2)[:, None] * 4 + np.arange(4)).ravel()
            chosen = near[first[near] == order]
        here = lowest[chosen] == order
        lanes = (chosen[:, None] * 32 + _LANES)[here]
        alone = len(lanes) == int((lowest[warps] < _FAR).sum())
        self._advance(order, Group(lanes, self.lane_count), alone)
        return True

    def _has_news(self) -> bool:
        """Whether something happened that eager lanes may wait for."""
        news = self.schedule.eager and self.progress != self.seen_progress
        return news and bool(self.spinning.any())

    def _let_look(self) -> None:
        """Spinning lanes look again, and first, when anything happened since."""
        if self._has_news():
            self.yielded[self.spinning] = False
        self.seen_progress = self.progress

    def _advance(self, order: int, group: Group, alone: bool) -> None:
        """Run `group` from block `order` until it splits, waits or may meet others."""
        while True:
            gate = self.code.gates[order]
            if gate is not None and not self._pass(order, group, gate):
                return
            self._execute(order, group)
            following = self._leave(order, group)
            if following is None or not alone or self.picker.schedule.order == "random":
                return
            if self.yielded[group.lanes[0]] or self._has_news():
                return
            order = following

    def _pass(self, order: int, group: Group, gate) -> bool:
        through = self.through[group.sel]
        if through.all():
            self.through[group.sel] = False
            return True
        waiting = group.where(~through)
        self.at = self.program.blocks[order].instructions[0]
        self.group = waiting
        guard = self.code.gate_guards[order]
        if guard is not None:
            active = guard(waiting)
            if not active.all():
                self.release(waiting.lanes[~active])
            if not active.any():
                return False
            waiting = waiting.where(active)
        gate(waiting)
        return False

    def _execute(self, order: int, group: Group) -> None:
        self.report.steps += 1
        self.group = group
        for ins, operation, guard in self.code.bodies[order]:
            self.at = ins
            if self.flying:
                self.warpgroups.check_registers(ins, group)
            if guard is None:
                operation(group)
                continue
            active = guard(group)
            if active.all():
                operation(group)
            elif active.any():
                self.group = group.where(active)
                operation(self.group)
                self.group = group
        if self.counters is not None:
            self._count(order, group)

    def _count(self, order: int, group: Group) -> None:
        warps = len(np.unique(group.lanes >> 5))
        for ins in self.program.blocks[order].instructions:
            self.counters.warp_instructions += warps
            self.counters.opcodes[ins.name] += warps

    def _leave(self, order: int, group: Group) -> int | None:
        """Move the lanes to their next blocks; the next block if all go the same way."""
        end, guard, target = self.code.ends[order]
        following = self.program.following[order]
        if end is None:
            return self._go(group, following)
        self.at = end
        taken = guard(group) if guard is not None else None
        if taken is None or taken.all():
            return self._jump(group, target)
        if not taken.any():
            return self._go(group, following)
        self._go(group.where(~taken), following)
        self._jump(group.where(taken), target)
        return None

    def _go(self, group: Group, order) -> int | None:
        if isinstance(order, int) and order < 0:
            raise UnknownInstruction(self.at, "control runs off the end of the kernel")
        self.pc[group.sel] = order
        if isinstance(order, int):
            return order
        return int(order[0]) if (order == order[0]).all() else None

    def _jump(self, group: Group, target) -> int | None:
        if target is None:
            self._exit(group)
            return None
        return self._go(group, target(group))

    def _exit(self, group: Group) -> None:
        self.status[group.sel] = EXITED
        self.progress += 1
        groups = np.unique(group.lanes // 128)
        around = (groups[:, None] * 128 + np.arange(128)).ravel()
        self.retry(around[around < self.lane_count])
        if self.layout.cluster_size > 1:
            self.visits.exited(np.unique(self.slots_of(group.lanes)))
        for team in np.unique(group.lanes // self.team_lanes).tolist():
            begin = team * self.team_lanes
            self.cluster_barriers.update(team)
            if (self.status[begin : begin + self.team_lanes] == EXITED).all():
                self._finish(team)

    # ---- blocks come and go ----------------------------------------------------------------

    def _finish(self, team: int) -> None:
        self.mbarriers.finish(team)
        self.tensor_memory.finish(team)
        if self.queue:
            self.async_work.land_all(team)
            self.clocks.restart(team)
            self._start(team)

    def _start(self, team: int) -> None:
        if not self.queue:
            return
        cluster = self.queue.popleft()
        self.cluster_of_team[team] = cluster
        begin = team * self.team_lanes
        lanes = slice(begin, begin + self.team_lanes)
        self.layout.enter(team, cluster)
        self.status[lanes] = np.where(self.layout.team_threads(), READY, EXITED)
        self.pc[lanes] = 0
        self.through[lanes] = False
        self.yielded[lanes] = False
        self.spinning[lanes] = False
        self.races.restart(lanes)
        self.registers.restart(lanes)
        self.register_pool.restart(lanes)
        self.dependent_launch.restart(lanes)
        self.visits.restart(lanes)
        self.thread_sync.restart(team, lanes)
        self.flags.restart(team, lanes)
        self.cluster_barriers.start(team)
        for rank in range(self.layout.cluster_size):
            slot = team * self.layout.cluster_size + rank
            self.shared.clear(slot)
            stride = self.shared.stride
            self.shared_races.clear(slot * stride, (slot + 1) * stride)

    # ---- nobody runs -----------------------------------------------------------------------

    def _unstick(self, stalled: int) -> bool:
        """Give time to spinning lanes, asynchronous work and timed waits; False if all is stuck."""
        if self.async_work.land_one():
            return True
        if ((self.status == READY) & self.yielded).any():
            self.yielded[:] = False
            return stalled < _STALL_ROUNDS
        return self.mbarriers.time_out() if stalled <= 2 else False


_LANES = np.arange(32)
