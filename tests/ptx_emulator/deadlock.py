"""What to say when no lane can run: the state of every warp, and whether lanes went apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .states import EXITED

if TYPE_CHECKING:
    from .machine import Machine

_MOST_LINES = 12


def report_deadlock(machine: Machine) -> None:
    machine.group = None
    live = np.nonzero(machine.status != EXITED)[0]
    states: dict[tuple[int, int, str], list[int]] = {}
    for lane in live.tolist():
        place = lane // machine.block_lanes, int(machine.pc[lane]), machine.why(lane)
        states.setdefault(place, []).append(lane)
    lines = []
    for (slot, order, why), lanes in states.items():
        ins = machine.program.blocks[order].instructions[0]
        block = int(machine.layout.lane_block[slot * machine.block_lanes])
        warps = sorted({lane % machine.block_lanes // 32 for lane in lanes})
        lines.append(
            f"block {block}: {len(lanes)} lanes of warps {warps} at line {ins.line} {ins.source}"
            f" ({ins.text}) wait for {why}"
        )
    machine.at = machine.program.blocks[int(machine.pc[live[0]])].instructions[0]
    kind = "divergence" if _diverged(machine, live) else "deadlock"
    machine.stop(kind, "no lane can run\n      " + "\n      ".join(lines[:_MOST_LINES]), None)


def _diverged(machine: Machine, live: np.ndarray) -> bool:
    """Lanes of one warp wait for each other at different places."""
    places: dict[int, set[int]] = {}
    for lane in live.tolist():
        if "lanes of its warp" in machine.why(lane):
            places.setdefault(lane // 32, set()).add(int(machine.pc[lane]))
    return any(len(at) > 1 for at in places.values())
