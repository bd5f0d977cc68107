"""What the terminal shows of the suites, and where ours lost to the best of the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.providers import FROZEN, OURS
from benchmarks.record import ERROR, NOT_SERVED, OK, WRONG, SuiteRecord
from benchmarks.suites.training import FULL
from benchmarks.summary import NOISE
from benchmarks.table import human_bytes
from benchmarks.timing import Interval, paired_interval

_STATUS_WORDS = {
    WRONG: "[bold red]WRONG[/]", ERROR: "[bold red]ERROR[/]", NOT_SERVED: "[yellow]Not served:[/]",
}  # fmt: skip
NOT_RIVALS = (FROZEN, FULL)  # they compute something else
FORCED = ("ours-cpu-", "ours-cuda", "ours-triton")  # not what the library would choose


@dataclass(frozen=True)
class Loss:
    """One of our records beside the fastest rival of the same item and pass."""

    record: SuiteRecord
    rival: str
    ratio: Interval


def print_suites(console: Console, records: Sequence[SuiteRecord]) -> None:
    """A table per suite, dtype and pass; then what failed, and where ours is not the fastest."""
    for suite in dict.fromkeys(r.suite for r in records):
        own = [r for r in records if r.suite == suite]
        for dtype, pass_ in dict.fromkeys((r.dtype, r.pass_) for r in own):
            part = [r for r in own if (r.dtype, r.pass_) == (dtype, pass_) and r.status == OK]
            if part:
                _print_table(console, suite, dtype, pass_, part)
        for line in dict.fromkeys(
            f"{_STATUS_WORDS[r.status]} {r.provider} on {suite}: {row_of(r)} {r.dtype}: {r.message}"
            for r in own
            if r.status != OK
        ):
            console.print(line, highlight=False)
    _print_losses(console, records)


def row_of(record: SuiteRecord) -> str:
    return " ".join([record.item, *(f"{name}={n}" for name, n in record.shape.items())])


def losses(records: Sequence[SuiteRecord]) -> list[Loss]:
    """The dispatcher's choice (`ours`, `ours-fp32`, …) against the best of the others, worst first.

    Only beyond noise, and only where the interval of the ratio is above 1. What is compiled is
    compared with what is compiled, fp32 adapters with fp32 adapters.
    """
    cells: dict[tuple[object, ...], dict[str, SuiteRecord]] = defaultdict(dict)
    for r in records:
        if r.timed:
            cells[r.suite, row_of(r), r.dtype, r.pass_][r.provider] = r
    found = []
    for cell in cells.values():
        for name, record in cell.items():
            rivals = [cell[n] for n in cell if _competes(n, name)]
            if rivals:
                best = min(rivals, key=lambda r: r.median_us or 0.0)
                ratio = paired_interval(record.samples_us, best.samples_us)
                if ratio.median > NOISE and ratio.low > 1:
                    found.append(Loss(record, best.provider, ratio))
    return sorted(found, key=lambda loss: -loss.ratio.median)


def _is_ours(provider: str) -> bool:
    return provider.removeprefix("compile-").startswith(OURS) and not provider.startswith(FORCED)


def _competes(rival: str, ours: str) -> bool:
    if not _is_ours(ours):
        return False
    bare = rival.removeprefix("compile-").removesuffix("-fp32")
    same_kind = rival.startswith("compile-") == ours.startswith("compile-")
    same_adapters = rival.endswith("-fp32") == ours.endswith("-fp32")
    return same_kind and same_adapters and bare not in NOT_RIVALS and not bare.startswith(OURS)


def _print_table(
    console: Console, suite: str, dtype: str, pass_: str, part: Sequence[SuiteRecord]
) -> None:
    unit, cell = _cells_of(suite, part)
    console.print(f"\n[bold]{suite}, {dtype}, {pass_}[/]: {unit}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = list(dict.fromkeys(r.provider for r in part))
    table.add_column("item", overflow="fold")
    for name in names:
        style = "bold" if name.startswith(OURS) else ""
        table.add_column(name, justify="right", style=style, overflow="fold")
    by_row: dict[str, dict[str, SuiteRecord]] = defaultdict(dict)
    for r in part:
        by_row[row_of(r)][r.provider] = r
    for row, cells in by_row.items():
        table.add_row(row, *(cell(cells[name]) if name in cells else "-" for name in names))
    console.print(table)


def _cells_of(suite: str, part: Sequence[SuiteRecord]) -> tuple[str, Callable[[SuiteRecord], str]]:
    """What the cells of a table are, in words, and how one is made."""
    if not any(r.timed for r in part):
        return "peak memory above inputs and parameters: allocator / resident", _peaks
    if suite == "overhead":
        return "µs per call", lambda r: f"{r.median_us:.1f}"
    bases = ", ".join(dict.fromkeys(r.base for r in part))
    roofs = any(r.roof_percent is not None for r in part)
    unit = f"time ÷ {bases}" + (", % of roof" if roofs else "") + "; the base in µs"
    return unit, _ratio


def _peaks(r: SuiteRecord) -> str:
    known = [value for value in (r.peak_bytes, r.resident_bytes) if value is not None]
    return " / ".join(map(human_bytes, known)) or "-"


def _ratio(r: SuiteRecord) -> str:
    if not r.timed:
        return "-"
    value = f"{r.median_us:.1f} µs" if r.provider == r.base else f"{r.ratio:.2f}"
    return value if r.roof_percent is None else f"{value} {r.roof_percent:.0f}%"


def _print_losses(console: Console, records: Sequence[SuiteRecord], most: int = 12) -> None:
    found = losses(records)
    checked = sum(r.timed and _is_ours(r.provider) for r in records)
    if not checked:
        return
    console.print(
        f"Ours more than {NOISE - 1:.0%} slower than the best other: {len(found)} of {checked}",
        highlight=False,
    )
    for loss in found[:most]:
        r = loss.record
        console.print(
            f"  {loss.ratio} of {loss.rival}: {r.provider} on {r.suite}: {row_of(r)} {r.dtype} "
            f"{r.pass_}",
            highlight=False,
        )
