"""Tensor memory of the resident blocks, and the tensor core of each (sm_100).

Every block slot is an SM of its own here. PTX ISA "Memory Consistency Model for 5th generation of
TensorCore operations": `tcgen05.ld`, `.st` and `.mma` are asynchronous; only multiplications with
the same accumulator, shape and kind keep their order by themselves. All else has to be waited for,
by `tcgen05.wait` or by the mbarrier that `tcgen05.commit` signals, and handed on to other threads.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import numpy as np

from .async_work import Job
from .layouts import IllegalOperand
from .tcgen05 import TMEM_COLUMNS, TMEM_LANES, Columns, split_address

if TYPE_CHECKING:
    from .machine import Machine

Cells = tuple[np.ndarray, np.ndarray]  # lanes and columns
PLACES = 2 * TMEM_COLUMNS  # what stamps are kept for: columns, of the lower and upper 16 lanes


def places(cells: Cells) -> np.ndarray:
    """The places of some cells; the lanes are those of any warp."""
    return np.unique(cells[0] % 32 // 16 * TMEM_COLUMNS + cells[1])


class TensorMemory:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.slots: dict[int, Core] = {}
        self.columns: dict[tuple[str, int], int] = {}
        self.loading: dict[int, set[str]] = {}
        self.last_started: dict[int, int] = {}

    def core(self, slot: int) -> Core:
        if slot not in self.slots:
            self.slots[slot] = Core(self.machine, slot)
        return self.slots[slot]

    def column(self, what: str, lane: int) -> int:
        """The clock column of a lane's multiplications: "completed" ones or "started" ones."""
        key = (what, lane % self.machine.team_lanes)
        if key not in self.columns:
            self.columns[key] = self.machine.clocks.add_engine()
        return self.columns[key]

    def started(self, lane: int) -> list[tuple[int, int]]:
        """(column, tick) of the multiplications that a lane has started, complete or not."""
        tick = self.last_started.get(lane)
        return [] if tick is None else [(self.column("started", lane), tick)]

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
            self.core(warp // per_block).complete(warp % per_block, store=True)

    def wait_loads(self, warps: list[int]) -> None:
        per_block = self.machine.block_lanes // 32
        for warp in warps:
            self.loading.pop(warp, None)
            self.core(warp // per_block).complete(warp % per_block, store=False)
        self.machine.flying = self.machine.flying_registers()


class Core:
    """Cells and tensor core of one block, and who used them last."""

    def __init__(self, machine: Machine, slot: int) -> None:
        self.machine, self.slot = machine, slot
        self.allocator = Columns()
        shape, warps = (TMEM_LANES, TMEM_COLUMNS), machine.block_lanes // 32
        self.cells = np.zeros(shape, np.uint32)
        self.written = np.zeros(shape, bool)
        # per place: the last multiplication into it and the last that read it as A
        self.product, self.product_by = np.zeros((2, PLACES), np.int64)
        self.operand, self.operand_by = np.zeros((2, PLACES), np.int64)
        self.starter, self.accumulator = np.zeros((2, PLACES), np.int64)
        self.accumulators: dict[Hashable, int] = {}
        # per warp and place: its last load and its last store, when complete
        self.loaded, self.stored = np.zeros((2, warps, PLACES), np.int64)
        # per warp: cells of loads and stores that it has not waited for
        self.loading: dict[int, list[Cells]] = {}
        self.storing: dict[int, list[Cells]] = {}
        self.last: Job | None = None
        self.last_of: dict[int, Job] = {}

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

    def dealloc(self, lane: int, address: int, count: int) -> None:
        legal(self.machine, self.allocator.dealloc, 0, address, count)
        first = split_address(address)[1]
        cells = np.indices((TMEM_LANES, count)) + np.array([0, first])[:, None, None]
        freed = places((cells[0], cells[1]))
        self._after_products(lane, freed, "tcgen05.dealloc")
        self._after_operands(lane, freed, "tcgen05.dealloc")
        self._after_pending((cells[0], cells[1]), "tcgen05.dealloc", True)
        self._after_warps(lane, freed, "tcgen05.dealloc", (self.loaded, self.stored))

    # ---- accesses of warps -----------------------------------------------------------------

    def _leader(self, warp: int) -> int:
        return self.slot * self.machine.block_lanes + warp * 32

    def warp_access(self, warp: int, cells: Cells, store: bool) -> None:
        """Order a tcgen05.ld or .st of a warp after what the tensor core and others did."""
        self.check_owned(cells[1])
        where = places(cells)
        lane, name = self._leader(warp), "tcgen05.st" if store else "tcgen05.ld"
        self._after_products(lane, where, name)
        if store:
            self._after_operands(lane, where, name)
        self._after_pending(cells, name, store)
        stamps = (self.loaded, self.stored) if store else (self.stored,)
        self._after_warps(lane, where, name, stamps)
        pending = self.storing if store else self.loading
        pending.setdefault(warp, []).append(cells)
        (self.stored if store else self.loaded)[warp, where] = self._now(lane)

    def complete(self, warp: int, store: bool) -> None:
        """tcgen05.wait: what the warp started is complete now."""
        stamps = self.stored if store else self.loaded
        for cells in (self.storing if store else self.loading).pop(warp, ()):
            stamps[warp, places(cells)] = self._now(self._leader(warp))

    def _now(self, lane: int) -> int:
        return int(self.machine.clocks.now[self.machine.team_and_member(lane)])

    # ---- what has to come before -----------------------------------------------------------

    def _knows(self, lane: int, column, tick: np.ndarray) -> np.ndarray:
        return (tick == 0) | self.machine.thread_sync.knows(lane, column, tick)

    def _after_products(self, lane: int, where: np.ndarray, name: str) -> None:
        if not self._knows(lane, self.product_by[where], self.product[where]).all():
            what = f"{name} of tensor memory of a tcgen05.mma nobody waited for"
            self.machine.find("in-flight", what, None)

    def _after_operands(self, lane: int, where: np.ndarray, name: str) -> None:
        if not self._knows(lane, self.operand_by[where], self.operand[where]).all():
            what = f"{name} over the operand of a tcgen05.mma nobody waited for"
            self.machine.find("in-flight", what, None)

    def _after_pending(self, cells: Cells, name: str, writes: bool) -> None:
        """No store of these cells, and before a write no load, may be without its wait."""
        for kind, pending in (("st", self.storing), ("ld", self.loading)):
            if kind == "ld" and not writes:
                continue
            for other in pending.values():
                if any(_overlap(cells, theirs) for theirs in other):
                    message = f"tcgen05.{kind} without tcgen05.wait::{kind} before this {name}"
                    self.machine.find("in-flight", message, None)

    def _after_warps(self, lane: int, where: np.ndarray, name: str, stamps) -> None:
        for other in range(len(self.loaded)):
            leader = self._leader(other)
            if leader // 32 == lane // 32 or not self._meets(lane, other, name):
                continue
            member = leader % self.machine.team_lanes
            for ticks in stamps:
                if not self._knows(lane, member, ticks[other, where]).all():
                    message = f"{name} not ordered after tensor memory accesses of warp {other}"
                    self.machine.find("race", message, None)

    def _meets(self, lane: int, warp: int, name: str) -> bool:
        """Loads and stores of warps that reach different lanes never meet."""
        mine = lane % self.machine.block_lanes // 32
        return name in ("tcgen05.mma", "tcgen05.dealloc") or mine % 4 == warp % 4

    # ---- the tensor core -------------------------------------------------------------------

    def tick(self, lane: int) -> tuple[int, int]:
        """(column, tick) of a multiplication that a lane starts now."""
        memory, clocks = self.machine.tensor_memory, self.machine.clocks
        column = memory.column("completed", lane)
        tick = clocks.tick_engine(lane // self.machine.team_lanes, column)
        memory.last_started[lane] = tick
        return column, tick

    def start(self, lane: int, form: Hashable, d: Cells, a: Cells | None, job: Job) -> None:
        """Issue a multiplication; `form` is what two of them share that keep their order."""
        machine, made = self.machine, places(d)
        read = np.zeros(0, np.int64) if a is None else places(a)
        self.check_owned(np.concatenate([made, read]) % TMEM_COLUMNS)
        memory = machine.tensor_memory
        self._after_pending(d, "tcgen05.mma", True)
        self._after_warps(lane, made, "tcgen05.mma", (self.loaded, self.stored))
        self._after_multiplications(lane, made, form)
        self._after_operands(lane, made, "tcgen05.mma")
        if a is not None:
            self._after_pending(a, "tcgen05.mma", False)
            self._after_warps(lane, read, "tcgen05.mma", (self.stored,))
            self._after_products(lane, read, "tcgen05.mma")
        now, column = memory.last_started[lane], memory.column("completed", lane)
        self.product[made], self.product_by[made] = now, column
        self.operand[read], self.operand_by[read] = now, column
        self.starter[made], self.accumulator[made] = lane, self._form(form)
        job.after, self.last, self.last_of[lane] = self.last, job, job
        machine.async_work.submit(job)

    def _form(self, form: Hashable) -> int:
        return self.accumulators.setdefault(form, len(self.accumulators) + 1)

    def _after_multiplications(self, lane: int, where: np.ndarray, form: Hashable) -> None:
        """After earlier ones into these places: complete, or in a pipeline with this one."""
        ticks = self.product[where]
        done = self._knows(lane, self.product_by[where], ticks)
        memory = self.machine.tensor_memory
        for other in np.unique(self.starter[where][~done]).tolist():
            theirs = ~done & (self.starter[where] == other)
            same = (self.accumulator[where[theirs]] == self._form(form)).all()
            if not same:
                message = "tcgen05.mma into the running accumulator of one of another form"
                self.machine.find("in-flight", message, None)
            elif other != lane:
                column = memory.column("started", other)
                if not self._knows(lane, column, ticks[theirs]).all():
                    message = f"tcgen05.mma not ordered after that of thread {other}"
                    self.machine.find("race", message, None)

    def commit(self, ins, lane: int, barrier: int) -> None:
        """Signal an mbarrier when all earlier work of this lane is complete; what the lane knew
        then happened before that work."""
        machine = self.machine
        team, member = machine.team_and_member(lane)
        known = machine.clocks.release(team, np.array([member]))
        memory = machine.tensor_memory
        column = memory.column("completed", lane)
        known = np.pad(known, (0, max(column + 1 - len(known), 0)))
        known[column] = max(known[column], memory.last_started.get(lane, 0))
        job = Job(ins, team, lambda: machine.mbarriers.engine_arrive(barrier, known))
        job.after = self.last_of.get(lane)
        self.last_of[lane] = job
        machine.async_work.submit(job)

    def read(self, lane: np.ndarray, column: np.ndarray) -> np.ndarray:
        if not self.written[lane, column].all():
            self.machine.find("uninitialised", "tensor memory never written", None)
        return self.cells[lane, column]

    def write(self, lane: np.ndarray, column: np.ndarray, values: np.ndarray) -> None:
        self.cells[lane, column] = values
        self.written[lane, column] = True


def _overlap(a: Cells, b: Cells) -> bool:
    first, second = (np.unique(lane * TMEM_COLUMNS + column) for lane, column in (a, b))
    return bool(np.isin(first, second).any())


def legal(machine: Machine, function, *args):
    """Call a model; what it refuses is a finding."""
    try:
        return function(*args)
    except IllegalOperand as error:
        machine.stop("tensor-memory", str(error), None)
        raise
