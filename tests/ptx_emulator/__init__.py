"""Runs the PTX that compilers emit, on a CPU, with every check that a GPU does not make.

from tests.ptx_emulator import run
run(ptx, "my_kernel", grid=4, block=128, args=[x, y, 1000]).check()
"""

from .launch import Offset, Struct, TensorMap, Uninitialised, run
from .report import Counters, Finding, Report, UnknownInstruction
from .schedule import EVERY_SCHEDULE, TOGETHER, Schedule
from .syntax import parse

__all__ = [
    "EVERY_SCHEDULE",
    "TOGETHER",
    "Counters",
    "Finding",
    "Offset",
    "Report",
    "Schedule",
    "Struct",
    "TensorMap",
    "Uninitialised",
    "UnknownInstruction",
    "parse",
    "run",
]
