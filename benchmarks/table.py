"""What the terminal shows: the machine, the class means, the worst cells, the goals."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.goals import GoalRow
from benchmarks.providers import ALL_PROVIDERS, FROZEN, OURS, PREPACKED
from benchmarks.record import Record, Results
from benchmarks.roofline import percent_table
from benchmarks.shapes import PASSES
from benchmarks.summary import (
    NOISE,
    ClassMean,
    against_best,
    class_means,
    failures,
    in_order,
    remarks,
)
from benchmarks.timing import Interval

LABELS = {p.name: p.label for p in ALL_PROVIDERS}
_CLASS_WIDTH, _CELL_WIDTH = 26, 9  # characters of the columns that name the class, and of a cell


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def with_interval(median: float, low: float | None, high: float | None) -> str:
    """A ratio and half the width of its interval: "1.04±.01"."""
    if low is None or high is None:
        return f"{median:.2f}"
    return f"{median:.2f}±{f'{(high - low) / 2:.2f}'.removeprefix('0')}"


def machine_lines(results: Results) -> list[tuple[str, str]]:
    """Name and value of everything worth knowing about where the run happened."""
    m = results.machine
    caches = ", ".join(f"{name} {human_bytes(size)}" for name, size in m["caches"].items())
    peaks = ", ".join(f"{dtype} {rate:.0f} GFLOP/s" for dtype, rate in m["peak_gflops"].items())
    gemms = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in m.get("gemm_gflops", {}).items())
    roofs = f"GEMM {gemms} GFLOP/s, copy {m['copy_gbytes']:.1f} GB/s" if gemms else "not measured"
    gpu = m.get("gpu")
    facts = ", ".join(f"{k} {v}" for k, v in gpu.items() if k != "name") if gpu else ""
    return [
        *([("GPU", f"{gpu['name']}, {facts}")] if gpu else []),
        ("CPU", f"{m['cpu']}, family {m['family']} model {m['model']}" + ", VM" * m["virtual"]),
        ("cores", f"{m['cores']}, load {' '.join(str(x) for x in m['load'])}"),
        ("threads", f"{m['threads']}, timed by {_clock_words(results)}"),
        ("caches", caches or "unknown"),
        ("one core's peak", peaks or "not measured (takes a C compiler, on x86)"),
        ("measured roofs", roofs),
        *_states(m),
        ("torch", f"{m['torch_capability']}, MKL {_yes(m['mkl'])}, oneDNN {_yes(m['onednn'])}, "
                  f"AMX {_yes(m['amx'])}"),
        ("lora_fused", m["native"]),
        ("versions", ", ".join(f"{k} {v}" for k, v in results.versions.items())),
        ("commit", results.commit),
    ]  # fmt: skip


def _clock_words(results: Results) -> str:
    settings = results.settings
    if settings.get("device", "cpu") == "cpu":
        return "CPU time" if results.machine["threads"] == 1 else "the wall clock"
    if settings.get("eager"):
        return "the wall clock of eager calls"
    return "the device time of CUDA graphs, its cache cold"


def _states(machine: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Load and clocks before and, once it is over, after the run."""
    return [
        (f"{when} the run", ", ".join(_state_words(machine[when])))
        for when in ("before", "after")
        if when in machine
    ]


def _state_words(state: Mapping[str, Any]) -> list[str]:
    words = [f"load {' '.join(str(x) for x in state['load'])}"] if "load" in state else []
    words += [f"CPU {state['cpu_mhz']} MHz"] if "cpu_mhz" in state else []
    return words + [f"{name} {value}" for name, value in state.get("gpu", {}).items()]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def print_header(console: Console, results: Results) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in machine_lines(results):
        table.add_row(f"[bold]{name}", value)
    for provider in results.providers:
        if provider["missing"]:
            table.add_row(
                f"[bold yellow]{provider['label']}", f"[yellow]left out: {provider['missing']}"
            )
    console.print(table)


def print_results(console: Console, results: Results, goals: Sequence[GoalRow]) -> None:
    for dropout in sorted({0.0} | {r.dropout for r in results.records}):
        _print_classes(console, results.records, dropout)
    _print_percents(console, results)
    _print_failures(console, results.records)
    _print_worst(console, results.records)
    console.print(_goal_table(goals))
    if results.skipped:
        console.print(f"[yellow]Not run: {'; '.join(results.skipped)}")


def _print_classes(console: Console, records: Sequence[Record], dropout: float) -> None:
    """As many providers in one table as the console has room for."""
    means = class_means(records, dropout)
    present = {name for row in means.values() for name, _ in row} - {FROZEN}
    title = f"Time ÷ frozen nn.Linear, dropout {dropout:g}, r ≤ 16: mean ± half the 95 % interval"
    for names in _fitting(in_order(present), console.width - _CLASS_WIDTH):
        console.print(_class_table(title, means, names))


def _fitting(names: Sequence[str], room: int) -> list[list[str]]:
    """The names in order, cut into lists whose columns fit into so many characters."""
    found: list[list[str]] = []
    left = 0
    for name in names:
        width = max(len(name), _CELL_WIDTH) + 1
        if not found or width > left:
            found.append([])
            left = room
        found[-1].append(name)
        left -= width
    return found


def _class_table(
    title: str,
    means: Mapping[tuple[str, str], Mapping[tuple[str, str], ClassMean]],
    names: Sequence[str],
) -> Table:
    table = _table(title)
    for column in ("dtype", "M", "cases", "pass"):
        table.add_column(column)
    for name in names:
        table.add_column(name, justify="right", style="bold" if name in (OURS, PREPACKED) else "")
    for (dtype, M), row in means.items():
        cases = str(max(mean.cases for mean in row.values()))
        for pass_ in PASSES:
            cells = [_mean_cell(row.get((name, pass_))) for name in names]
            head = (dtype, M, cases) if pass_ == PASSES[0] else ("", "", "")
            table.add_row(*head, pass_, *cells)
    return table


def _interval_cell(interval: Interval) -> str:
    return with_interval(interval.median, interval.low, interval.high)


def _mean_cell(mean: ClassMean | None) -> str:
    return "-" if mean is None else with_interval(mean.tax, mean.low, mean.high)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _print_percents(console: Console, results: Results) -> None:
    found = percent_table(results)
    if found is None:
        return
    for names in _fitting(found.names, console.width - _CLASS_WIDTH):
        table = _table("Per cent of the measured roofs (GEMM, copy), forward, dropout 0, r ≤ 16")
        for column in ("dtype", "M"):
            table.add_column(column)
        for name in names:
            table.add_column(name, justify="right")
        for dtype, M, cells in found.rows:
            shown = dict(zip(found.names, cells, strict=True))
            table.add_row(dtype, M, *(shown[name] for name in names))
        console.print(table)


def _print_failures(console: Console, records: Sequence[Record]) -> None:
    """Once per case and dropout what failed, once per reason what was left out."""
    lines = {
        f"[bold red]{r.status.upper()}[/] {r.provider} on {r.layer_key} {r.dtype} M={r.M} r={r.R} "
        f"p={r.dropout:g}: {escape(r.message)}": None
        for r in failures(records)
    }
    for line in lines:
        console.print(line, highlight=False)
    for (provider, reason), count in remarks(r for r in records if not r.timed).items():
        console.print(f"[yellow]{provider}: {escape(reason)} ({count} records)", highlight=False)


def _print_worst(console: Console, records: Sequence[Record], count: int = 8) -> None:
    rivalries = [r for name in (OURS, PREPACKED) for r in against_best(records, name)]
    worst = sorted(rivalries, key=lambda r: -r.ratio.median)[:count]
    if not worst:
        return
    table = _table("Worst cells: ours ÷ the best of naive, smart and PEFT in the same rounds")
    for column in ("layer", "dtype", "M", "r", "p", "pass", "ours", "best", "ratio"):
        table.add_column(column)
    for rivalry in worst:
        r, ratio = rivalry.record, rivalry.ratio
        color = "red" if ratio.q25 > NOISE else "yellow" if rivalry.is_worse else "green"
        table.add_row(
            r.layer_key, r.dtype, str(r.M), str(r.R), f"{r.dropout:g}", r.pass_, r.provider,
            rivalry.rival, f"[{color}]{_interval_cell(rivalry.interval)}",
        )  # fmt: skip
    console.print(table)


def _goal_table(goals: Sequence[GoalRow]) -> Table:
    """The goals that this run can judge; the notes stand in the report."""
    unmeasured = sum(g.met is None for g in goals)
    table = _table("Goals, set on AMD Zen 4 (MKL and AMX differ by machine)")
    table.caption = f"{unmeasured} not measured in this run" if unmeasured else None
    for column in ("goal", "pass", "limit", "here", ""):
        table.add_column(column)
    for g in goals:
        if g.met is not None:
            color = "green" if g.met else "red"
            table.add_row(g.goal, g.pass_, g.limit, g.measured, f"[{color}]{g.status}")
    return table
