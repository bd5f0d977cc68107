"""The report's figures, as SVG data URIs, each narrow enough for a phone."""

import base64
import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.providers import FROZEN, LORALIB, NAIVE, OURS, PEFT, PREPACKED, SMART
from benchmarks.record import MemoryRecord, Record
from benchmarks.shapes import PASSES
from benchmarks.summary import (
    GOAL_RANK,
    class_means,
    dropout_costs,
    excess_over_frozen,
    m_class,
)
from benchmarks.table import LABELS

# Ours in strong colours, the rivals in quiet ones; the markers tell them apart without colour.
STYLES = {
    NAIVE: ("#a9a9a9", "v"),
    SMART: ("#6f7f94", "s"),
    PEFT: ("#d9822b", "^"),
    LORALIB: ("#c7a93c", "D"),
    OURS: ("#1461a8", "o"),
    PREPACKED: ("#0b9a7d", "P"),
}
_TICKS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0)
_FINE_TICKS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0)
_MAX_CASE_ROWS = 45


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _panel(title: str, height: float, width: float = 4.6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10.5, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    return figure, axes


def _tax_axis(axes: Axes, values: Sequence[float], which: str) -> None:
    """A logarithmic axis with round ticks; 1 is the frozen layer."""
    low, high = min([*values, 0.9]) * 0.92, max([*values, 1.1]) * 1.08
    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    ticks = _FINE_TICKS if high / low < (1.8 if which == "x" else 3.2) else _TICKS
    axis.set_ticks([t for t in ticks if low <= t <= high])
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axes.grid(axis="x" if which == "x" else "y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    line = axes.axvline if which == "x" else axes.axhline
    line(1.0, color="#333333", linewidth=1.1)


def tax_by_tokens(records: Sequence[Record], dtype: str, pass_: str) -> str | None:
    """Class means as lines over M, single cases as small dots. Dropout 0, r <= 16."""
    chosen = [
        r
        for r in records
        if r.tax is not None
        and not r.dropout
        and r.R <= GOAL_RANK
        and (r.dtype, r.pass_) == (dtype, pass_)
    ]
    means = {M: row for (_, M), row in class_means(chosen).items()}
    names = [n for n in STYLES if any(r.provider == n for r in chosen)]
    if not names:
        return None
    figure, axes = _panel(f"{dtype}, {_words(pass_)}", 3.4)
    columns = list(means)
    for i, name in enumerate(names):
        color, marker = STYLES[name]
        offset = (i - (len(names) - 1) / 2) * 0.07
        own = [
            (columns.index(m_class(r.M)) + offset, r.tax)
            for r in chosen
            if r.provider == name and r.tax is not None
        ]
        axes.plot(
            [at for at, _ in own], [tax for _, tax in own], marker, color=color,
            markersize=3, alpha=0.35, markeredgewidth=0,
        )  # fmt: skip
        points = [
            (c, means[M][name, pass_].tax)
            for c, M in enumerate(columns)
            if (name, pass_) in means[M]
        ]
        strong = name in (OURS, PREPACKED)
        axes.plot(
            [c + offset for c, _ in points], [tax for _, tax in points], marker=marker, color=color,
            label=LABELS[name], linewidth=2.2 if strong else 1.1, markersize=6.5 if strong else 5,
            zorder=3 if strong else 2,
        )  # fmt: skip
    _tax_axis(axes, [r.tax for r in chosen if r.tax is not None and r.provider in STYLES], "y")
    axes.set_xticks(range(len(columns)), [f"M {M}" if "≥" in M else f"M = {M}" for M in columns])
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylabel("time ÷ frozen nn.Linear", fontsize=9)
    _legend(figure)
    return _data_uri(figure)


def tax_by_case(records: Sequence[Record], dtype: str, pass_: str) -> str | None:
    """One row per layer, M and rank, one dot per provider. Dropout 0."""
    chosen = [
        r
        for r in records
        if r.tax is not None
        and not r.dropout
        and (r.dtype, r.pass_) == (dtype, pass_)
        and r.provider != FROZEN
    ]
    keys = sorted({r.case_key for r in chosen}, key=lambda key: (key[2], key[0], key[3]))
    if len(keys) > _MAX_CASE_ROWS:
        keys = [key for key in keys if key[3] == GOAL_RANK]
    if not keys:
        return None
    figure, axes = _panel(f"{dtype}, {_words(pass_)}", 1.3 + 0.235 * len(keys))
    for name, (color, marker) in STYLES.items():
        points = [
            (r.tax, keys.index(r.case_key))
            for r in chosen
            if r.provider == name and r.case_key in keys and r.tax is not None
        ]
        strong = name in (OURS, PREPACKED)
        if points:
            axes.plot(
                [tax for tax, _ in points], [row for _, row in points], marker, color=color,
                label=LABELS[name], markersize=6.5 if strong else 4.5,
                alpha=0.95 if strong else 0.8, markeredgewidth=0, zorder=3 if strong else 2,
            )  # fmt: skip
    _tax_axis(axes, [r.tax for r in chosen if r.tax is not None and r.case_key in keys], "x")
    axes.set_yticks(range(len(keys)), [f"{layer}  M={M} r={R}" for layer, _, M, R in keys])
    axes.set_ylim(len(keys) - 0.4, -0.6)
    axes.set_xlabel("time ÷ frozen nn.Linear", fontsize=9)
    _legend(figure)
    return _data_uri(figure)


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
    figure, axes = _panel(_words(pass_), 0.7 + 0.27 * len(rows))
    _bars(
        axes,
        [
            (f"{LABELS[n]}, {dtype}", 100 * cost, STYLES[n][0], f"{cost:+.0%}")
            for n, dtype, cost in rows
        ],
    )
    axes.set_xlabel("% of its own time without dropout", fontsize=9)
    return _data_uri(figure)


def memory_bars(memory: Sequence[MemoryRecord], resident: bool) -> str | None:
    """Peak above the frozen layer's."""
    peaks = {m.provider: m.resident_bytes if resident else m.peak_bytes for m in memory}
    rows = [(n, e / 2**20) for n, e in excess_over_frozen(peaks).items() if n in STYLES]
    if not rows:
        return None
    title = "resident peak above frozen" if resident else "allocator's peak above frozen"
    figure, axes = _panel(title, 0.7 + 0.3 * len(rows))
    _bars(axes, [(LABELS[n], mib, STYLES[n][0], f"{mib:.1f}") for n, mib in rows])
    axes.set_xlabel("MiB, forward + backward", fontsize=9)
    return _data_uri(figure)


def _bars(axes: Axes, rows: Sequence[tuple[str, float, str, str]]) -> None:
    values = [value for _, value, _, _ in rows]
    axes.barh(range(len(rows)), values, color=[color for _, _, color, _ in rows], height=0.68)
    room = 0.02 * (max([*values, 0]) - min([*values, 0]) or 1)
    for i, (_, value, _, text) in enumerate(rows):
        axes.text(max(value, 0) + room, i, text, va="center", fontsize=8.5)
    axes.set_yticks(range(len(rows)), [label for label, _, _, _ in rows])
    axes.invert_yaxis()
    axes.axvline(0, color="#333333", linewidth=1)
    axes.margins(x=0.14)


def _legend(figure: Figure) -> None:
    figure.legend(
        fontsize=8, frameon=False, ncols=3, loc="outside lower center", columnspacing=1.0,
        handletextpad=0.4,
    )  # fmt: skip


def _words(pass_: str) -> str:
    return "forward" if pass_ == PASSES[0] else "forward + backward"
