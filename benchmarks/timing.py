"""Interleaved timing: all contenders in every round, compared only within the round."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch

Name = TypeVar("Name", bound=Hashable)


@runtime_checkable
class Stopwatch(Protocol):
    """Times calls itself, where the difference of two readings of a clock would not do."""

    most_repeats: int

    def time_ns(self, call: Callable[[], object], repeats: int) -> int:
        """Nanoseconds that `repeats` calls take together."""
        ...

    def remark(self, call: Callable[[], object]) -> str:
        """What a reader of the call's time must know; '' if nothing."""
        ...


Clock = Callable[[], int] | Stopwatch
"""A reading in nanoseconds, or a stopwatch."""

SAMPLE_NS = 2_000_000  # one sample lasts at least this long, or is one call
MOST_REPEATS = 1 << 16
RESAMPLES = 1000
CONFIDENCE = 0.95
_SEED = 1


def clock_for(threads: int, device: str = "cpu", eager: bool = False) -> Clock:
    """One thread: its CPU time, which a busy neighbour does not lengthen. More: the wall clock.

    On a GPU events around a CUDA graph of the call, its second-level cache cold; with `eager` the
    wall clock from idle device to idle device, the slower of launching and computing the calls.
    """
    if device == "cpu":
        return time.thread_time_ns if threads == 1 else time.perf_counter_ns
    if eager:
        return _clock_of_idle_gpu
    from benchmarks.timing_gpu import GraphStopwatch

    return GraphStopwatch()


def _clock_of_idle_gpu() -> int:
    torch.cuda.synchronize()
    return time.perf_counter_ns()


@dataclass(frozen=True)
class Quantiles:
    q10: float
    q25: float
    median: float
    q75: float
    q90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quantiles":
        if not values:
            raise ValueError("quantiles of nothing")
        ordered = sorted(values)
        return cls(*(_interpolated(ordered, q) for q in (0.10, 0.25, 0.50, 0.75, 0.90)))


def _interpolated(ordered: Sequence[float], q: float) -> float:
    at = q * (len(ordered) - 1)
    low, high = math.floor(at), math.ceil(at)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def paired_ratio(samples: Sequence[float], base: Sequence[float]) -> Quantiles:
    """Quantiles of sample / base, taken round by round; the noise the two share drops out."""
    if len(samples) != len(base):
        raise ValueError(
            f"paired samples come in equal numbers, got {len(samples)} and {len(base)}"
        )
    return Quantiles.of([s / b for s, b in zip(samples, base, strict=True)])


@dataclass(frozen=True)
class Interval:
    """A median and its bootstrap confidence interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: Sequence[float], resamples: int = RESAMPLES) -> Interval:
    """The median of the values, and where it lies in 95 % of the resamples (percentile method)."""
    draw = random.Random(_SEED)
    medians = sorted(
        statistics.median(draw.choices(values, k=len(values))) for _ in range(resamples)
    )
    tail = int((1 - CONFIDENCE) / 2 * resamples)
    return Interval(statistics.median(values), medians[tail], medians[-1 - tail])


def paired_interval(samples: Sequence[float], base: Sequence[float]) -> Interval:
    """Median of sample / base over the rounds, and its interval."""
    return bootstrap([s / b for s, b in zip(samples, base, strict=True)])


def mean_interval(intervals: Sequence[Interval]) -> Interval:
    """The geometric mean of independent medians, and its interval.

    On the logarithmic scale the half-widths add up as standard errors do: root of the sum of
    squares, divided by their number.
    """
    mean, count = geometric_mean([i.median for i in intervals]), len(intervals)
    down = math.hypot(*(math.log(i.median / i.low) for i in intervals)) / count
    up = math.hypot(*(math.log(i.high / i.median) for i in intervals)) / count
    return Interval(mean, mean * math.exp(-down), mean * math.exp(up))


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


@contextmanager
def gc_paused() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True)
class Pace:
    """How many calls make one sample, and how long that sample takes."""

    repeats: int
    sample_ns: int


def pace_of(call: Callable[[], object], clock: Clock, sample_ns: int = SAMPLE_NS) -> Pace:
    """Warms `call` up and finds its pace."""
    call()
    repeats = 1
    most = clock.most_repeats if isinstance(clock, Stopwatch) else MOST_REPEATS
    while True:
        elapsed = elapsed_ns(call, repeats, clock)
        if elapsed >= sample_ns or repeats >= most:
            return Pace(repeats, elapsed)
        # Aim a little beyond the target, but grow at most tenfold: the first calls are slow ones.
        wanted = math.ceil(1.2 * repeats * sample_ns / max(elapsed, 1))
        repeats = min(10 * repeats, wanted, most)


def interleaved(
    calls: Mapping[Name, Callable[[], object]],
    paces: Mapping[Name, Pace],
    rounds: int,
    clock: Clock,
) -> dict[Name, list[float]]:
    """Microseconds per call of every contender in every round; the order rotates by one."""
    names = list(calls)
    samples: dict[Name, list[float]] = {name: [] for name in names}
    with gc_paused():
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                repeats = paces[name].repeats
                elapsed = elapsed_ns(calls[name], repeats, clock)
                samples[name].append(elapsed / repeats / 1000)
    return samples


def elapsed_ns(call: Callable[[], object], repeats: int, clock: Clock) -> int:
    """Nanoseconds that `repeats` calls take together."""
    if isinstance(clock, Stopwatch):
        return clock.time_ns(call, repeats)
    start = clock()
    for _ in range(repeats):
        call()
    return clock() - start


def remark(clock: Clock, call: Callable[[], object]) -> str:
    """What a reader of the call's time must know; '' if nothing."""
    return clock.remark(call) if isinstance(clock, Stopwatch) else ""
