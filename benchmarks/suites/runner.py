"""Every item by the harness's method: checked, then timed in turns; what fails is reported."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.progress import Progress
from benchmarks.providers import NotServed
from benchmarks.record import ERROR, NOT_SERVED, OK, Results, SuiteRecord
from benchmarks.roofline import percent_of_item
from benchmarks.run import Settings
from benchmarks.suites.item import Item, Ready, Request, Suite
from benchmarks.timing import clock_for, interleaved, pace_of, remark

FEWEST_ROUNDS = 5
"""An item for which fewer fit into the time is left out; with more, up to what was asked for."""

Records = dict[tuple[str, str], SuiteRecord]


def run_suite(
    suite: Suite,
    request: Request,
    settings: Settings,
    results: Results,
    progress: Progress,
    save_to: Path | None = None,
) -> None:
    """Adds the records of a suite. The results so far are saved after every item."""
    torch.set_num_threads(settings.threads)
    settings = replace(settings, eager=settings.eager or suite.eager)
    deadline = math.inf if settings.budget_s is None else time.monotonic() + settings.budget_s
    items = list(suite.items(request))
    if not items:
        asked = f"{'full' if request.full else 'quick'}, {', '.join(request.dtypes)}"
        results.skipped.append(f"{suite.name} (it has no items for {asked} on {request.device})")
    with progress:
        progress.start(len(items))
        for item in items:
            progress.show(f"{suite.name}: {item.label}")
            run_item(suite.name, item, settings, results, deadline)
            if save_to:
                results.save(save_to)
            progress.advance()


def run_item(suite: str, item: Item, settings: Settings, results: Results, deadline: float) -> None:
    """Adds the records of one item: one per contender and pass."""
    label = f"{suite}: {item.label}"
    if time.monotonic() > deadline:
        results.skipped.append(f"{label} (no time left)")
        return
    try:
        makers = item.contenders()
    except Exception as error:  # data that cannot be made costs its item
        results.skipped.append(f"{label} ({_sentence(error)})")
        return
    records: Records = {}
    ready: dict[str, Ready] = {}
    for name, make in makers.items():
        built, own = _prepare(suite, item, name, make)
        records |= own
        if built is not None:
            ready[name] = built
    to_time = {name: built for name, built in ready.items() if built.calls}
    if to_time and item.base not in to_time:
        results.skipped.append(f"{label} (its base, {item.base}, failed)")
    elif to_time and not _time(item, to_time, records, settings, results.machine, deadline):
        results.skipped.append(f"{label} (no time left)")
    results.suites += [r for r in records.values() if _says_something(r)]


def _prepare(
    suite: str, item: Item, name: str, make: Callable[[], Ready]
) -> tuple[Ready | None, Records]:
    """Builds, checks and measures memory. Only what is right is handed on to be timed."""
    built, memory, ratios = None, None, {}
    try:
        built = make()
        verdict = built.check()
        status, message, ratios = verdict.status, verdict.message, verdict.error_ratios
        if status == OK and built.memory is not None:
            memory = built.memory()
    except NotServed as reason:
        status, message = NOT_SERVED, str(reason)
    except Exception as error:  # a contender that crashes is reported, and the run goes on
        status, message = ERROR, _sentence(error)
    records = {}
    for pass_ in item.passes:
        work = built.work.get(pass_) if built else None
        measured = memory if pass_ == item.passes[-1] else None
        records[name, pass_] = SuiteRecord(
            suite=suite,
            item=item.name,
            shape=item.shape,
            dtype=item.dtype,
            pass_=pass_,
            provider=name,
            base=item.base,
            status=status,
            message=message,
            error_ratio=max(ratios.values(), default=None),
            peak_bytes=measured.peak_bytes if measured else None,
            held_bytes=measured.held_bytes if measured else None,
            resident_bytes=measured.resident_bytes if measured else None,
            flops=work.flops if work else None,
            bytes_moved=work.bytes_moved if work else None,
        )
    return built if status == OK else None, records


def _time(
    item: Item,
    ready: dict[str, Ready],
    records: Records,
    settings: Settings,
    machine: dict[str, object],
    deadline: float,
) -> bool:
    """Times all passes. False, and nothing timed, if too few rounds fit into the time."""
    clock = clock_for(settings.threads, settings.device, settings.eager)
    calls = {p: {name: built.calls[p] for name, built in ready.items()} for p in item.passes}
    started = time.monotonic()
    paces = {p: {n: pace_of(call, clock) for n, call in calls[p].items()} for p in item.passes}
    pacing_s = time.monotonic() - started
    # Of the wall clock, which decides, a busy machine takes more than the samples say.
    sampled_s = sum(pace.sample_ns for p in item.passes for pace in paces[p].values()) / 1e9
    round_s = max(sampled_s, pacing_s / 3)
    fitting = (deadline - time.monotonic()) / round_s
    rounds = int(min(settings.rounds, fitting))
    if rounds < min(FEWEST_ROUNDS, settings.rounds):
        return False
    for pass_ in item.passes:
        samples = interleaved(calls[pass_], paces[pass_], rounds, clock)
        for name, values in samples.items():
            record = records[name, pass_]
            record.set_times(paces[pass_][name].repeats, values, samples[item.base])
            record.roof_percent = percent_of_item(machine, record)
            remarks = (record.message, remark(clock, calls[pass_][name]))
            record.message = "; ".join(said for said in remarks if said)
    return True


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _says_something(record: SuiteRecord) -> bool:
    return record.timed or record.status != OK or record.peak_bytes is not None
