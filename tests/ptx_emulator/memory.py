"""Byte-addressed memory with a state for every byte.

All windows of one state space live in one flat array: global memory is an arena of buffers
between guard zones, shared memory has one window per resident block, local memory one per lane.
Addresses that an instruction computes are turned into offsets of this array (`addresses.py`);
here an access is checked, gathered or scattered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .ptx_types import RAW

if TYPE_CHECKING:
    from .machine import Machine

ALLOCATED = 1
INITIALISED = 2
_READABLE = {
    size: raw.type(int.from_bytes(bytes([ALLOCATED | INITIALISED]) * size, "little"))
    for size, raw in RAW.items()
}
_WRITABLE = {
    size: raw.type(int.from_bytes(bytes([ALLOCATED]) * size, "little")) for size, raw in RAW.items()
}


class Space:
    """One state space as a flat array of bytes and their states."""

    def __init__(self, machine: Machine, name: str, size: int) -> None:
        size = (size + 63) // 64 * 64
        self.machine = machine
        self.name = name
        self.size = size
        self.data = np.zeros(size, np.uint8)
        self.state = np.zeros(size, np.uint8)
        self.values = {width: self.data.view(raw) for width, raw in RAW.items()}
        self.states = {width: self.state.view(raw) for width, raw in RAW.items()}

    def allocate(self, start: int, size: int, initialised: bool = False) -> None:
        state = ALLOCATED | (INITIALISED if initialised else 0)
        self.state[start : start + size] = state

    def load(self, at: np.ndarray, size: int, unit: int) -> np.ndarray:
        """Values [n, size // unit] of `size` bytes at each offset, as unsigned units."""
        self.check(at, size, "load")
        if size == unit:
            return self.values[unit][at >> _LOG[unit]][:, None]
        return self.values[unit][(at >> _LOG[unit])[:, None] + _COUNT[size // unit]]

    def store(self, at: np.ndarray, values: np.ndarray) -> None:
        """Write values [n, k]; each lane writes k consecutive units."""
        unit = values.dtype.itemsize
        count = values.shape[1]
        self.check(at, unit * count, "store")
        index = at >> _LOG[unit]
        if count == 1:
            self.values[unit][index] = values[:, 0]
        else:
            self.values[unit][index[:, None] + _COUNT[count]] = values
        self.mark_initialised(at, unit * count)

    def holds(self, at: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Which rows of `values` [n, k] memory contains already."""
        unit = values.dtype.itemsize
        index = (at >> _LOG[unit])[:, None] + np.arange(values.shape[1])
        index = np.clip(index, 0, len(self.values[unit]) - 1)
        return (self.values[unit][index] == values).all(axis=1)

    def mark_initialised(self, at: np.ndarray, size: int) -> None:
        unit = min(size, 8)
        index = at >> _LOG[unit]
        full = _READABLE[unit]
        if size > unit:
            self.states[unit][index[:, None] + _COUNT[size // unit]] = full
        else:
            self.states[unit][index] = full

    def check(self, at: np.ndarray, size: int, access: str) -> None:
        """Alignment, bounds, and for loads initialisation."""
        bad = (at & (size - 1)) != 0
        if bad.any():
            self._stop("misaligned", f"{size}-byte {access} of", at, bad)
        bad = (at < 0) | (at > self.size - size)
        if bad.any():
            self._stop("out-of-bounds", f"{size}-byte {access} outside", at, bad)
        unit = min(size, 8)
        index = at >> _LOG[unit]
        if size > unit:
            index = index[:, None] + _COUNT[size // unit]
        states = self.states[unit][index]
        if access == "load":
            bad = states != _READABLE[unit]
            if bad.any():
                self._unreadable(at, states, bad, size)
        else:
            bad = (states & _WRITABLE[unit]) != _WRITABLE[unit]
            if bad.any():
                self._stop("out-of-bounds", f"{size}-byte {access} outside", at, _rows(bad))

    def _unreadable(self, at: np.ndarray, states: np.ndarray, bad: np.ndarray, size: int) -> None:
        unit = states.dtype.itemsize
        outside = bad & ((states & _WRITABLE[unit]) != _WRITABLE[unit])
        if outside.any():
            self._stop("out-of-bounds", f"{size}-byte load outside", at, _rows(outside))
        rows = _rows(bad)
        where = self.describe(int(at[rows][0]))
        self.machine.find(
            "uninitialised", f"{size}-byte load of bytes never written, {where}", rows
        )

    def _stop(self, kind: str, what: str, at: np.ndarray, bad: np.ndarray) -> None:
        where = self.describe(int(at[bad][0]))
        self.machine.stop(kind, f"{what} {self.name} memory, {where}", bad)

    def describe(self, at: int) -> str:
        return f"offset {at:#x}"


class GlobalSpace(Space):
    """Buffers between guard zones; `base` is the address of offset 0."""

    base = 0x7_0000_0000
    guard = 4096

    def __init__(self, machine: Machine, sizes: list[int]) -> None:
        self.starts: list[int] = []
        self.lengths = sizes
        end = self.guard
        for size in sizes:
            self.starts.append(end)
            end += (size + 255) // 256 * 256 + self.guard
        super().__init__(machine, "global", end)
        for start, size in zip(self.starts, sizes, strict=True):
            self.allocate(start, size)

    def describe(self, at: int) -> str:
        if not self.starts:
            return f"address {at + self.base:#x}"
        distance = [
            0 if start <= at < start + size else min(abs(at - start), abs(at - start - size + 1))
            for start, size in zip(self.starts, self.lengths, strict=True)
        ]
        nearest = int(np.argmin(distance))
        offset = at - self.starts[nearest]
        return f"byte {offset} of buffer {nearest} ({self.lengths[nearest]} bytes)"


class SharedSpace(Space):
    """One window of `stride` bytes per resident block; allocation starts at `start`."""

    start = 1024  # the system reserves the first KiB of the window on sm_90 and later
    guard = 1024

    def __init__(self, machine: Machine, windows: int, size: int) -> None:
        self.window = size
        self.stride = self.start + (size + 1023) // 1024 * 1024 + self.guard
        super().__init__(machine, "shared", self.stride * windows)
        for window in range(windows):
            self.clear(window)

    def clear(self, window: int) -> None:
        """A new block starts: allocated, nothing initialised."""
        begin = window * self.stride
        self.state[begin : begin + self.stride] = 0
        self.allocate(begin + self.start, self.window)

    def describe(self, at: int) -> str:
        inside = at % self.stride - self.start
        return f"byte {inside} of {self.window} (block slot {at // self.stride})"


def _rows(bad: np.ndarray) -> np.ndarray:
    return bad if bad.ndim == 1 else bad.any(axis=1)


_LOG = {1: 0, 2: 1, 4: 2, 8: 3, 16: 4}
_COUNT = {n: np.arange(n) for n in (1, 2, 4, 8, 16)}
