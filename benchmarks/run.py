"""A run: for every case, build the providers, check them, measure their memory, time them."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.machine import (
    cache_bytes,
    commit,
    describe_gpu,
    describe_machine,
    memory_bytes,
    state,
    versions,
)
from benchmarks.memory import SECTION_PROVIDERS, measure_in_fresh_process, peak_and_held
from benchmarks.numerics import Checker
from benchmarks.progress import Progress
from benchmarks.providers import FROZEN, PEFT, PROVIDERS, Built, NotServed, Provider
from benchmarks.record import ERROR, NOT_SERVED, OK, Record, Results
from benchmarks.shapes import FORWARD, PASSES, Case
from benchmarks.tensors import CaseTensors, make_tensors
from benchmarks.timing import clock_for, interleaved, pace_of, remark

COLD_BYTES_CAP = 1 << 30  # rotated tensors take no more, nor 1/16 of the memory: packs add to it


@dataclass(frozen=True)
class Settings:
    """How to measure. `budget_s`: cases that do not fit in it any more are skipped and named."""

    mode: str
    threads: int = 1
    rounds: int = 9
    cold: bool = False
    budget_s: float | None = None
    memory: bool = True
    device: str = "cpu"
    eager: bool = False


@dataclass(frozen=True)
class Contender:
    """A provider at one dropout; all contenders of a case meet in the same rounds."""

    provider: Provider
    dropout: float


def run(
    settings: Settings,
    cases: Sequence[Case],
    providers: Sequence[Provider] = PROVIDERS,
    progress: Progress | None = None,
    on_header: Callable[[Results], None] = lambda results: None,
    save_to: Path | None = None,
) -> Results:
    """Runs the cases in order. The results so far are saved after every case."""
    torch.set_num_threads(settings.threads)
    progress = progress or Progress(None)
    deadline = math.inf if settings.budget_s is None else time.monotonic() + settings.budget_s
    results = new_results(settings, providers)
    on_header(results)
    present = [p for p in providers if p.missing(settings.device) is None]
    if not any(p.name == FROZEN for p in present):
        raise ValueError(
            "the frozen layer is what everything is compared with; it cannot be left out"
        )
    with progress:
        progress.start(len(cases) + (len(SECTION_PROVIDERS) if settings.memory else 0))
        if settings.memory:
            _memory_section(results, present, settings.threads, progress)
        for case in cases:
            progress.show(case.label)
            run_case(case, present, settings, results, deadline)
            if save_to:
                results.save(save_to)
            progress.advance()
    results.machine["after"] = state(settings.device)
    if save_to:
        results.save(save_to)
    return results


def new_results(settings: Settings, providers: Sequence[Provider] = PROVIDERS) -> Results:
    """A result without records: where, when, and with what it is made."""
    return Results(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        settings=asdict(settings),
        machine=describe_machine(settings.threads, settings.device),
        versions=versions(),
        commit=commit(),
        providers=[
            {"name": p.name, "label": p.label, "missing": p.missing(settings.device)}
            for p in providers
        ],
    )


def run_case(
    case: Case, providers: Sequence[Provider], settings: Settings, results: Results, deadline: float
) -> None:
    """Adds the records of one case: two per provider and dropout, one per pass."""
    if time.monotonic() > deadline:
        results.skipped.append(f"{case.label} (no time left)")
        return
    copies = _parameter_copies(case, settings)
    checker = Checker(case, copies[0])
    records: dict[tuple[Contender, str], Record] = {}
    ready: dict[Contender, list[Built]] = {}
    for contender in _contenders(case, providers):
        built, pair = _prepare(contender, case, copies, checker, settings, results)
        records |= {(contender, pass_): record for pass_, record in pair.items()}
        if built:
            ready[contender] = built
    has_base = any(c.provider.name == FROZEN for c in ready)
    if has_base and not _time(case, ready, records, settings, deadline):
        results.skipped.append(f"{case.label} (no time left)")
        results.records += [r for r in records.values() if r.status != OK]
    else:
        results.records += records.values()


def _contenders(case: Case, providers: Sequence[Provider]) -> list[Contender]:
    return [
        Contender(provider, dropout)
        for provider in providers
        for dropout in (case.dropouts if provider.lora else (0.0,))
    ]


def _parameter_copies(case: Case, settings: Settings) -> list[CaseTensors]:
    """One set of tensors, or as many (x, dy and parameters) as overflow the last cache together.

    On a GPU that is for the wall clock: CUDA graphs are timed with a cache that was flushed.
    """
    tensors = make_tensors(case, device=settings.device)
    on_gpu = settings.device != "cpu"
    if not settings.cold or (on_gpu and not settings.eager):
        return [tensors]
    caches = [describe_gpu()["l2_bytes"]] if on_gpu else cache_bytes().values()
    beyond_cache = 2 * max(caches, default=64 << 20)
    wanted = min(beyond_cache, COLD_BYTES_CAP, (memory_bytes() or COLD_BYTES_CAP) // 16)
    count = max(2, math.ceil(wanted / tensors.streamed_bytes))
    return [tensors, *(tensors.copy() for _ in range(count - 1))]


def _prepare(
    contender: Contender,
    case: Case,
    copies: Sequence[CaseTensors],
    checker: Checker,
    settings: Settings,
    results: Results,
) -> tuple[list[Built], dict[str, Record]]:
    """Builds, checks and measures memory. Only what is right is handed on to be timed."""
    provider, dropout = contender.provider, contender.dropout
    built: list[Built] = []
    peak = held = None
    try:
        first = provider.build(copies[0], dropout)
        verdict = checker.check(provider, first, dropout)
        status, message = verdict.status, verdict.message
        ratios = verdict.error_ratios
        if status == OK:
            peak, held = peak_and_held(first)
            built = [first, *(provider.build(copy, dropout) for copy in copies[1:])]
    except NotServed as reason:
        status, message, ratios = NOT_SERVED, str(reason), {}
    except Exception as error:  # a provider that crashes is reported, and the run goes on
        status, ratios = ERROR, {}
        message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    layer = case.layer
    pair = {
        pass_: Record(
            machine=(results.machine["gpu"] or {"name": results.machine["cpu"]})["name"],
            versions=results.versions,
            commit=results.commit,
            threads=settings.threads,
            provider=provider.name,
            model=layer.model,
            layer=layer.name,
            dtype=case.dtype,
            M=case.M,
            K=layer.K,
            N=layer.N,
            R=case.R,
            bias=layer.bias,
            fan_in_fan_out=layer.fan_in_fan_out,
            dropout=dropout,
            pass_=pass_,
            status=status,
            message=message,
            error_ratio=max(ratios.values(), default=None),
            error_ratios=ratios,
            peak_bytes=None if pass_ == FORWARD else peak,
            held_bytes=None if pass_ == FORWARD else held,
        )
        for pass_ in PASSES
    }
    return built, pair


def _time(
    case: Case,
    ready: dict[Contender, list[Built]],
    records: dict[tuple[Contender, str], Record],
    settings: Settings,
    deadline: float,
) -> bool:
    """Times both passes. False, and nothing timed, if that would go past the deadline."""
    clock = clock_for(settings.threads, settings.device, settings.eager)
    calls = {p: {c: _call_of(built, p) for c, built in ready.items()} for p in PASSES}
    paces = {p: {c: pace_of(call, clock) for c, call in calls[p].items()} for p in PASSES}
    expected_ns = settings.rounds * sum(
        pace.sample_ns for p in PASSES for pace in paces[p].values()
    )
    if time.monotonic() + expected_ns / 1e9 > deadline:
        return False
    for pass_ in PASSES:
        samples = interleaved(calls[pass_], paces[pass_], settings.rounds, clock)
        by_name = {(c.provider.name, c.dropout): values for c, values in samples.items()}
        for contender, values in samples.items():
            record = records[contender, pass_]
            remarks = (record.message, remark(clock, calls[pass_][contender]))
            record.message = "; ".join(said for said in remarks if said)
            record.set_times(
                case,
                contender.provider.lora,
                paces[pass_][contender].repeats,
                values,
                frozen=by_name[FROZEN, 0.0],
                peft=by_name.get((PEFT, contender.dropout)),
            )
    return True


def _call_of(built: Sequence[Built], pass_: str) -> Callable[[], object]:
    calls = [b.forward if pass_ == FORWARD else b.forward_backward for b in built]
    if len(calls) == 1:
        return calls[0]
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def _memory_section(
    results: Results, present: Sequence[Provider], threads: int, progress: Progress
) -> None:
    for name in SECTION_PROVIDERS:
        progress.show(f"memory, {name}")
        if any(p.name == name for p in present):
            try:
                results.memory.append(measure_in_fresh_process(name, threads))
            except RuntimeError as error:
                results.skipped.append(f"memory of {name} ({error})")
        progress.advance()
