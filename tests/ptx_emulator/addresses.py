"""Addresses to offsets in the flat arrays of the state spaces ("State Spaces")."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .instruction import Instruction, Memory, Reg, Symbol
from .memory import Space
from .placement import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW_SIZE, symbol_space
from .registers import Group
from .report import UnknownInstruction

if TYPE_CHECKING:
    from .machine import Machine

RANK_SHIFT = 24  # shared::cluster addresses: (rank + 1) above the offset; 0 means the own block
_OFFSET_MASK = (1 << RANK_SHIFT) - 1


def address_source(machine: Machine, ins: Instruction, operand: Memory) -> Callable:
    """The address an operand names, before any translation, as int64 per lane."""
    base, offset = operand.base, operand.offset
    if isinstance(base, Symbol):
        address = machine.variable_address(ins, base.name) + offset
        return lambda group: np.full(group.n, address, np.int64)
    if not isinstance(base, Reg):
        value = base.value + offset
        return lambda group: np.full(group.n, value, np.int64)
    wide = machine.registers.registers[base.name].data.dtype.itemsize == 8
    get = machine.registers.source(ins, base, "s64" if wide else "u32")
    return lambda group: get(group).astype(np.int64) + offset


def shared_offsets(machine: Machine, lanes: np.ndarray, address: np.ndarray) -> np.ndarray:
    """Shared (or shared::cluster) addresses of `lanes` as offsets into the shared space."""
    rank = address >> RANK_SHIFT
    slot = machine.slots_of(lanes)
    if rank.any():
        size = machine.layout.cluster_size
        outside = (rank < 0) | (rank > size)
        if outside.any():
            machine.stop("out-of-bounds", f"shared address {int(address[outside][0]):#x}", None)
        slot = np.where(rank == 0, slot, slot // size * size + rank - 1)
        machine.check_running(slot)
        machine.visits.record(lanes, slot)
    offset = address & _OFFSET_MASK
    if (offset >= machine.shared.stride).any():
        bad = offset >= machine.shared.stride
        machine.stop("out-of-bounds", f"shared address {int(address[bad][0]):#x}", None)
    return slot * machine.shared.stride + offset


class Resolver:
    """The space and flat offset of a memory operand, for every lane of a group."""

    def __init__(self, machine: Machine, ins: Instruction, operand: Memory, space: str) -> None:
        self.machine, self.ins = machine, ins
        space = space.split("::")[0]
        named = symbol_space(machine.variables, operand)
        self.space = space or ("generic" if named in ("", "param") else named)
        if self.space in ("param", "generic") and named == "param":
            self.space = "param"
        if self.space == "param" and named == "local":  # arguments of a call
            self.space = "local"
        self.address = address_source(machine, ins, operand)
        if self.space not in ("global", "const", "shared", "local", "param", "generic"):
            raise UnknownInstruction(ins, f"state space {space}")

    def __call__(self, group: Group) -> tuple[Space, np.ndarray]:
        address = self.address(group)
        space = self.space
        if space == "generic":
            space, address = self._window(address)
        return self._flat(space, group, address)

    def _window(self, address: np.ndarray) -> tuple[str, np.ndarray]:
        windows = address // WINDOW_SIZE * WINDOW_SIZE
        first = int(windows[0])
        names = {SHARED_WINDOW: "shared", LOCAL_WINDOW: "local", PARAM_WINDOW: "param"}
        same = np.isin(windows, list(names))
        if not same.any():
            return "global", address
        if (windows != first).any():
            raise UnknownInstruction(self.ins, "lanes address different state spaces")
        return names[first], address - first

    def _flat(self, space: str, group: Group, address: np.ndarray) -> tuple[Space, np.ndarray]:
        machine = self.machine
        if space == "shared":
            return machine.shared, shared_offsets(machine, group.lanes, address)
        if space == "local":
            stride = machine.variables.local_stride
            if ((address < 0) | (address >= stride)).any():
                machine.stop("out-of-bounds", "access outside the thread's local memory", None)
            return machine.local, group.lanes * stride + address
        if space == "param":
            return machine.params, address
        return machine.memory, address - machine.memory.base
