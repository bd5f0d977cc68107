"""What the report says of each suite other than the layers': one section, made from its records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.figures.panel import words
from benchmarks.figures.roofline import roofline_of_suite
from benchmarks.figures.suites import bytes_dots, common_sizes, in_words, ratio_dots, rows_of
from benchmarks.record import SuiteRecord
from benchmarks.summary import failures, in_order, remarks
from benchmarks.table import human_bytes, with_interval

ABOUT = {
    "kernel": "Each operation alone, against the machine's measured roofs.",
    "group": "Projections that share their input (q, k, v; gate, up), together.",
    "block": "A decoder block, full training step.",
    "model": "A small model, full training step.",
    "decode": "One new token per sequence.",
    "memory": "Memory of forward + backward above inputs and parameters, each in a fresh process, "
    "adapters in fp32. The allocator's peak is exact for tensors; the resident peak also sees what "
    "native code allocates for itself.",
    "compile": "The same layers under torch.compile.",
    "overhead": "Time of Python and dispatch per call, on a layer too small to matter.",
}


BYTES: tuple[tuple[str, Callable[[SuiteRecord], int | None]], ...] = (
    ("allocator's peak", lambda r: r.peak_bytes),
    ("left for backward", lambda r: r.held_bytes),
    ("resident peak", lambda r: r.resident_bytes),
)


@dataclass(frozen=True)
class SuiteTable:
    """Rows are items, columns providers."""

    title: str
    names: list[str]
    rows: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class SuiteSection:
    name: str
    about: str
    bases: list[str]
    figures: list[str]
    tables: list[SuiteTable]
    details: list[SuiteRecord]
    failures: list[SuiteRecord]
    remarks: dict[tuple[str, str], int]


def sections(records: Sequence[SuiteRecord], machine: Mapping[str, Any]) -> list[SuiteSection]:
    """One per suite, in the order of the records."""
    return [
        _section(name, [r for r in records if r.suite == name], machine)
        for name in dict.fromkeys(r.suite for r in records)
    ]


def _section(name: str, own: Sequence[SuiteRecord], machine: Mapping[str, Any]) -> SuiteSection:
    figures, tables = [], []
    for dtype, pass_ in dict.fromkeys((r.dtype, r.pass_) for r in own):
        part = [r for r in own if (r.dtype, r.pass_) == (dtype, pass_)]
        sizes = in_words(common_sizes(part))
        title = f"{dtype}, {words(pass_)}"
        drawn = (
            ratio_dots(part, title),
            roofline_of_suite(part, machine, dtype, f"{title}, roofline"),
            *(bytes_dots(part, title, value, what) for what, value in BYTES),
        )
        figures += [figure for figure in drawn if figure is not None]
        tables += _tables(part, f"{title}, {sizes}" if sizes else title)
    return SuiteSection(
        name=name,
        about=ABOUT.get(name, ""),
        bases=list(dict.fromkeys(r.base for r in own if r.ratio is not None)),
        figures=figures,
        tables=tables,
        details=[r for r in own if r.timed or r.peak_bytes is not None],
        failures=failures(own),
        remarks=remarks(own),
    )


def _tables(part: Sequence[SuiteRecord], title: str) -> list[SuiteTable]:
    kinds: list[tuple[str, Callable[[SuiteRecord], str | None]]] = [("", _ratio)]
    kinds += [(f", {what}", partial(_bytes, value)) for what, value in BYTES]
    return [
        table
        for words_of_kind, cell in kinds
        if (table := _table(part, title + words_of_kind, cell)) is not None
    ]


def _table(
    part: Sequence[SuiteRecord], title: str, cell: Callable[[SuiteRecord], str | None]
) -> SuiteTable | None:
    cells = {
        (row, r.provider): said
        for row, r in zip(rows_of(part), part, strict=True)
        if (said := cell(r)) is not None
    }
    names = in_order(provider for _, provider in cells)
    rows = [
        (item, [cells.get((item, name), "-") for name in names])
        for item in dict.fromkeys(row for row, _ in cells)
    ]
    return SuiteTable(title, names, rows) if rows else None


def _ratio(r: SuiteRecord) -> str | None:
    """Nothing for the base, whose ratio is 1."""
    if r.ratio is None or r.provider == r.base:
        return None
    return with_interval(r.ratio, r.ratio_low, r.ratio_high)


def _bytes(value: Callable[[SuiteRecord], int | None], r: SuiteRecord) -> str | None:
    found = value(r)
    return None if found is None else human_bytes(found)
