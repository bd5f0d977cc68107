"""Tensor memory of the resident blocks (sm_100)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .machine import Machine


class TensorMemory:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def finish(self, team: int) -> None:
        pass
