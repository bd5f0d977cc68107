"""Which kernels the tests executed in the emulator, and for which target: what passed is kept.

A line for each kernel of a passed test under build/cuda-tests/cases, with the state of the sources
it belongs to. Tests of seeded faults do not count: they pass when the kernel does not.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from tests.ptx_emulator import launch

from .compile import ROOT

CASES = Path("build") / "cuda-tests" / "cases"
_FAULTS = ("fault", "caught", "change", "mutant")


@cache
def sources(root: Path = ROOT) -> str:
    """A hash of everything that the kernels are made of."""
    files = sorted(p for p in (root / "csrc").rglob("*") if p.suffix in (".cu", ".cuh", ".h"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def noted() -> Iterator[set[tuple[str, str]]]:
    """The (kernel, target) that the emulator runs meanwhile."""
    seen: set[tuple[str, str]] = set()
    prepare = launch._prepare

    def noting(*arguments, **options):
        machine, buffers = prepare(*arguments, **options)
        seen.add((machine.kernel.name, machine.module.target))
        return machine, buffers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_prepare", noting)
        yield seen


def keep(test: str, kernels: set[tuple[str, str]], root: Path = ROOT) -> None:
    """Remember that a test passed, and what it ran."""
    ours = sorted(pair for pair in kernels if pair[0].startswith("lora_"))
    if not ours or any(word in test for word in _FAULTS):
        return
    folder = root / CASES
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{sources(root)}\t{kernel}\t{target}\t{test}\n" for kernel, target in ours]
    with (folder / f"{os.getpid()}.txt").open("a") as file:
        file.writelines(lines)


def counts(root: Path = ROOT) -> Counter[tuple[str, str]]:
    """How many tests of the present sources passed, by kernel and target."""
    current = sources(root)
    lines = {
        line for file in (root / CASES).glob("*.txt") for line in file.read_text().splitlines()
    }
    parts = [line.split("\t") for line in lines]
    return Counter((kernel, target) for state, kernel, target, _ in parts if state == current)
