"""The machine's measured roofs, and how close each provider comes to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.providers import FROZEN
from benchmarks.record import Record, Results
from benchmarks.roofline import Roofs, percent_of, roofs_of
from benchmarks.shapes import DTYPES, FORWARD
from benchmarks.summary import GOAL_RANK, m_class
from benchmarks.table import in_order
from benchmarks.timing import geometric_mean


@dataclass(frozen=True)
class RoofRow:
    """The roofs for a dtype; fma_gflops of one core, None where it could not be measured."""

    dtype: str
    roofs: Roofs
    fma_gflops: float | None


@dataclass(frozen=True)
class PercentTable:
    """Geometric means of the per cent of the roof, forward, r <= 16, without dropout."""

    names: list[str]
    rows: list[tuple[str, str, list[str]]]


def roof_rows(results: Results) -> list[RoofRow]:
    """One per dtype whose roofs were measured."""
    peaks = results.machine["peak_gflops"]
    return [
        RoofRow(dtype, roofs, peaks.get(dtype))
        for dtype in DTYPES
        if (roofs := roofs_of(results.machine, dtype)) is not None
    ]


def percent_table(results: Results) -> PercentTable | None:
    """None where there are no roofs or no timed records."""
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in _chosen(results.records):
        percent = percent_of(results.machine, r, lora=r.provider != FROZEN)
        if percent is not None:
            found[r.dtype, m_class(r.M)][r.provider].append(percent)
    names = in_order(name for row in found.values() for name in row)
    rows = [
        (dtype, M, [f"{geometric_mean(row[n]):.0f}" if n in row else "-" for n in names])
        for (dtype, M), row in found.items()
    ]
    return PercentTable(names, rows) if rows else None


def _chosen(records: Sequence[Record]) -> list[Record]:
    own = [r for r in records if r.pass_ == FORWARD and not r.dropout and r.R <= GOAL_RANK]
    return sorted(own, key=lambda r: (DTYPES.index(r.dtype), r.M))
