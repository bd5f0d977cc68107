"""Tax over M, and of every case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from benchmarks.figures.panel import (
    STRONG,
    data_uri,
    label,
    legend,
    panel,
    styles_of,
    tax_axis,
    words,
)
from benchmarks.providers import FROZEN
from benchmarks.record import Record
from benchmarks.summary import GOAL_RANK, ClassMean, class_means, m_class

_MAX_CASE_ROWS = 45


def tax_by_tokens(records: Sequence[Record], dtype: str, pass_: str) -> str | None:
    """Class means as lines over M, single cases as small dots. Dropout 0, r <= 16."""
    chosen = [r for r in _without_dropout(records, dtype, pass_) if r.R <= GOAL_RANK]
    if not chosen:
        return None
    figure, axes = panel(f"{dtype}, {words(pass_)}", 3.4)
    means = {M: row for (_, M), row in class_means(chosen).items()}
    columns = list(means)
    styles = styles_of(list(dict.fromkeys(r.provider for r in chosen)))
    for i, (name, style) in enumerate(styles.items()):
        offset = (i - (len(styles) - 1) / 2) * 0.42 / len(styles)
        _dots(axes, [r for r in chosen if r.provider == name], columns, offset, style[0])
        _line(axes, name, [row.get((name, pass_)) for row in means.values()], offset, style)
    tax_axis(axes, [r.tax or 1.0 for r in chosen], "y")
    axes.set_xticks(range(len(columns)), [f"M {M}" if "≥" in M else f"M = {M}" for M in columns])
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylabel("time ÷ frozen nn.Linear", fontsize=9)
    legend(figure)
    return data_uri(figure)


def _without_dropout(records: Sequence[Record], dtype: str, pass_: str) -> list[Record]:
    """Timed records with a tax; the frozen layer, whose tax is 1, is the axis."""
    return [
        r
        for r in records
        if r.tax is not None
        and not r.dropout
        and (r.dtype, r.pass_) == (dtype, pass_)
        and r.provider != FROZEN
    ]


def _dots(
    axes: Axes, own: Sequence[Record], columns: Sequence[str], offset: float, color: str
) -> None:
    at = [columns.index(m_class(r.M)) + offset for r in own]
    taxes = [r.tax or 1.0 for r in own]
    axes.plot(at, taxes, "o", color=color, markersize=3, alpha=0.35, markeredgewidth=0)


def _line(
    axes: Axes,
    name: str,
    means: Sequence[ClassMean | None],
    offset: float,
    style: tuple[str, str],
) -> None:
    """The means of one provider, with their intervals."""
    color, marker = style
    strong = name in STRONG
    points = [(c + offset, mean) for c, mean in enumerate(means) if mean is not None]
    axes.errorbar(
        [at for at, _ in points], [mean.tax for _, mean in points],
        yerr=_reach([(mean.tax, mean.low, mean.high) for _, mean in points]),
        color=color, marker=marker, label=label(name), linewidth=2.2 if strong else 1.1,
        markersize=6.5 if strong else 5, elinewidth=0.8, zorder=3 if strong else 2,
    )  # fmt: skip


def tax_by_case(records: Sequence[Record], dtype: str, pass_: str) -> str | None:
    """One row per layer, M and rank, one dot with its interval per provider. Dropout 0."""
    chosen = _without_dropout(records, dtype, pass_)
    keys = sorted({r.case_key for r in chosen}, key=lambda key: (key[2], key[0], key[3]))
    if len(keys) > _MAX_CASE_ROWS:
        keys = [key for key in keys if key[3] == GOAL_RANK]
    if not keys:
        return None
    figure, axes = panel(f"{dtype}, {words(pass_)}", 1.3 + 0.235 * len(keys))
    rows: Mapping[object, int] = {key: row for row, key in enumerate(keys)}
    shown = [r for r in chosen if r.case_key in rows]
    for name, (color, marker) in styles_of(list(dict.fromkeys(r.provider for r in shown))).items():
        own = [r for r in shown if r.provider == name]
        strong = name in STRONG
        axes.errorbar(
            [r.tax or 1.0 for r in own], [rows[r.case_key] for r in own],
            xerr=_reach([(r.tax, r.tax_low, r.tax_high) for r in own]), fmt=marker, color=color,
            label=label(name), markersize=6.5 if strong else 4.5, elinewidth=0.9,
            alpha=0.95 if strong else 0.8, markeredgewidth=0, zorder=3 if strong else 2,
        )  # fmt: skip
    tax_axis(axes, [r.tax or 1.0 for r in shown], "x")
    axes.set_yticks(range(len(keys)), [f"{layer}  M={M} r={R}" for layer, _, M, R in keys])
    axes.set_ylim(len(keys) - 0.4, -0.6)
    axes.set_xlabel("time ÷ frozen nn.Linear", fontsize=9)
    legend(figure)
    return data_uri(figure)


def _reach(
    intervals: Sequence[tuple[float | None, float | None, float | None]],
) -> tuple[list[float], list[float]]:
    """How far each interval (median, low, high) reaches to both sides."""
    known = [(m or 1.0, low or m or 1.0, high or m or 1.0) for m, low, high in intervals]
    return [max(m - low, 0) for m, low, _ in known], [max(high - m, 0) for m, _, high in known]
