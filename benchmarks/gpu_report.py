"""`python -m benchmarks --gpu-report`: everything about this GPU in one JSON and one HTML file.

Each part runs in a process of its own, with a limit of time: a kernel that crashes or hangs costs
its part and not the report. Parts: `python -m lora_fused doctor` (every kernel against torch), the
layers of `shapes.gpu_cases`, one dtype after the other, then every suite.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.goals import goal_rows
from benchmarks.parts import Part, benchmarks_command, merged, run_parts
from benchmarks.report import write_report
from benchmarks.shapes import DTYPES
from benchmarks.suites import SUITES
from benchmarks.suites.table import print_suites
from benchmarks.table import print_results

DOCTOR_SECONDS = 180
LAYER_SECONDS = {"bf16": 200, "fp16": 50, "fp32": 50}
SUITE_SECONDS = {
    "kernel": 60, "group": 60, "block": 50, "model": 60, "decode": 45, "memory": 60, "compile": 60,
    "overhead": 25,
}  # fmt: skip
_GRACE_SECONDS = 20
"""Between the last moment at which a case may start and the end of its part."""


def parts(device: str, folder: Path) -> list[Part]:
    """The parts of a report on `device`; 15 minutes at most, all together."""
    doctor = (sys.executable, "-m", "lora_fused", "doctor")
    found = [Part("doctor", doctor, DOCTOR_SECONDS)]
    for dtype in DTYPES:
        own = ("--dtype", dtype)
        found.append(_part(f"layers {dtype}", "layer", LAYER_SECONDS[dtype], device, folder, *own))
    for name in SUITES:
        found.append(_part(name, name, SUITE_SECONDS[name], device, folder))
    return found


def _part(name: str, suite: str, seconds: float, device: str, folder: Path, *more: str) -> Part:
    result = folder / f"{name.replace(' ', '-')}.json"
    command = benchmarks_command(
        "--suite", suite, "--device", device, "--no-memory", *more,
        "--budget", str(seconds - _GRACE_SECONDS), "--json", str(result),
    )  # fmt: skip
    return Part(name, command, seconds, result)


def main(device: str, json_path: Path, html_path: Path, console: Console) -> int:
    """Make the report; the exit status is 1 if nothing could be measured."""
    with tempfile.TemporaryDirectory() as folder:
        todo = parts(device, Path(folder))
        printed, failed = run_parts(todo, console)
        results = merged(todo, failed)
    console.print(printed.get("doctor", ""), highlight=False)
    if results is None:
        console.print("[red]nothing was measured:[/] " + "; ".join(failed), highlight=False)
        return 1
    results.settings |= {"mode": "gpu-report", "suites": ["layer", *SUITES]}
    results.machine["doctor"] = printed.get("doctor", "").splitlines()
    results.save(json_path)
    goals = goal_rows(results)
    print_results(console, results, goals)
    print_suites(console, results.suites)
    write_report(results, goals, html_path)
    for sentence in failed:
        console.print(f"[red]failed: {sentence}", highlight=False)
    console.print(f"{html_path}  (open it in a browser)\n{json_path}  (the file to send)")
    return 0
