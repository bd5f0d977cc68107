"""Barriers of a block and of a cluster.

`bar`/`barrier`: sixteen named barriers per block; a barrier completes when the expected number of
threads has arrived.  An `.aligned` form counts whole warps and wants the warp converged.
`barrier.cluster`: arrive and wait are split; all non-exited threads of the cluster take part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .clocks import latest
from .global_races import Knowledge, merged
from .registers import Group
from .states import EXITED

if TYPE_CHECKING:
    from .machine import Machine


@dataclass
class NamedBarrier:
    expected: int
    arrived: int = 0
    waiting: list[np.ndarray] = field(default_factory=list)
    passers: list[np.ndarray] = field(default_factory=list)
    released: np.ndarray | None = None
    posted: np.ndarray | None = None


class BlockBarriers:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.open: dict[tuple[int, int], NamedBarrier] = {}
        self.votes = np.zeros(machine.lane_count, bool)
        self.results = np.zeros(machine.lane_count, np.int64)
        self.voters = np.zeros(machine.lane_count, np.int64)

    def converged(self, group: Group) -> np.ndarray:
        """Lanes whose whole warp stands here; the others are blocked."""
        machine = self.machine
        order = machine.pc[group.lanes[0]]
        warp = group.lanes >> 5
        pcs = machine.pc.reshape(-1, 32)[warp]
        live = machine.status.reshape(-1, 32)[warp] != EXITED
        together = ((pcs == order) | ~live).all(axis=1)
        machine.block(group.lanes[~together], "the other lanes of its warp")
        here = np.unique(warp[together])
        lanes = (here[:, None] * 32 + np.arange(32)).ravel()
        return lanes[(machine.status[lanes] != EXITED) & ~machine.through[lanes]]

    def arrive(
        self, lanes: np.ndarray, names: np.ndarray, counts: np.ndarray, aligned: bool, wait: bool
    ) -> None:
        """The lanes arrive; those that wait are blocked until the barrier completes."""
        slots = self.machine.slots_of(lanes)
        if (names > 15).any() or (names < 0).any():
            self.machine.stop("barrier", f"barrier number {int(names.max())} is not 0..15", None)
        keys = slots * 16 + names
        for key in np.unique(keys).tolist():
            chosen = keys == key
            self._arrive(divmod(key, 16), lanes[chosen], counts[chosen], aligned, wait)

    def _arrive(self, key, lanes: np.ndarray, counts: np.ndarray, aligned, wait: bool) -> None:
        machine = self.machine
        expected = int(counts[0])
        if (counts != expected).any() or expected % 32 or expected <= 0:
            machine.stop("barrier-count", f"thread counts {np.unique(counts).tolist()}", None)
        barrier = self.open.setdefault(key, NamedBarrier(expected))
        if barrier.expected != expected:
            machine.stop(
                "barrier-count",
                f"barrier {key[1]} is in use for {barrier.expected} threads, here {expected}",
                None,
            )
        barrier.posted = machine.thread_sync.arrive(lanes, barrier.posted)
        barrier.arrived += 32 * len(np.unique(lanes >> 5)) if aligned else len(lanes)
        if wait:
            barrier.waiting.append(lanes)
            machine.block(lanes, f"barrier {key[1]} ({expected} threads)", arrived=True)
        else:
            team = int(lanes[0]) // machine.team_lanes
            known = machine.clocks.release(team, lanes % machine.team_lanes)
            before = barrier.released
            barrier.released = latest(before, known)
            barrier.passers.append(lanes)
            machine.release(lanes)
        if barrier.arrived > expected:
            machine.stop(
                "barrier-count",
                f"{barrier.arrived} threads arrived at barrier {key[1]}, which expects {expected}",
                None,
            )
        if barrier.arrived == expected:
            del self.open[key]
            self._complete(barrier)

    def _complete(self, barrier: NamedBarrier) -> None:
        machine = self.machine
        machine.progress += 1
        if machine.counters is not None:
            machine.counters.barriers += 1
        if not barrier.waiting:
            return
        lanes = np.sort(np.concatenate(barrier.waiting))
        team = int(lanes[0]) // machine.team_lanes
        members = lanes % machine.team_lanes
        clocks = machine.clocks
        if barrier.released is not None:
            known = np.maximum(clocks.release(team, members), _fit(barrier.released, clocks))
            clocks.acquire(team, members, known)
        elif len(members) == machine.team_lanes:
            clocks.join_team(np.array([team]))
        else:
            clocks.join(team, members)
        machine.races.joined(lanes, barrier.passers)
        machine.thread_sync.meet(lanes, barrier.posted)
        self.results[lanes] = np.count_nonzero(self.votes[lanes])
        self.voters[lanes] = len(lanes)
        machine.release(lanes)


def _fit(known: np.ndarray, clocks) -> np.ndarray:
    """Engines that were added since know nothing earlier."""
    return np.pad(known, (0, clocks.known.shape[2] - len(known)))


@dataclass
class _ClusterPhase:
    number: int = 0
    known: np.ndarray | None = None
    done: np.ndarray | None = None
    abroad: Knowledge = field(default_factory=dict)
    abroad_done: Knowledge = field(default_factory=dict)
    posted: np.ndarray | None = None
    posted_done: np.ndarray | None = None


class ClusterBarriers:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.arrivals, self.passed = np.zeros((2, machine.lane_count), np.int64)
        self.phases = [_ClusterPhase() for _ in range(machine.layout.teams)]

    def arrive(self, lanes: np.ndarray, release: bool) -> None:
        machine = self.machine
        teams, members = machine.team_of(lanes)
        if (self.arrivals[lanes] > [self.phases[t].number for t in teams]).any():
            machine.stop("barrier", "barrier.cluster.arrive twice without a wait", None)
        self.arrivals[lanes] += 1
        for team in np.unique(teams).tolist():
            phase = self.phases[team]
            phase.posted = machine.thread_sync.arrive(lanes[teams == team], phase.posted)
            if release:
                known = machine.clocks.release(team, members[teams == team])
                if phase.known is not None:
                    known = np.maximum(_fit(phase.known, machine.clocks), known)
                phase.known = known
                seen = machine.races.known_to(lanes[teams == team])
                phase.abroad = merged(phase.abroad, seen)
            self.update(team)

    def update(self, team: int) -> None:
        """Complete the phase when every non-exited thread has arrived."""
        machine, phase = self.machine, self.phases[team]
        lanes = np.arange(team * machine.team_lanes, (team + 1) * machine.team_lanes)
        live = lanes[machine.status[lanes] != EXITED]
        if len(live) and (self.arrivals[live] > phase.number).all():
            phase.number += 1
            phase.done, phase.known = phase.known, None
            phase.posted_done, phase.posted = phase.posted, None
            phase.abroad_done, phase.abroad = phase.abroad, {}
            machine.progress += 1
            if machine.counters is not None:
                machine.counters.barriers += 1
            machine.retry(live)

    def wait(self, lanes: np.ndarray, acquire: bool) -> None:
        """Release the lanes whose phase is complete, block the others."""
        machine = self.machine
        teams, members = machine.team_of(lanes)
        for team in np.unique(teams).tolist():
            here = teams == team
            phase = self.phases[team]
            done = here & (self.arrivals[lanes] <= phase.number)
            if done.any():
                if acquire and phase.done is not None:
                    known = _fit(phase.done, machine.clocks)
                    machine.clocks.acquire(team, members[done], known)
                    machine.races.learn(lanes[done], phase.abroad_done)
                machine.thread_sync.meet(lanes[done], phase.posted_done)
                self.passed[lanes[done]] = self.arrivals[lanes[done]]
                machine.release(lanes[done])
            machine.block(lanes[here & ~done], "barrier.cluster")

    def start(self, team: int) -> None:
        self.phases[team] = _ClusterPhase()
        begin = team * self.machine.team_lanes
        self.arrivals[begin : begin + self.machine.team_lanes] = 0
        self.passed[begin : begin + self.machine.team_lanes] = 0
