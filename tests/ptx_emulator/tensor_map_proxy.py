"""Tensor maps that a kernel edits in global memory, and the fence that makes an edit visible.

The tensormap proxy reads maps ("Proxies" in the ISA): after a map was changed through the generic
proxy, a thread needs `fence.proxy.tensormap::generic.acquire` on its 128 bytes before it names the
map in a copy. Edits known here: `tensormap.replace` in global memory and `tensormap.cp_fenceproxy`
(which is the release side itself). As with the other proxy fences, one by any thread of the block
that names the map will do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .addresses import Resolver
from .decode import Operation
from .instruction import Instruction
from .registers import Group, memory_operand
from .report import UnknownInstruction

if TYPE_CHECKING:
    from .machine import Machine

MAP_BYTES = 128


class TensorMapProxy:
    """How often each map in global memory was edited, and which edit each block has acquired."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.edits: dict[int, int] = {}
        self.acquired: dict[tuple[int, int], int] = {}

    def edited(self, at: int) -> None:
        self.edits[at] = self.edits.get(at, 0) + 1

    def acquire(self, lanes: np.ndarray, at: np.ndarray) -> None:
        blocks = self.machine.layout.lane_block[lanes]
        for block, offset in zip(blocks.tolist(), at.tolist(), strict=True):
            self.acquired[block, offset] = self.edits.get(offset, 0)

    def check(self, lane: int, at: int) -> None:
        """`lane` names the map at global offset `at` in a copy."""
        edits = self.edits.get(at, 0)
        block = int(self.machine.layout.lane_block[lane])
        if edits > self.acquired.get((block, at), 0):
            self.machine.find(
                "missing-proxy-fence",
                "the tensor map was edited, and no thread of the block has executed "
                "fence.proxy.tensormap::generic.acquire since",
                None,
            )


def acquire_map(machine: Machine, ins: Instruction) -> Operation:
    """fence.proxy.tensormap::generic.acquire.scope [address], 128"""
    where = Resolver(machine, ins, memory_operand(ins, 0), "")
    if getattr(ins.operands[1], "value", None) != MAP_BYTES:
        raise UnknownInstruction(ins, "the size is 128")

    def run(group: Group) -> None:
        space, at = where(group)
        if space is machine.memory:
            machine.tensor_map_proxy.acquire(group.lanes, at)

    return run
