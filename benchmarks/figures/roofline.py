"""The roofline: what was reached, under what the machine's memory and its vendor's GEMM allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.figures.panel import STRONG, data_uri, label, legend, panel, styles_of, words
from benchmarks.providers import FROZEN, OURS, PEFT, PREPACKED
from benchmarks.record import Record, Results, SuiteRecord
from benchmarks.roofline import Point, Roofs, point_of, roofs_of

_SHOWN = (FROZEN, PEFT, OURS, PREPACKED)


def roofline(results: Results, dtype: str, pass_: str) -> str | None:
    """GFLOP/s over FLOPs per byte of every case of the layer suite without dropout."""
    points = {
        name: _points([r for r in results.records if _belongs(r, name, dtype, pass_)])
        for name in _SHOWN
    }
    return _draw(results.machine, dtype, f"{dtype}, {words(pass_)}", points)


def roofline_of_suite(
    records: Sequence[SuiteRecord], machine: Mapping[str, Any], dtype: str, title: str
) -> str | None:
    """The same of records of another suite that say what they compute and move."""
    points: dict[str, list[Point]] = {}
    for r in records:
        if r.gflops is not None and r.flops and r.bytes_moved:
            points.setdefault(r.provider, []).append(Point(r.flops / r.bytes_moved, r.gflops))
    return _draw(machine, dtype, title, points)


def _draw(
    machine: Mapping[str, Any], dtype: str, title: str, found: Mapping[str, Sequence[Point]]
) -> str | None:
    """None without roofs or points."""
    roofs = roofs_of(machine, dtype)
    points = {name: own for name, own in found.items() if own}
    if roofs is None or not points:
        return None
    figure, axes = panel(title, 3.6)
    every = [p for own in points.values() for p in own]
    _draw_roofs(axes, roofs, every, machine["peak_gflops"].get(dtype))
    styles = styles_of(list(points)) | {FROZEN: ("#333333", "_")}
    for name, own in points.items():
        color, marker = styles[name]
        strong = name in STRONG
        axes.plot(
            [p.intensity for p in own], [p.gflops for p in own], marker, color=color,
            label=label(name), markersize=9 if name == FROZEN else 6 if strong else 4.5,
            alpha=0.9, zorder=3 if strong else 2, markeredgewidth=1.6 if name == FROZEN else 0,
        )  # fmt: skip
    for set_scale in (axes.set_xscale, axes.set_yscale):
        set_scale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("FLOPs per byte that must move", fontsize=9)
    axes.set_ylabel("GFLOP/s", fontsize=9)
    legend(figure)
    return data_uri(figure)


def _belongs(r: Record, name: str, dtype: str, pass_: str) -> bool:
    return (r.provider, r.dtype, r.pass_, r.dropout) == (name, dtype, pass_, 0.0)


def _points(own: Sequence[Record]) -> list[Point]:
    found = [point_of(r, r.provider != FROZEN) for r in own]
    return [point for point in found if point is not None]


def _draw_roofs(axes: Axes, roofs: Roofs, points: Sequence[Point], fma_peak: float | None) -> None:
    low = min(min(p.intensity for p in points), roofs.ridge / 8) / 2
    high = max(max(p.intensity for p in points), roofs.ridge) * 2
    axes.plot(
        [low, roofs.ridge, high], [roofs.gflops_at(i) for i in (low, roofs.ridge, high)],
        color="#555555", linewidth=1.4, zorder=1,
    )  # fmt: skip
    axes.annotate(
        f"GEMM {roofs.gemm_gflops:.0f}", (roofs.ridge, roofs.gemm_gflops), fontsize=8, va="top",
        xytext=(8, -3), textcoords="offset points", color="#555555",
    )  # fmt: skip
    middle = (low * roofs.ridge) ** 0.5
    axes.annotate(
        f"copy {roofs.copy_gbytes:.0f} GB/s", (middle, roofs.gflops_at(middle)), fontsize=8,
        ha="right", xytext=(-6, 4), textcoords="offset points", color="#555555",
    )  # fmt: skip
    if fma_peak:
        axes.axhline(fma_peak, color="#999999", linewidth=0.9, linestyle=":")
        axes.annotate(
            f"FMA peak of one core {fma_peak:.0f}", (low, fma_peak), fontsize=8, va="bottom",
            xytext=(0, 2), textcoords="offset points", color="#777777",
        )  # fmt: skip
