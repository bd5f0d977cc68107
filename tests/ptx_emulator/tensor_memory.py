"""Tensor memory of the resident blocks, and the tensor core of each (sm_100).

Every block slot is an SM of its own here.  A warp's accesses and the tensor core's are stamped per
column, so that a load needs the completion of the multiplication it reads (through the mbarrier
that `tcgen05.commit` signals), and a multiplication needs the loads and stores before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .async_work import Job
from .layouts import IllegalOperand
from .tcgen05 import TMEM_COLUMNS, TMEM_LANES, Columns

if TYPE_CHECKING:
    from .machine import Machine


class TensorMemory:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.slots: dict[int, _Core] = {}
        self.columns: dict[int, int] = {}
        self.loading: dict[int, set[str]] = {}

    def core(self, slot: int) -> _Core:
        if slot not in self.slots:
            rank = slot % self.machine.layout.cluster_size
            if rank not in self.columns:
                self.columns[rank] = self.machine.clocks.add_engine()
            self.slots[slot] = _Core(self.machine, slot, self.columns[rank])
        return self.slots[slot]

    def finish(self, team: int) -> None:
        """All tensor memory must be deallocated before the block exits."""
        size = self.machine.layout.cluster_size
        for slot in range(team * size, (team + 1) * size):
            core = self.slots.pop(slot, None)
            if core is not None and core.allocator.allocated(0):
                self.machine.find("leftover", "exit without tcgen05.dealloc", None)

    def wait_stores(self, warps: list[int]) -> None:
        per_block = self.machine.block_lanes // 32
        for warp in warps:
            self.core(warp // per_block).storing[warp % per_block] = False

    def wait_loads(self, warps: list[int]) -> None:
        for warp in warps:
            self.loading.pop(warp, None)
        self.machine.flying = self.machine.flying_registers()


class _Core:
    """Cells and tensor core of one block."""

    def __init__(self, machine: Machine, slot: int, column: int) -> None:
        self.machine, self.slot, self.column = machine, slot, column
        self.allocator = Columns()
        self.cells = np.zeros((TMEM_LANES, TMEM_COLUMNS), np.uint32)
        self.written = np.zeros((TMEM_LANES, TMEM_COLUMNS), bool)
        warps = machine.block_lanes // 32
        self.multiplied = np.zeros(TMEM_COLUMNS, np.int64)
        self.touched = np.zeros((warps, TMEM_COLUMNS), np.int64)
        self.stored = np.zeros((warps, TMEM_COLUMNS), np.int64)
        self.storing = np.zeros((warps, TMEM_COLUMNS), bool)
        self.last: Job | None = None
        self.tick = 0

    def check_owned(self, columns: np.ndarray) -> None:
        if not self.allocator.owns(0, columns):
            self.machine.stop(
                "out-of-bounds",
                f"tensor memory columns {int(columns.min())}..{int(columns.max())} not allocated",
                None,
            )

    def can_allocate(self, count: int) -> bool:
        """Whether an allocation would succeed now; illegal requests are let through to raise."""
        taken = np.zeros(TMEM_COLUMNS, bool)
        for first, size in self.allocator.allocated(0):
            taken[first : first + size] = True
        starts = range(0, TMEM_COLUMNS - count + 1, 32)
        return count > TMEM_COLUMNS or any(not taken[s : s + count].any() for s in starts)

    # ---- accesses of warps -----------------------------------------------------------------

    def _leader(self, warp: int) -> tuple[int, int]:
        lane = self.slot * self.machine.block_lanes + warp * 32
        return self.machine.team_and_member(lane)

    def warp_access(self, warp: int, columns: np.ndarray, store: bool) -> None:
        """Order a tcgen05.ld or .st of a warp after what the tensor core and others did."""
        columns = np.unique(columns)
        self.check_owned(columns)
        team, member = self._leader(warp)
        clocks = self.machine.clocks
        done = clocks.knows(team, member, self.column, self.multiplied[columns])
        if not done.all():
            self.machine.find("in-flight", "tensor memory of a tcgen05.mma nobody waited for", None)
        self.touched[warp, columns] = clocks.now[team, member]
        if store:
            self.stored[warp, columns] = clocks.now[team, member]
            self.storing[warp, columns] = True

    # ---- the tensor core -------------------------------------------------------------------

    def start(self, lane: int, columns_d: np.ndarray, columns_a: np.ndarray, job: Job) -> None:
        """Issue a multiplication after all earlier ones of this block."""
        machine = self.machine
        self.check_owned(np.concatenate([columns_d, columns_a]))
        team, member = machine.team_and_member(lane)
        if self.storing[:, np.concatenate([columns_d, columns_a])].any():
            machine.find("in-flight", "tcgen05.st without tcgen05.wait::st before this", None)
        for stamps, columns in ((self.touched, columns_d), (self.stored, columns_a)):
            self._after_warps(team, member, stamps, columns)
        self.multiplied[columns_d] = self.tick
        job.after, self.last = self.last, job
        machine.async_work.submit(job)

    def _after_warps(self, team: int, member: int, stamps: np.ndarray, columns) -> None:
        for warp in range(len(stamps)):
            _, other = self._leader(warp)
            ticks = stamps[warp, columns]
            known = self.machine.clocks.knows(team, member, other, ticks)
            if other // 32 != member // 32 and not known.all():
                self.machine.find(
                    "race",
                    f"tcgen05.mma not ordered after tensor memory accesses of warp {warp}",
                    None,
                )

    def commit(self, ins, lane: int, barrier: int) -> None:
        """Signal an mbarrier when all earlier work is complete; what the issuing lane knew then
        happened before that work."""
        machine = self.machine
        team, member = machine.team_and_member(lane)
        known = machine.clocks.release(team, np.array([member]))
        known[self.column] = max(known[self.column], self.tick)
        job = Job(ins, team, lambda: machine.mbarriers.engine_arrive(barrier, known))
        job.after, self.last = self.last, job
        machine.async_work.submit(job)

    def read(self, lane: np.ndarray, column: np.ndarray) -> np.ndarray:
        if not self.written[lane, column].all():
            self.machine.find("uninitialised", "tensor memory never written", None)
        return self.cells[lane, column]

    def write(self, lane: np.ndarray, column: np.ndarray, values: np.ndarray) -> None:
        self.cells[lane, column] = values
        self.written[lane, column] = True


def legal(machine: Machine, function, *args):
    """Call a model; what it refuses is a finding."""
    try:
        return function(*args)
    except IllegalOperand as error:
        machine.stop("tensor-memory", str(error), None)
        raise
