"""Helpers for tests that run compiled kernels: torch tensors as buffers, schedules, fixtures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
import torch

from .report import Report
from .schedule import EVERY_SCHEDULE, Schedule
from .syntax import Module, parse

FIXTURES = Path(__file__).parent / "kernels" / "ptx"
_STORAGE = {1: torch.uint8, 2: torch.uint16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous tensor's memory as numpy; shares storage, so kernels write into the tensor."""
    if not tensor.is_contiguous():
        raise ValueError("buffers must be contiguous")
    return tensor.view(_STORAGE[tensor.element_size()]).numpy()


@cache
def fixture(name: str) -> str:
    return (FIXTURES / f"{name}.ptx").read_text()


@cache
def module(name: str) -> Module:
    return parse(fixture(name))


def with_fault(text: str, pattern: str, nth: int, new: str, start: int = 0, end: int = -1) -> str:
    """The text with the `nth` match of `pattern` in [start, end) replaced; `.` fits newlines."""
    stop = end if end >= 0 else len(text)
    match = list(re.compile(pattern, re.S).finditer(text, start, stop))[nth]
    return text[: match.start()] + match.expand(new) + text[match.end() :]


def launch_of(text: str) -> tuple[int, int]:
    """Dynamic shared bytes and threads that a Triton fixture needs."""
    shared = re.search(r"// shared (\d+) warps", text)
    threads = re.search(r"\.reqntid (\d+)", text)
    if shared is None or threads is None:
        raise ValueError("not a Triton fixture")
    return int(shared[1]), int(threads[1])


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float((got.double() - truth.double()).abs().max() / truth.double().abs().max())


def on_schedules(
    run_case: Callable[[Schedule], tuple[Report, torch.Tensor]],
    schedules: Iterable[Schedule] = EVERY_SCHEDULE,
) -> torch.Tensor:
    """Run under every schedule: no findings, and the same bits each time."""
    first = None
    for schedule in schedules:
        report, result = run_case(schedule)
        report.check()
        if first is None:
            first = result
        if not torch.equal(first.view(torch.uint8), result.view(torch.uint8)):
            raise AssertionError(f"{report.kernel}: another result under schedule {schedule}")
    assert first is not None
    return first
