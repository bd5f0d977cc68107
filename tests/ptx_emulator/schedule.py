"""Schedules: which legal order of events a run explores.

PTX promises little about timing: warps may run in any order, asynchronous work may land at once
or only when somebody has to wait for it.  A kernel must give the same numbers under all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Schedule:
    """`order`: "together" runs all warps that are at the same place at once, "forward" and
    "reversed" run one warp (of every block) as far as it goes, "serial" one warp of one block,
    "random" a seeded choice.  `landing`: "early", "late" or "random"; unless it is early, a
    `mbarrier.try_wait` may also give up before its phase completes.  `slow_block` runs only when
    nobody else can.  `eager`: who spins looks again after every store, and goes on first."""

    order: str = "together"
    landing: str = "early"
    seed: int = 0
    slow_block: int | None = None
    eager: bool = False

    def __str__(self) -> str:
        name = f"{self.order}-{self.landing}"
        if "random" in name:
            name += f"-{self.seed}"
        name += "-eager" if self.eager else ""
        return name + (f"-slow{self.slow_block}" if self.slow_block is not None else "")


TOGETHER = Schedule()
EVERY_SCHEDULE = (
    TOGETHER,
    Schedule("together", "late"),
    Schedule("forward", "late"),
    Schedule("reversed", "early"),
    Schedule("serial", "late", eager=True),
    Schedule("random", "random", seed=1, eager=True),
    Schedule("reversed", "late", slow_block=0, eager=True),
)


class Picker:
    """Chooses among ready warps; warps are numbered through the resident blocks."""

    def __init__(self, schedule: Schedule, warps_per_block: int) -> None:
        if schedule.order not in ("together", "forward", "reversed", "serial", "random"):
            raise ValueError(f"unknown order {schedule.order!r}")
        if schedule.landing not in ("early", "late", "random"):
            raise ValueError(f"unknown landing {schedule.landing!r}")
        self.schedule = schedule
        self.per_block = warps_per_block
        self.random = np.random.default_rng(schedule.seed)

    def choose(self, warps: np.ndarray) -> np.ndarray:
        """A subset of the ready warps (ascending numbers) that runs next."""
        order = self.schedule.order
        if order == "together" or len(warps) == 1:
            return warps
        if order == "serial":
            return warps[:1]
        inside = warps % self.per_block
        if order == "forward":
            return warps[inside == inside.min()]
        if order == "reversed":
            return warps[inside == inside.max()]
        pivot = inside[self.random.integers(len(warps))]
        return warps[
            (inside == pivot) & (self.random.random(len(warps)) < 0.7)
            | (warps == warps[self.random.integers(len(warps))])
        ]

    def lands_now(self) -> bool:
        landing = self.schedule.landing
        return landing == "early" or (landing == "random" and self.random.random() < 0.5)

    def gives_up(self) -> bool:
        """Whether a suspended wait reaches its time limit."""
        return self.schedule.landing != "early" and not self.lands_now()
