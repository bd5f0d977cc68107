"""`python -m benchmarks --compare A.json B.json`: which cells changed, and by how much.

The two runs were made at different times, so every cell is compared by its ratio to the base of its
own run, from which the noise of the hour drops out: in the layer suite the frozen layer (the tax),
in every other suite the provider that its records name as `base`. A change is significant when the
bootstrap intervals (95 %) of the two medians do not overlap and the medians differ by more than a
cell repeats to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.providers import FROZEN
from benchmarks.record import Record, Results, SuiteRecord
from benchmarks.summary import NOISE
from benchmarks.timing import Interval, bootstrap

LAYER_SUITE = "layer"


class Cell(NamedTuple):
    """What is the same in both runs. sizes: in words, such as "M=512 R=16"."""

    suite: str
    item: str
    dtype: str
    sizes: str
    pass_: str
    provider: str


@dataclass(frozen=True)
class Change:
    """One cell of both runs: its ratio before and after."""

    cell: Cell
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
    old, new = ratios_of(before), ratios_of(after)
    found = [Change(c, bootstrap(old[c]), bootstrap(new[c])) for c in old if c in new]
    if not found:
        raise ValueError("the two files have no timed case in common")
    return sorted(found, key=lambda change: -change.ratio)


def ratios_of(results: Results) -> dict[Cell, list[float]]:
    """Time ÷ time of the cell's base, round by round, of every cell but the bases themselves."""
    return {**_taxes(results.records), **_ratios_of_suites(results.suites)}


def _taxes(records: Iterable[Record]) -> dict[Cell, list[float]]:
    timed = [r for r in records if r.timed]
    frozen = {(*r.case_key, r.pass_): r.samples_us for r in timed if r.provider == FROZEN}
    found = {}
    for r in timed:
        base = frozen.get((*r.case_key, r.pass_))
        if r.provider != FROZEN and base is not None:
            sizes = f"M={r.M} R={r.R}" + (f" p={r.dropout:g}" if r.dropout else "")
            cell = Cell(LAYER_SUITE, r.layer_key, r.dtype, sizes, r.pass_, r.provider)
            found[cell] = _paired(r.samples_us, base)
    return found


def _ratios_of_suites(records: Iterable[SuiteRecord]) -> dict[Cell, list[float]]:
    timed = {_cell_of(r): r for r in records if r.timed}
    found = {}
    for cell, r in timed.items():
        base = timed.get(cell._replace(provider=r.base))
        # A base elsewhere, such as another item's, was not timed in the same rounds.
        if r.provider != r.base and base and len(base.samples_us) == len(r.samples_us):
            found[cell] = _paired(r.samples_us, base.samples_us)
    return found


def _cell_of(r: SuiteRecord) -> Cell:
    sizes = " ".join(f"{name}={size}" for name, size in r.shape.items())
    return Cell(r.suite, r.item, r.dtype, sizes, r.pass_, r.provider)


def _paired(samples: Sequence[float], base: Sequence[float]) -> list[float]:
    return [s / b for s, b in zip(samples, base, strict=True)]


def show(console: Console, changes: Sequence[Change]) -> None:
    """A table of the significant changes, and how many cells there were, suite by suite."""
    table = Table(
        title="time relative to the base of the same run: median [95 % interval]",
        box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("cell")
    for heading in ("provider", "before", "after"):
        table.add_column(heading, no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    significant = [change for change in changes if change.significant]
    for change in significant:
        colour = "red" if change.ratio > 1 else "green"
        *cell, provider = change.cell
        before, after = (str(i).replace(" ", "\n", 1) for i in (change.before, change.after))
        table.add_row(" ".join(cell), provider, before, after, f"[{colour}]{change.ratio:.3f}")
    if significant:
        console.print(table)
    for suite in dict.fromkeys(change.cell.suite for change in changes):
        own = [change for change in changes if change.cell.suite == suite]
        changed = [change for change in own if change.significant]
        slower = sum(change.ratio > 1 for change in changed)
        console.print(
            f"{suite}: {len(own)} cells in both: {slower} slower, {len(changed) - slower} faster, "
            f"{len(own) - len(changed)} without a significant change",
            highlight=False,
        )
