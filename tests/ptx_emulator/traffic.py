"""Counters of memory traffic: bytes and 32-byte sectors in global memory, wavefronts in shared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .machine import Machine
    from .memory import Space

_SECTOR = 32
_BANKS = 32


class Traffic:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.touched: dict[str, set[int]] = {}

    def access(self, kind: str, space: Space, lanes: np.ndarray, at: np.ndarray, size: int) -> None:
        if space is self.machine.memory:
            self._global(kind, lanes, at, size)
        elif space is self.machine.shared:
            self.shared(lanes, at, size)

    def _global(self, kind: str, lanes: np.ndarray, at: np.ndarray, size: int) -> None:
        counters = self.machine.counters
        counters.global_bytes[kind] += len(at) * size
        buffers = np.searchsorted(self.machine.memory.starts, at, side="right") - 1
        for buffer, count in zip(*np.unique(buffers, return_counts=True), strict=True):
            counters.buffer_bytes[kind, int(buffer)] += int(count) * size
        warp = lanes >> 5
        first, last = at // _SECTOR, (at + size - 1) // _SECTOR
        pairs = np.concatenate([np.stack([warp, first]), np.stack([warp, last])], axis=1)
        counters.global_sectors[kind] += np.unique(pairs, axis=1).shape[1]
        before = self.touched.setdefault(kind, set())
        cells = np.unique((at[:, None] + np.arange(0, size, 4)) // 4)
        new = set(cells.tolist()) - before
        before |= new
        counters.compulsory_bytes[kind] += 4 * len(new)

    def shared(self, lanes: np.ndarray, at: np.ndarray, size: int) -> None:
        """One wavefront serves 128 bytes of distinct words, one word per bank.

        Accesses of 8 and 16 bytes are served in halves and quarters of a warp."""
        part = {8: 2, 16: 4}.get(size, 1)
        self._wavefronts((lanes >> 5) * part + (lanes & 31) * part // 32, at, size)

    def rows(self, lanes: np.ndarray, at: np.ndarray) -> None:
        """Eight 16-byte rows of a matrix are served together."""
        self._wavefronts(lanes >> 5, at, 16)

    def _wavefronts(self, slot: np.ndarray, at: np.ndarray, size: int) -> None:
        counters = self.machine.counters
        words = (at[:, None] + np.arange(0, max(size, 4), 4)) // 4
        pairs = np.stack([np.repeat(slot, words.shape[1]), words.ravel()])
        slots, words = np.unique(pairs, axis=1)
        banks = slots * _BANKS + words % _BANKS
        keys, counts = np.unique(banks, return_counts=True)
        _, start = np.unique(keys // _BANKS, return_index=True)
        worst = np.maximum.reduceat(counts, start)
        total = int(worst.sum())
        _, start = np.unique(slots, return_index=True)
        distinct = np.diff([*start, len(slots)])
        counters.shared_wavefronts += total
        counters.ideal_wavefronts += int((-(-distinct // _BANKS)).sum())
        counters.wavefronts_by_line[self.machine.at.line] += total
