"""What all figures share: colours, panels narrow enough for a phone, axes, legends, data URIs."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.providers import LORALIB, NAIVE, OURS, PEFT, PREPACKED, SMART
from benchmarks.shapes import PASSES
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
STRONG = (OURS, PREPACKED)
_MORE_COLORS = ("#b0708f", "#8d7bb8", "#7f9f6a", "#a58a72")
_MORE_MARKERS = ("<", "X", "p", ">", "h")  # of other number than the colours: 20 pairs
_TICKS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0)
_FINE_TICKS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0)


def styles_of(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each provider, ours last so that they are drawn on top."""
    others = zip(itertools.cycle(_MORE_COLORS), itertools.cycle(_MORE_MARKERS), strict=False)
    found = {name: STYLES.get(name) or next(others) for name in names if name not in STRONG}
    return found | {name: STYLES[name] for name in names if name in STRONG}


def data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def panel(title: str, height: float, width: float = 4.6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10.5, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    return figure, axes


def tax_axis(axes: Axes, values: Sequence[float], which: str) -> None:
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


def label(name: str) -> str:
    """What a provider is called; suites may have providers of their own."""
    return LABELS.get(name, name)


def legend(figure: Figure) -> None:
    figure.legend(
        fontsize=8, frameon=False, ncols=3, loc="outside lower center", columnspacing=1.0,
        handletextpad=0.4,
    )  # fmt: skip


def words(pass_: str) -> str:
    """Suites may have passes of their own, which are called what they are."""
    known = {PASSES[0]: "forward", PASSES[1]: "forward + backward", "B": "backward"}
    return known.get(pass_, pass_)
