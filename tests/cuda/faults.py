"""Seeded faults: a compiled kernel or its source is changed, and something must notice."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.ptx_emulator import EVERY_SCHEDULE, TOGETHER

from .compile import ROOT, ptx


class Fault(NamedTuple):
    """The nth match of `pattern` in the kernel becomes `new` (-1: all); one of `kinds` is found.

    Without kinds the fault shows in the numbers alone."""

    name: str
    pattern: str
    nth: int
    new: str
    kinds: set[str]


def changed_source(folder: Path, file: str, old: str, new: str, kernel: str, arch: str) -> str:
    """The PTX of `kernel`, source text beside `file`, with `old` in that file (below csrc/cuda)
    replaced by `new`."""
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("cpu"))
    changed = folder / "csrc/cuda" / file
    text = changed.read_text()
    assert old in text, old
    changed.write_text(text.replace(old, new))
    source = changed.parent / "mutant.cu"
    source.write_text(kernel)
    return ptx(source, arch)


def edited(fault: Fault) -> Callable[[str, str], str]:
    """The change as EmulatedGpu's `edit`; it touches one kernel only."""

    def edit(kernel: str, text: str) -> str:
        start = text.index(f".entry {kernel}(")
        end = text.find(".entry ", start + 1)
        end = len(text) if end < 0 else end
        body = text[start:end]
        matches = list(re.finditer(fault.pattern, body))
        assert len(matches) > max(fault.nth, 0), f"{kernel}: {len(matches)} of {fault.pattern}"
        for match in reversed(matches if fault.nth < 0 else [matches[fault.nth]]):
            body = body[: match.start()] + match.expand(fault.new) + body[match.end() :]
        return text[:start] + body + text[end:]

    return edit


def assert_caught(fault: Fault, once: Callable[[Any, Any], tuple[Any, torch.Tensor]]) -> None:
    """`once(edit, schedule)` runs the kernel: report and result."""
    _, right = once(None, TOGETHER)
    found: set[str] = set()
    for schedule in EVERY_SCHEDULE:
        report, got = once(edited(fault), schedule)
        found |= report.kinds()
        if not fault.kinds and not torch.equal(got, right):
            return
        if found & fault.kinds:
            return
    raise AssertionError(f"{fault.name}: found {found or 'nothing'}, expected {fault.kinds}")
