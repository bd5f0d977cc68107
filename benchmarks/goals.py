"""The project's speed and memory goals, each beside what this run measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.memory import SECTION_CASE
from benchmarks.providers import FROZEN, OURS, PEFT, PREPACKED
from benchmarks.record import OK, MemoryRecord, Record, Results
from benchmarks.shapes import FORWARD, FORWARD_BACKWARD, PASSES
from benchmarks.summary import GOAL_RANK, NOISE, against_best, dropout_costs, excess_over_frozen
from benchmarks.timing import geometric_mean

SET_ON = (
    "The goals were set on an AMD Zen 4 (EPYC) with AVX512-BF16 and without AMX, torch 2.13, one "
    "thread. They are ratios to torch's own GEMM, which differs by machine: MKL's fp32 is slow on "
    "AMD; oneDNN's bf16 is several times faster where there is AMX. A goal that is missed, or met, "
    "on another CPU family says as much about that GEMM as about lora_fused."
)
_MKL = "relative to MKL, which is slow on AMD: not claimed for Intel"


@dataclass(frozen=True)
class GoalRow:
    """`met` is None where this run had no case for the goal."""

    goal: str
    pass_: str
    limit: str
    measured: str
    met: bool | None
    note: str = ""

    @property
    def status(self) -> str:
        return {True: "met", False: "not met", None: "not measured"}[self.met]


@dataclass(frozen=True)
class _TaxGoal:
    """Geometric mean of the median taxes of one class, at most `limits` (F, F+B)."""

    text: str
    dtype: str
    has: Callable[[int], bool]
    provider: str
    limits: tuple[float, float]
    note: str = ""


_TAX_GOALS = (
    _TaxGoal("bf16, M ≥ 512", "bf16", lambda M: M >= 512, OURS, (1.05, 1.05)),
    _TaxGoal("bf16, M ≥ 512, prepacked", "bf16", lambda M: M >= 512, PREPACKED, (1.00, 1.00)),
    _TaxGoal("bf16, M = 128, prepacked", "bf16", lambda M: M == 128, PREPACKED, (0.95, 0.95)),
    _TaxGoal("bf16, M = 16, prepacked", "bf16", lambda M: M == 16, PREPACKED, (0.75, 0.75)),
    _TaxGoal("bf16, M = 1", "bf16", lambda M: M == 1, OURS, (0.50, 0.55)),
    _TaxGoal("fp32, M ≥ 128", "fp32", lambda M: M >= 128, OURS, (0.90, 0.90), _MKL),
    _TaxGoal("fp32, M ≥ 128, prepacked", "fp32", lambda M: M >= 128, PREPACKED, (0.80, 0.80), _MKL),
    _TaxGoal("fp16, M ≥ 16", "fp16", lambda M: M >= 16, OURS, (0.35, 0.15),
             "torch has no fast fp16 on CPUs without AVX512-FP16"),
)  # fmt: skip
_DROPOUT_LIMIT = 1.03
_PEAK_SHARE = 0.85
_MEMORY_SHARE = 0.5


def goal_rows(results: Results) -> list[GoalRow]:
    """All goals, in the order of the project's list. They are of CPUs: a GPU's run has none."""
    if results.settings.get("device", "cpu") != "cpu":
        return []
    records = results.records
    return [
        *(row for goal in _TAX_GOALS for row in _tax_rows(goal, records)),
        *(row for name in (OURS, PREPACKED) for row in _dropout_rows(name, records)),
        *(_rivalry_row(name, records) for name in (OURS, PREPACKED)),
        *_peak_rows(results),
        _memory_row(results.memory),
    ]


def _tax_rows(goal: _TaxGoal, records: Sequence[Record]) -> list[GoalRow]:
    rows = []
    for pass_, limit in zip(PASSES, goal.limits, strict=True):
        own = [
            r
            for r in records
            if (r.provider, r.dtype, r.pass_, r.dropout) == (goal.provider, goal.dtype, pass_, 0.0)
            and goal.has(r.M)
            and r.R <= GOAL_RANK
        ]
        taxes = [r.tax for r in own if r.tax is not None]
        failed = sum(r.status != OK for r in own)
        if not taxes:
            measured, met = ("wrong", False) if failed else ("-", None)
            rows.append(GoalRow(goal.text, pass_, f"≤ {limit:.2f}", measured, met, goal.note))
            continue
        mean = geometric_mean(taxes)
        notes = [f"{len(taxes)} cases, {min(taxes):.2f} to {max(taxes):.2f}"]
        notes += [f"{failed} more with wrong numerics, so not met"] * bool(failed)
        notes += [goal.note] * bool(goal.note)
        met = mean <= limit and not failed
        note = "; ".join(notes)
        rows.append(GoalRow(goal.text, pass_, f"≤ {limit:.2f}", f"{mean:.3f}", met, note))
    return rows


def _dropout_rows(provider: str, records: Sequence[Record]) -> list[GoalRow]:
    rows = []
    ours, peft = _mean_cost(records, provider), _mean_cost(records, PEFT)
    prepacked = ", prepacked" if provider == PREPACKED else ""
    for pass_ in PASSES:
        goal = f"dropout 0.05 adds{prepacked}"
        if pass_ not in ours:
            rows.append(GoalRow(goal, pass_, "≤ 3 %", "-", None))
            continue
        note = f"PEFT {peft[pass_] - 1:+.0%}" if pass_ in peft else ""
        measured = f"{ours[pass_] - 1:+.1%}"
        rows.append(GoalRow(goal, pass_, "≤ 3 %", measured, ours[pass_] <= _DROPOUT_LIMIT, note))
    return rows


def _mean_cost(records: Sequence[Record], provider: str) -> dict[str, float]:
    """{pass: time with dropout / without}, geometric mean over all dtypes."""
    costs = dropout_costs([r for r in records if r.R <= GOAL_RANK], provider)
    by_pass = {
        p: [c.tax for (_, q), c in costs.items() if q == p for _ in range(c.cases)] for p in PASSES
    }
    return {pass_: geometric_mean(values) for pass_, values in by_pass.items() if values}


def _rivalry_row(provider: str, records: Sequence[Record]) -> GoalRow:
    rivalries = against_best(records, provider)
    goal = f"never slower than the best of naive, smart torch and PEFT{_suffix(provider)}"
    limit = f"0 cells > {NOISE:.2f}"
    if not rivalries:
        return GoalRow(goal, "both", limit, "-", None)
    worse = sum(r.is_worse for r in rivalries)
    worst = rivalries[0]
    note = (
        f"worst {worst.ratio.median:.2f} of {worst.rival}: {worst.record.layer_key} "
        f"{worst.record.dtype} M={worst.record.M} r={worst.record.R} "
        f"p={worst.record.dropout:g} {worst.record.pass_}"
    )
    return GoalRow(goal, "both", limit, f"{worse} of {len(rivalries)} cells", worse == 0, note)


def _peak_rows(results: Results) -> list[GoalRow]:
    rows = []
    for dtype in ("bf16", "fp32"):
        peak = results.machine["peak_gflops"].get(dtype)
        goal = f"{dtype} FLOP/s of the FMA peak, M ≥ 512, K, N ≥ 2048"
        for provider in (OURS, PREPACKED):
            rates = _big_rates(results.records, dtype, provider)
            if not rates or not peak or results.machine["threads"] != 1:
                rows.append(
                    GoalRow(goal + _suffix(provider), FORWARD, f"≥ {_PEAK_SHARE:.0%}", "-", None)
                )
                continue
            share, frozen = (
                min(rates) / peak,
                min(_big_rates(results.records, dtype, FROZEN)) / peak,
            )
            note = f"smallest of {len(rates)} cases; frozen nn.Linear {frozen:.0%}"
            note += f"; peak {peak:.0f} GFLOP/s"
            if dtype == "bf16" and results.machine["amx"]:
                note += " is AMX's, which no memory hierarchy keeps fed"
            met = share >= _PEAK_SHARE
            rows.append(
                GoalRow(
                    goal + _suffix(provider),
                    FORWARD,
                    f"≥ {_PEAK_SHARE:.0%}",
                    f"{share:.0%}",
                    met,
                    note,
                )
            )
    return rows


def _big_rates(records: Sequence[Record], dtype: str, provider: str) -> list[float]:
    return [
        r.gflops
        for r in records
        if r.gflops is not None
        and (r.provider, r.dtype, r.pass_) == (provider, dtype, FORWARD)
        and r.M >= 512
        and min(r.K, r.N) >= 2048
        and r.R <= GOAL_RANK
        and not r.dropout
    ]


def _memory_row(memory: Sequence[MemoryRecord]) -> GoalRow:
    layer = SECTION_CASE.layer
    goal = (
        f"peak memory above the frozen layer, M = {SECTION_CASE.M}, {layer.K} x {layer.N}, bf16, "
        "fp32 adapters, dropout 0.05"
    )
    limit = f"≤ {_MEMORY_SHARE:.0%} of PEFT's"
    allocated = excess_over_frozen({m.provider: m.peak_bytes for m in memory})
    resident = excess_over_frozen({m.provider: m.resident_bytes for m in memory})
    shares = {
        name: max(excess[OURS], 0) / excess[PEFT]
        for name, excess in (("resident", resident), ("torch's allocator", allocated))
        if OURS in excess and excess.get(PEFT, 0) > 0
    }
    if not shares:
        return GoalRow(goal, FORWARD_BACKWARD, limit, "-", None)
    worst = max(shares.values())
    note = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return GoalRow(goal, FORWARD_BACKWARD, limit, f"{worst:.1%}", worst <= _MEMORY_SHARE, note)


def _suffix(provider: str) -> str:
    return ", prepacked" if provider == PREPACKED else ""
