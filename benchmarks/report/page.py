"""The page: what goes into it, from the results and the cost model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from benchmarks.figures.bars import dropout_bars, memory_bars
from benchmarks.figures.panel import label
from benchmarks.figures.roofline import roofline
from benchmarks.figures.strategy import strategy_maps
from benchmarks.figures.tax import tax_by_case, tax_by_tokens
from benchmarks.goals import SET_ON, GoalRow
from benchmarks.providers import FROZEN, OURS, PEFT, PREPACKED
from benchmarks.record import Record, Results
from benchmarks.report.suites import sections
from benchmarks.roofline import percent_table, roof_rows
from benchmarks.shapes import DTYPES, FORWARD_BACKWARD, PASSES
from benchmarks.strategy import MODELLED_GPUS, StrategyMap, modelled_map
from benchmarks.summary import (
    GOAL_RANK,
    NOISE,
    ClassMean,
    Rivalry,
    against_best,
    class_means,
    dropout_costs,
    excess_over_frozen,
    failures,
    in_order,
    remarks,
    worst_error_ratios,
)
from benchmarks.table import human_bytes, machine_lines, with_interval
from benchmarks.timing import geometric_mean


@dataclass(frozen=True)
class Headline:
    """A number of ours, what it is, and the same number of PEFT's."""

    value: str
    what: str
    beside: str


@dataclass(frozen=True)
class ClassTable:
    title: str
    names: list[str]
    rows: list[tuple[str, str, int, list[str]]]


def write_report(results: Results, goals: Sequence[GoalRow], path: Path) -> None:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    records = results.records
    dtypes = [d for d in DTYPES if any(r.timed and r.dtype == d for r in records)]
    page = environment.get_template("page.html.j2").render(
        results=results,
        machine=machine_lines(results),
        label=label,
        headlines=headlines(results, goals),
        goals=goals if any(g.met is not None for g in goals) else [],
        goals_note=SET_ON,
        tokens_figures=_present(tax_by_tokens(records, d, p) for d in dtypes for p in PASSES),
        case_figures=_present(tax_by_case(records, d, p) for d in dtypes for p in PASSES),
        class_tables=_class_tables(records),
        worst=_worst(records),
        noise=NOISE,
        roofs=roof_rows(results),
        roof_percents=percent_table(results),
        roof_figures=_present(roofline(results, d, p) for d in dtypes for p in PASSES),
        maps_here=_maps_here(results),
        maps_modelled=[f for name in MODELLED_GPUS for f in strategy_maps(modelled_map(name))],
        suites=sections(results.suites, results.machine),
        dropout_figures=_present(dropout_bars(records, p) for p in PASSES),
        numerics=worst_error_ratios(records),
        failures=[r for r in failures(records) if r.pass_ == FORWARD_BACKWARD],
        remarks=remarks(records),
        memory=results.memory,
        memory_figures=_present(memory_bars(results.memory, r) for r in (False, True)),
        human_bytes=human_bytes,
        number=_number,
        with_interval=with_interval,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)


def _maps_here(results: Results) -> list[str]:
    """Of the machine of the run, as its dispatcher answered then."""
    maps = [StrategyMap(**m) for m in results.machine.get("strategy_maps", [])]
    return [figure for found in maps for figure in strategy_maps(found)]


def headlines(results: Results, goals: Sequence[GoalRow]) -> list[Headline]:
    """The few numbers to read first."""
    found = []
    for dtype in ("bf16", "fp32"):
        for name in (OURS, PREPACKED):
            ours, peft = (_mean_tax(results.records, dtype, n) for n in (name, PEFT))
            if ours:
                packed = ", prepacked" if name == PREPACKED else ""
                beside = f"PEFT {peft:.2f}x" if peft else "PEFT not measured"
                what = f"the frozen layer's time, {dtype}{packed}, forward + backward"
                found.append(Headline(f"{ours:.2f}x", what, beside))
    costs, rivals = (dropout_costs(results.records, n) for n in (OURS, PEFT))
    for dtype in ("bf16", "fp32"):
        key = (dtype, FORWARD_BACKWARD)
        if key in costs:
            beside = f"PEFT {rivals[key].tax - 1:+.0%}" if key in rivals else "PEFT not measured"
            what = f"for dropout 0.05, {dtype}, forward + backward"
            found.append(Headline(f"{costs[key].tax - 1:+.1%}", what, beside))
    peaks = {m.provider: m.resident_bytes or m.peak_bytes for m in results.memory}
    excess = excess_over_frozen(peaks)
    if OURS in excess:
        beside = f"PEFT {human_bytes(excess[PEFT])}" if PEFT in excess else "PEFT not measured"
        what = "peak memory above the frozen layer, forward + backward"
        found.append(Headline(human_bytes(excess[OURS]), what, beside))
    measured = [g for g in goals if g.met is not None]
    if not measured:
        return found
    met = sum(bool(g.met) for g in measured)
    found.append(
        Headline(
            f"{met} of {len(measured)}",
            "goals met here",
            f"{len(goals) - len(measured)} not measured",
        )
    )
    return found


def _mean_tax(records: Sequence[Record], dtype: str, provider: str) -> float | None:
    taxes = [
        r.tax
        for r in records
        if r.tax is not None
        and (r.dtype, r.provider, r.pass_, r.dropout) == (dtype, provider, FORWARD_BACKWARD, 0.0)
        and r.R <= GOAL_RANK
    ]
    return geometric_mean(taxes) if taxes else None


def _class_tables(records: Sequence[Record]) -> list[ClassTable]:
    tables = []
    ranks = {"r ≤ 16": lambda R: R <= GOAL_RANK, "r > 16": lambda R: R > GOAL_RANK}
    for dropout in sorted({r.dropout for r in records}):
        for title, has in ranks.items():
            means = class_means(records, dropout, has)
            present = {name for row in means.values() for name, _ in row}
            names = in_order(present - {FROZEN})
            rows = [
                (
                    dtype,
                    M,
                    max(mean.cases for mean in row.values()),
                    [" / ".join(_cell(row.get((n, p))) for p in PASSES) for n in names],
                )
                for (dtype, M), row in means.items()
            ]
            if names:
                tables.append(ClassTable(f"dropout {dropout:g}, {title}", names, rows))
    return tables


def _cell(mean: ClassMean | None) -> str:
    return "-" if mean is None else with_interval(mean.tax, mean.low, mean.high)


def _worst(records: Sequence[Record], count: int = 15) -> list[Rivalry]:
    rivalries = [r for name in (OURS, PREPACKED) for r in against_best(records, name)]
    return sorted(rivalries, key=lambda r: -r.ratio.median)[:count]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _present(made: Iterable[str | None]) -> list[str]:
    return [figure for figure in made if figure is not None]
