"""`python -m benchmarks --gpu-report`: everything about this GPU in one JSON and one HTML file.

Each part runs in a process of its own, with a limit of time: a kernel that crashes or hangs costs
its part and not the report. Parts: `python -m lora_fused doctor` (every kernel against torch), then
the layers of `shapes.gpu_cases`, one dtype after the other.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.goals import goal_rows
from benchmarks.record import Results
from benchmarks.report import write_report
from benchmarks.shapes import DTYPES
from benchmarks.table import print_results

DOCTOR_SECONDS = 240
LAYER_SECONDS = {"bf16": 360, "fp16": 90, "fp32": 90}
_GRACE_SECONDS = 60


@dataclass(frozen=True)
class Part:
    """One process: what it is called, how it is started, and the file that it leaves, if any."""

    name: str
    command: tuple[str, ...]
    seconds: float
    result: Path | None = None


def parts(device: str, folder: Path) -> list[Part]:
    """The parts of a report on `device`; 15 minutes at most, all together."""
    python = (sys.executable, "-m")
    found = [Part("doctor", (*python, "lora_fused", "doctor"), DOCTOR_SECONDS)]
    for dtype in DTYPES:
        result, seconds = folder / f"{dtype}.json", LAYER_SECONDS[dtype]
        command = (
            *python, "benchmarks", "--device", device, "--dtype", dtype, "--no-memory",
            "--budget", str(seconds - _GRACE_SECONDS), "--json", str(result),
        )  # fmt: skip
        found.append(Part(f"layers {dtype}", command, seconds, result))
    return found


def run_parts(todo: Sequence[Part], console: Console) -> tuple[dict[str, str], list[str]]:
    """Run them in turn: what each printed, and one sentence for each that failed."""
    printed, failed = {}, []
    for part in todo:
        console.print(f"{part.name} (at most {part.seconds:.0f} s)", highlight=False)
        try:
            done = subprocess.run(
                part.command, capture_output=True, text=True, timeout=part.seconds,
                cwd=Path(__file__).parent.parent, check=False,
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


def merged(todo: Sequence[Part], printed: dict[str, str], failed: list[str]) -> Results | None:
    """One result of all parts that left one, however they ended; None if none did."""
    found = [Results.load(p.result) for p in todo if p.result is not None and p.result.exists()]
    if not found:
        return None
    whole = found[0]
    for other in found[1:]:
        whole.records += other.records
        whole.skipped += other.skipped
    whole.skipped += failed
    whole.settings["mode"] = "gpu-report"
    whole.machine["doctor"] = printed.get("doctor", "").splitlines()
    return whole


def main(device: str, json_path: Path, html_path: Path, console: Console) -> int:
    """Make the report; the exit status is 1 if nothing could be measured."""
    with tempfile.TemporaryDirectory() as folder:
        todo = parts(device, Path(folder))
        printed, failed = run_parts(todo, console)
        results = merged(todo, printed, failed)
    console.print(printed.get("doctor", ""), highlight=False)
    if results is None:
        console.print("[red]nothing was measured:[/] " + "; ".join(failed), highlight=False)
        return 1
    results.save(json_path)
    goals = goal_rows(results)
    print_results(console, results, goals)
    write_report(results, goals, html_path)
    for sentence in failed:
        console.print(f"[red]failed: {sentence}", highlight=False)
    console.print(f"{html_path}  (open it in a browser)\n{json_path}  (the file to send)")
    return 0
