"""Records grouped into classes: what the table, the goals and the report all quote."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.providers import FROZEN, NAIVE, OURS, PEFT, PREPACKED, PROVIDERS, SMART
from benchmarks.record import ERROR, WRONG, Record, SuiteRecord
from benchmarks.shapes import DTYPES, FORWARD_BACKWARD, PASSES
from benchmarks.timing import (
    Interval,
    Quantiles,
    geometric_mean,
    mean_interval,
    paired_interval,
    paired_ratio,
)

GOAL_RANK = 16  # goals and class means speak of r <= 16
BEST_OF = (NAIVE, SMART, PEFT)  # the torch formulations that lora_fused must never lose to
_NAMES = tuple(p.name for p in PROVIDERS)
NOISE = 1.05  # a single cell repeats to about 5 %


def m_class(M: int) -> str:
    return "≥ 512" if M >= 512 else str(M)


def in_order(names: Iterable[str]) -> list[str]:
    """Ours first, then the closest rivals: what a narrow screen shows without scrolling."""
    present = dict.fromkeys(names)
    known = [
        name
        for name in (OURS, PREPACKED, PEFT, SMART, *(p.name for p in PROVIDERS))
        if name in present
    ]
    return list(dict.fromkeys((*known, *present)))


@dataclass(frozen=True)
class ClassMean:
    """Geometric mean of the taxes of one provider over the cases of one class.

    low and high: its interval, from the bootstrap intervals (95 %) of the cases.
    """

    tax: float
    cases: int
    low: float
    high: float

    @classmethod
    def of(cls, intervals: Sequence[Interval]) -> "ClassMean":
        mean = mean_interval(intervals)
        return cls(mean.median, len(intervals), mean.low, mean.high)


def class_means(
    records: Iterable[Record],
    dropout: float = 0.0,
    ranks: Callable[[int], bool] = lambda R: R <= GOAL_RANK,
) -> dict[tuple[str, str], dict[tuple[str, str], ClassMean]]:
    """{(dtype, M class): {(provider, pass): mean}}, classes sorted by dtype and M."""
    taxes: dict[tuple[str, str], dict[tuple[str, str], list[Interval]]] = defaultdict(
        lambda: defaultdict(list)
    )
    chosen = [r for r in records if r.tax is not None and r.dropout == dropout and ranks(r.R)]
    for r in sorted(chosen, key=lambda r: (DTYPES.index(r.dtype), r.M)):
        assert r.tax is not None
        interval = Interval(r.tax, r.tax_low or r.tax, r.tax_high or r.tax)
        taxes[r.dtype, m_class(r.M)][r.provider, r.pass_].append(interval)
    return {
        group: {key: ClassMean.of(values) for key, values in row.items()}
        for group, row in taxes.items()
    }


@dataclass(frozen=True)
class Rivalry:
    """One of our records beside the best torch formulation of the same case, dropout and pass."""

    record: Record
    rival: str
    ratio: Quantiles
    rival_samples_us: Sequence[float]

    @property
    def interval(self) -> Interval:
        """The median ratio with its bootstrap interval."""
        return paired_interval(self.record.samples_us, self.rival_samples_us)

    @property
    def is_worse(self) -> bool:
        """Beyond noise."""
        return self.ratio.median > NOISE


def against_best(records: Sequence[Record], provider: str) -> list[Rivalry]:
    """The paired ratio to the best of BEST_OF in every timed cell, the worst first."""
    cells: dict[tuple[object, ...], dict[str, Record]] = defaultdict(dict)
    for r in records:
        if r.timed:
            cell_key = (*r.case_key, r.dropout, r.pass_)
            cells[cell_key][r.provider] = r
    found = []
    for cell in cells.values():
        rivals = [cell[name] for name in BEST_OF if name in cell]
        if provider in cell and rivals:
            best = min(rivals, key=lambda r: r.median_us or 0.0)
            ratio = paired_ratio(cell[provider].samples_us, best.samples_us)
            found.append(Rivalry(cell[provider], best.provider, ratio, best.samples_us))
    return sorted(found, key=lambda rivalry: -rivalry.ratio.median)


@dataclass(frozen=True)
class DropoutCost:
    """Geometric mean of time with dropout ÷ without, over so many cases."""

    tax: float
    cases: int


def dropout_costs(records: Sequence[Record], provider: str) -> dict[tuple[str, str], DropoutCost]:
    """{(dtype, pass): geometric mean of time with dropout / without}, paired within the rounds."""
    plain = {(*r.case_key, r.pass_): r for r in records if _timed_by(r, provider) and not r.dropout}
    ratios: dict[tuple[str, str], list[float]] = defaultdict(list)
    for r in records:
        partner = plain.get((*r.case_key, r.pass_))
        if _timed_by(r, provider) and r.dropout and partner:
            ratios[r.dtype, r.pass_].append(paired_ratio(r.samples_us, partner.samples_us).median)
    order = sorted(ratios, key=lambda key: (DTYPES.index(key[0]), PASSES.index(key[1])))
    return {key: DropoutCost(geometric_mean(ratios[key]), len(ratios[key])) for key in order}


def _timed_by(record: Record, provider: str) -> bool:
    return record.timed and record.provider == provider


T = TypeVar("T", Record, SuiteRecord)


def failures(records: Iterable[T]) -> list[T]:
    """What was wrong or crashed."""
    return [r for r in records if r.status in (WRONG, ERROR)]


def remarks(records: Iterable[Record] | Iterable[SuiteRecord]) -> dict[tuple[str, str], int]:
    """{(provider, message): records} of what is no failure: not checked, not served, no graph."""
    said = ((r.provider, r.message) for r in records if r.status not in (WRONG, ERROR))
    return Counter((provider, message) for provider, message in said if message)


def worst_error_ratios(records: Iterable[Record]) -> dict[tuple[str, str], tuple[float, int, int]]:
    """{(provider, dtype): (largest error ratio, checks, failures)} over the checks made."""
    found: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for r in records:
        if r.error_ratio is not None and r.pass_ == FORWARD_BACKWARD:
            found[r.provider, r.dtype].append(r)
    return {
        key: (
            max(r.error_ratio or 0.0 for r in checked),
            len(checked),
            len(failures(checked)),
        )
        for key, checked in found.items()
    }


def excess_over_frozen(peaks: Mapping[str, int | None]) -> dict[str, int]:
    """Bytes above the frozen layer's, per provider; empty if that was not measured."""
    frozen = peaks.get(FROZEN)
    if frozen is None:
        return {}
    return {name: peak - frozen for name, peak in peaks.items() if peak is not None}
