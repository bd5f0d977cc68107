"""Bars: what dropout adds, and peak memory."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from benchmarks.figures.panel import STYLES, data_uri, label, panel, words
from benchmarks.record import MemoryRecord, Record
from benchmarks.summary import dropout_costs, excess_over_frozen


def dropout_bars(records: Sequence[Record], pass_: str) -> str | None:
    """What dropout 0.05 adds, per provider and dtype."""
    rows = [
        (name, dtype, mean.tax - 1)
        for name in STYLES
        for (dtype, p), mean in dropout_costs(records, name).items()
        if p == pass_
    ]
    if not rows:
        return None
    figure, axes = panel(words(pass_), 0.7 + 0.27 * len(rows))
    bars(
        axes,
        [
            (f"{label(n)}, {dtype}", 100 * cost, STYLES[n][0], f"{cost:+.1%}")
            for n, dtype, cost in rows
        ],
    )
    axes.set_xlabel("% of its own time without dropout", fontsize=9)
    return data_uri(figure)


def memory_bars(memory: Sequence[MemoryRecord], resident: bool) -> str | None:
    """Peak above the frozen layer's."""
    peaks = {m.provider: m.resident_bytes if resident else m.peak_bytes for m in memory}
    rows = [(n, e / 2**20) for n, e in excess_over_frozen(peaks).items() if n in STYLES]
    if not rows:
        return None
    title = "resident peak above frozen" if resident else "allocator's peak above frozen"
    figure, axes = panel(title, 0.7 + 0.3 * len(rows))
    bars(axes, [(label(n), mib, STYLES[n][0], f"{mib:.1f}") for n, mib in rows])
    axes.set_xlabel("MiB, forward + backward", fontsize=9)
    return data_uri(figure)


def bars(axes: Axes, rows: Sequence[tuple[str, float, str, str]]) -> None:
    values = [value for _, value, _, _ in rows]
    axes.barh(range(len(rows)), values, color=[color for _, _, color, _ in rows], height=0.68)
    room = 0.02 * (max([*values, 0]) - min([*values, 0]) or 1)
    for i, (_, value, _, text) in enumerate(rows):
        axes.text(max(value, 0) + room, i, text, va="center", fontsize=8.5)
    axes.set_yticks(range(len(rows)), [label for label, _, _, _ in rows])
    axes.invert_yaxis()
    axes.axvline(0, color="#333333", linewidth=1)
    axes.margins(x=0.14)
