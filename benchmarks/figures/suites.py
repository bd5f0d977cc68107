"""The suites other than the layers': one row per item, one dot per provider."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence

from benchmarks.figures.panel import STRONG, data_uri, label, legend, panel, styles_of, tax_axis
from benchmarks.record import SuiteRecord

_MAX_ROWS = 40
_LABEL_WIDTH = 24  # characters; longer names would leave a phone no room for the dots
_MIB = 1 << 20


def common_sizes(records: Sequence[SuiteRecord]) -> dict[str, int]:
    """The sizes that all records share."""
    first = records[0].shape if records else {}
    return {
        name: size
        for name, size in first.items()
        if all(r.shape.get(name) == size for r in records)
    }


def in_words(sizes: Mapping[str, int]) -> str:
    """ "M=16 K=64"."""
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def rows_of(records: Sequence[SuiteRecord]) -> list[str]:
    """For each record the name of its row: the item, and the sizes in which the records differ."""
    common = common_sizes(records)
    own = [{n: size for n, size in r.shape.items() if n not in common} for r in records]
    return [f"{r.item} {in_words(sizes)}".strip() for r, sizes in zip(records, own, strict=True)]


def ratio_dots(records: Sequence[SuiteRecord], title: str) -> str | None:
    """Time ÷ time of the base, with intervals; the base itself is the line at 1."""
    timed = [r for r in records if r.ratio is not None and r.provider != r.base]
    bases = ", ".join(dict.fromkeys(label(r.base) for r in timed))
    return _dots(timed, title, lambda r: r.ratio or 1.0, f"time ÷ {bases}", log=True)


def bytes_dots(
    records: Sequence[SuiteRecord],
    title: str,
    value: Callable[[SuiteRecord], int | None],
    what: str,
) -> str | None:
    """One of the kinds of memory."""
    known = [r for r in records if value(r) is not None]
    return _dots(known, title, lambda r: (value(r) or 0) / _MIB, f"{what}, MiB", log=False)


def _dots(
    records: Sequence[SuiteRecord],
    title: str,
    value: Callable[[SuiteRecord], float],
    xlabel: str,
    log: bool,
) -> str | None:
    named = list(zip(rows_of(records), records, strict=True))
    rows = list(dict.fromkeys(name for name, _ in named))[:_MAX_ROWS]
    shown = [r for name, r in named if name in rows]
    at = {id(r): rows.index(name) for name, r in named if name in rows}
    if not shown:
        return None
    lines = sum(len(textwrap.wrap(row, _LABEL_WIDTH)) for row in rows)
    figure, axes = panel(title, 1.3 + 0.1 * len(rows) + 0.135 * lines)
    for name, (color, marker) in styles_of(list(dict.fromkeys(r.provider for r in shown))).items():
        own = [r for r in shown if r.provider == name]
        strong = name in STRONG
        reach = None
        if log:
            below = [max(value(r) - (r.ratio_low or value(r)), 0) for r in own]
            above = [max((r.ratio_high or value(r)) - value(r), 0) for r in own]
            reach = (below, above)
        axes.errorbar(
            [value(r) for r in own], [at[id(r)] for r in own], xerr=reach, fmt=marker,
            color=color, label=label(name), markersize=6.5 if strong else 5, elinewidth=0.9,
            markeredgewidth=0, zorder=3 if strong else 2,
        )  # fmt: skip
    if log:
        tax_axis(axes, [value(r) for r in shown], "x")
    else:
        axes.set_xlim(0, 1.08 * max(value(r) for r in shown) or 1)
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    axes.set_yticks(range(len(rows)), [textwrap.fill(row, _LABEL_WIDTH) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(xlabel, fontsize=9)
    legend(figure)
    return data_uri(figure)
