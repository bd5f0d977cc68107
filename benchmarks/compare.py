"""`python -m benchmarks --compare A.json B.json`: which cells changed, and by how much.

The two runs were made at different times, so every cell is compared by its ratio to the frozen
layer of its own run (the tax), from which the noise of the hour drops out. A change is significant
when the bootstrap intervals (95 %) of the two medians do not overlap and the medians differ by more
than a cell repeats to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.providers import FROZEN
from benchmarks.record import Record, Results
from benchmarks.summary import NOISE
from benchmarks.timing import Interval, bootstrap


@dataclass(frozen=True)
class Change:
    """One cell of both runs: tax before and after."""

    key: tuple[object, ...]
    before: Interval
    after: Interval

    @property
    def ratio(self) -> float:
        return self.after.median / self.before.median

    @property
    def significant(self) -> bool:
        apart = self.after.low > self.before.high or self.after.high < self.before.low
        return apart and not 1 / NOISE <= self.ratio <= NOISE


def compare(before: Results, after: Results) -> list[Change]:
    """The cells that both runs timed, the worst change first; ValueError if there is none."""
    old, new = taxes(before.records), taxes(after.records)
    found = [Change(k, bootstrap(old[k]), bootstrap(new[k])) for k in old if k in new]
    if not found:
        raise ValueError("the two files have no timed case in common")
    return sorted(found, key=lambda change: -change.ratio)


def taxes(records: Iterable[Record]) -> dict[tuple[object, ...], list[float]]:
    """{(provider, case, dropout, pass): time ÷ time of the frozen layer, round by round}."""
    timed = [r for r in records if r.timed]
    frozen = {(*r.case_key, r.pass_): r.samples_us for r in timed if r.provider == FROZEN}
    found: dict[tuple[object, ...], list[float]] = {}
    for r in timed:
        base = frozen.get((*r.case_key, r.pass_))
        if r.provider != FROZEN and base is not None:
            ratios = [s / b for s, b in zip(r.samples_us, base, strict=True)]
            key = (r.provider, *r.case_key, r.dropout, r.pass_)
            found[key] = ratios
    return found


def show(console: Console, changes: Sequence[Change]) -> None:
    """A table of the significant changes, and how many cells there were."""
    table = Table(title="time relative to the frozen layer: median [95 % interval]")
    for heading in ("provider", "layer", "dtype", "M", "r", "dropout", "pass", "before", "after"):
        table.add_column(heading)
    table.add_column("ratio", justify="right")
    significant = [change for change in changes if change.significant]
    for change in significant:
        colour = "red" if change.ratio > 1 else "green"
        cells = [str(part) for part in change.key]
        table.add_row(
            *cells, str(change.before), str(change.after), f"[{colour}]{change.ratio:.3f}"
        )
    if significant:
        console.print(table)
    slower = sum(change.ratio > 1 for change in significant)
    console.print(
        f"{len(changes)} cells in both: {slower} slower, {len(significant) - slower} faster, "
        f"{len(changes) - len(significant)} without a significant change",
        highlight=False,
    )
