"""Several suites after each other, in this process or each in one of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks.parts import Part, benchmarks_command, merged, run_parts
from benchmarks.progress import Progress
from benchmarks.record import Results
from benchmarks.run import Settings
from benchmarks.suites import SUITES
from benchmarks.suites.item import Request
from benchmarks.suites.runner import run_suite

LAYER, MEMORY, CLAIMS = "layer", "memory", "claims"
NAMES = (LAYER, *SUITES, CLAIMS)


def run_suites(
    names: Sequence[str],
    request: Request,
    settings: Settings,
    results: Results,
    console: Console | None,
    save_to: Path | None,
) -> None:
    """Adds the named suites to the results. The budget is that of each, by default its own."""
    for name in names:
        suite = SUITES[name]
        budget = settings.budget_s
        if budget is None and not request.full:
            budget = suite.quick_seconds
        progress = Progress(console, budget)
        run_suite(suite, request, replace(settings, budget_s=budget), results, progress, save_to)


def run_in_fresh_processes(
    names: Sequence[str], arguments: Sequence[str], console: Console
) -> Results | None:
    """Each suite by a command of its own with the same arguments; None if none left a result."""
    with tempfile.TemporaryDirectory() as folder:
        todo = [_part(name, arguments, Path(folder) / f"{name}.json") for name in names]
        _, failed = run_parts(todo, console)
        return merged(todo, failed)


def _part(name: str, arguments: Sequence[str], result: Path) -> Part:
    """NOTE: of options given twice the last one counts."""
    command = benchmarks_command(
        *arguments, "--suite", name, "--no-fresh-process", "--json", str(result), "--html",
        str(result.with_suffix(".html")),
    )  # fmt: skip
    return Part(name, command, None, result)
