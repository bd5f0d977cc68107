"""Matrix operands that the tensor cores of sm_90 and sm_100 read from shared memory."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from .layouts import IllegalOperand, element_bytes
from .memory import INITIALISED
from .smem_operand import SmemDescriptor, operand_addresses

if TYPE_CHECKING:
    from .machine import Machine


@lru_cache(maxsize=4096)
def _tile(descriptor: SmemDescriptor, rows: int, k: int, kind: str, mn_major: bool, shift: int):
    """Element addresses [rows, k] inside the window, and the granules they touch."""
    at = operand_addresses(descriptor, rows, k, kind, mn_major)
    return at // element_bytes(kind), np.unique(at >> shift)


class OperandTile:
    """One operand of one matrix instruction: A or B in the shared memory of a block."""

    def __init__(
        self,
        machine: Machine,
        slot: int,
        descriptor: SmemDescriptor,
        rows: int,
        k: int,
        kind: str,
        mn_major: bool,
    ) -> None:
        self.machine = machine
        shift = machine.shared_races.shift
        try:
            elements, cells = _tile(descriptor, rows, k, kind, mn_major, shift)
        except IllegalOperand as error:
            machine.stop("descriptor", str(error), None)
            raise
        window = slot * machine.shared.stride
        self.unit = element_bytes(kind)
        self.elements = elements + window // self.unit
        self.cells = cells + (window >> shift)
        last = (slot + 1) * machine.shared.stride // self.unit
        if elements.min() < 0 or self.elements.max() >= last:
            machine.stop("out-of-bounds", "matrix descriptor leaves shared memory", None)

    def issue(self, lane: int, column: int, tick: int) -> None:
        """The tensor core starts reading the tile."""
        self.machine.shared_races.engine_load(lane, self.cells, column, tick, "tensor core read")

    def read(self) -> np.ndarray:
        """Element bits [rows, k]."""
        shared = self.machine.shared
        states = shared.states[self.unit][self.elements]
        written = states & states.dtype.type(INITIALISED)
        if not written.all():
            at = int(self.elements[written == 0][0]) * self.unit
            kind = "uninitialised" if shared.state[at] else "out-of-bounds"
            self.machine.find(kind, f"matrix operand, {shared.describe(at)}", None)
        return shared.values[self.unit][self.elements]
