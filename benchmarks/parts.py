"""A run in parts, each a process of its own: one that crashes or hangs costs its part alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.record import Results

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Part:
    """One process: what it is called, how it is started, and the file that it leaves, if any.

    seconds: when it is ended; None: never.
    """

    name: str
    command: tuple[str, ...]
    seconds: float | None
    result: Path | None = None


def benchmarks_command(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "benchmarks", *arguments)


def run_parts(todo: Sequence[Part], console: Console) -> tuple[dict[str, str], list[str]]:
    """Run them in turn: what each printed, and one sentence for each that failed."""
    printed, failed = {}, []
    for part in todo:
        limit = "" if part.seconds is None else f" (at most {part.seconds:.0f} s)"
        console.print(f"{part.name}{limit}", highlight=False)
        try:
            done = subprocess.run(
                part.command, capture_output=True, text=True, timeout=part.seconds, cwd=ROOT,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            failed.append(f"{part.name} (not done after {part.seconds:.0f} s)")
            continue
        printed[part.name] = done.stdout
        if done.returncode:
            said = f"{done.stdout}\n{done.stderr}".strip().splitlines()
            failed.append(
                f"{part.name} (exit status {done.returncode}: {said[-1] if said else ''})"
            )
    return printed, failed


def merged(todo: Sequence[Part], failed: Sequence[str]) -> Results | None:
    """One result of all parts that left one, however they ended; None if none did."""
    found = [Results.load(p.result) for p in todo if p.result is not None and p.result.exists()]
    if not found:
        return None
    whole = found[0]
    for other in found[1:]:
        whole.records += other.records
        whole.memory += other.memory
        whole.suites += other.suites
        whole.skipped += other.skipped
        if "after" in other.machine:
            whole.machine["after"] = other.machine["after"]
    whole.skipped += failed
    return whole
