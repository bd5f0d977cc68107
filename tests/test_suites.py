"""The suites of the harness, on tiny sizes. Nothing here asserts a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from rich.console import Console

from benchmarks.__main__ import parse
from benchmarks.goals import goal_rows
from benchmarks.numerics import Expected, judge
from benchmarks.progress import Progress
from benchmarks.providers import NotServed
from benchmarks.record import ERROR, NOT_SERVED, OK, WRONG, Results, SuiteRecord
from benchmarks.report import write_report
from benchmarks.roofline import percent_of_item
from benchmarks.run import Settings, new_results
from benchmarks.shapes import DTYPES
from benchmarks.suites import SUITES, command, runner
from benchmarks.suites.item import Item, Memory, Ready, Request, Suite, Work
from benchmarks.suites.table import losses, print_suites
from benchmarks.timing import Pace

SETTINGS = Settings("quick", rounds=3, memory=False)


@pytest.fixture(scope="module")
def empty() -> Results:
    return new_results(SETTINGS)


@pytest.fixture
def results(empty: Results) -> Results:
    return replace(empty, suites=[], skipped=[])


def contender(value: float = 1.0) -> Ready:
    """Computes `value`; 1.0 is right."""
    y = torch.full((4,), value)
    expected = Expected({"y": torch.ones(4, dtype=torch.float64)}, {"y": torch.ones(4)})
    return Ready(
        calls={"F": lambda: y + 0, "B": lambda: y * 2},
        check=lambda: judge([("y", y)], expected),
        memory=lambda: Memory(16, 8),
        work={"F": Work(1000, 16)},
    )


def crashing() -> Ready:
    raise RuntimeError("no such kernel\nand more")


def crashes_at_its_check() -> Ready:
    return replace(contender(), check=crashing)


def has_nothing_for_the_case() -> Ready:
    raise NotServed("it has no dropout")


def item(**makers: Callable[[], Ready]) -> Item:
    return Item("thing", {"M": 4}, "fp32", ("F", "B"), "base", lambda: makers)


def run_item(it: Item, results: Results, settings: Settings = SETTINGS, left: float = 1e9) -> None:
    runner.run_item("test", it, settings, results, time.monotonic() + left)


def by_provider(results: Results) -> dict[str, list[SuiteRecord]]:
    names = dict.fromkeys(r.provider for r in results.suites)
    return {name: [r for r in results.suites if r.provider == name] for name in names}


# The runner


def test_what_is_wrong_or_crashes_is_reported_and_not_timed(results: Results, tmp_path) -> None:
    makers = {"base": contender, "wrong": partial(contender, 1.5), "crash": crashing}
    run_item(item(**makers, late=crashes_at_its_check), results)
    found = by_provider(results)
    assert [r.status for r in found["base"]] == [OK, OK]
    assert all(r.timed and len(r.samples_us) == 3 and r.ratio == 1 for r in found["base"])
    assert all(r.status == WRONG and not r.timed for r in found["wrong"])
    assert found["wrong"][0].message.startswith("y: max error 0.5")
    for name in ("crash", "late"):
        assert all(r.status == ERROR and not r.timed for r in found[name])
        assert found[name][0].message == "RuntimeError: no such kernel"
    forward, backward = found["base"]
    assert (forward.flops, forward.bytes_moved) == (1000, 16) and backward.flops is None
    assert forward.peak_bytes is None and (backward.peak_bytes, backward.held_bytes) == (16, 8)
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json").to_dict() == results.to_dict()


def test_what_is_not_served_is_no_failure(results: Results, tmp_path: Path) -> None:
    def no_memory() -> Memory:
        raise NotServed("it has no dropout")

    late = partial(replace, contender(), memory=no_memory)
    run_item(item(base=contender, absent=has_nothing_for_the_case, late=late), results)
    found = by_provider(results)
    for name in ("absent", "late"):
        assert [(r.status, r.message) for r in found[name]] == [
            (NOT_SERVED, "it has no dropout")
        ] * 2
    console = Console(record=True, width=150, file=(tmp_path / "terminal").open("w"))
    print_suites(console, results.suites)
    assert "Not served: absent on test: thing M=4 fp32: it has no dropout" in console.export_text()


def test_without_its_base_an_item_has_no_times(results: Results) -> None:
    run_item(item(base=crashing, other=contender), results)
    assert results.skipped == ["test: thing fp32 M=4 (its base, base, failed)"]
    assert not any(r.timed for r in results.suites)
    assert {r.provider for r in results.suites if r.status == ERROR} == {"base"}


def test_data_that_cannot_be_made_costs_its_item(results: Results) -> None:
    def no_data() -> dict[str, Callable[[], Ready]]:
        raise MemoryError("too large")

    run_item(replace(item(), contenders=no_data), results)
    assert results.skipped == ["test: thing fp32 M=4 (MemoryError: too large)"]


def test_items_beyond_the_budget_are_named(results: Results) -> None:
    run_item(item(base=contender), results, left=-1)
    assert results.skipped == ["test: thing fp32 M=4 (no time left)"] and not results.suites


@pytest.mark.parametrize(("left", "rounds"), [(1e9, 9), (13.5, 6), (5.0, 0)])
def test_fewer_rounds_where_the_time_is_short(
    results: Results, monkeypatch: pytest.MonkeyPatch, left: float, rounds: int
) -> None:
    """A round is said to last two seconds: one contender, two passes."""
    monkeypatch.setattr(runner, "pace_of", lambda call, clock: Pace(1, 1_000_000_000))
    run_item(item(base=contender), results, replace(SETTINGS, rounds=9), left)
    timed = [r for r in results.suites if r.timed]
    assert [len(r.samples_us) for r in timed] == ([rounds] * 2 if rounds else [])
    assert len(results.skipped) == (rounds == 0)


def test_a_suite_saves_after_every_item(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    saved = []

    def second() -> dict[str, Callable[[], Ready]]:
        saved.extend(Results.load(path).suites)
        return {"base": contender}

    todo = [item(base=contender), replace(item(), contenders=second)]
    suite = Suite("test", "", 1.0, lambda request: todo)
    request = Request(False, "cpu", DTYPES)
    runner.run_suite(suite, request, SETTINGS, results, Progress(None), path)
    assert len(saved) == 2 and len(results.suites) == 4


def test_a_suite_without_items_says_so(results: Results) -> None:
    suite = Suite("test", "", 1.0, lambda request: [])
    request = Request(False, "cpu", ("fp16",))
    runner.run_suite(suite, request, SETTINGS, results, Progress(None))
    assert results.skipped == ["test (it has no items for quick, fp16 on cpu)"]


# Roofs and tables


def record(provider: str, samples: list[float], **changes) -> SuiteRecord:
    base = {"item": "thing", "shape": {"M": 4}, "dtype": "fp32", "pass_": "F", "base": "frozen"}
    made = SuiteRecord(suite="s", provider=provider, status=OK, message="", **(base | changes))
    made.set_times(1, samples, [1.0] * len(samples))
    return made


def test_roof_is_the_slower_of_arithmetic_and_memory() -> None:
    machine = {"gemm_gflops": {"fp32": 100.0}, "copy_gbytes": 10.0}
    slow = record("ours", [4.0], flops=100_000, bytes_moved=20_000)
    assert percent_of_item(machine, slow) == pytest.approx(50)  # 1 µs of arithmetic, 2 of memory
    assert percent_of_item(machine, replace(slow, bytes_moved=5_000)) == pytest.approx(25)
    assert percent_of_item({"gemm_gflops": {"fp32": 100.0}}, slow) is None
    assert percent_of_item(machine, replace(slow, dtype="fp16")) is None
    assert percent_of_item(machine, replace(slow, flops=None)) is None


def test_losses_are_to_what_computes_the_same() -> None:
    cell = {"frozen": 1.0, "naive": 2.0, "smart": 1.5, "compile-naive": 1.1, "full": 0.5}
    ours = {"ours": 1.8, "ours-cpu-own": 9.0, "compile-ours": 1.0, "ours-fp32": 9.0}
    found = losses([record(name, [us] * 5) for name, us in (cell | ours).items()])
    assert [(loss.record.provider, loss.rival) for loss in found] == [("ours", "smart")]
    assert found[0].ratio.median == pytest.approx(1.2)


def test_tables_and_the_report_show_it_all(results: Results, tmp_path: Path) -> None:
    run_item(item(base=contender, wrong=partial(contender, 1.5)), results)
    only_memory = Item(
        "peak", {"M": 4}, "fp32", ("F+B",), "base",
        lambda: {"base": lambda: replace(contender(), calls={})},
    )  # fmt: skip
    run_item(only_memory, results)
    console = Console(record=True, width=150, file=(tmp_path / "terminal").open("w"))
    print_suites(console, results.suites)
    text = console.export_text()
    assert "test, fp32, F+B: peak memory above inputs and parameters: allocator / resident" in text
    assert "16 B" in text
    assert "test, fp32, F: time ÷ base" in text and "WRONG wrong on test: thing M=4" in text
    write_report(results, goal_rows(results), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 1000


# The command line


def test_command_line_names_suites() -> None:
    assert parse([]).suite == ["layer"]
    assert parse(["--suite", "kernel", "group"]).suite == ["kernel", "group"]
    assert parse(["--suite", "all"]).suite == ["layer", *SUITES, "claims"]
    assert parse(["--fresh-process", "--no-fresh-process"]).fresh_process is False
    assert parse(["--m", "4"]).m == [4]


def test_options_of_the_layers_are_refused_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--m", "4"], ["--cold"]):
        with pytest.raises(SystemExit):
            parse(["--suite", "kernel", "group", *option])
        sentence = f"{option[0]} is for the suite layer alone, got --suite kernel group"
        assert sentence in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--suite", "decode", "--providers", "peers"])
    sentence = "--providers is for the suites layer and memory alone, got --suite decode"
    assert sentence in capsys.readouterr().err
    assert parse(["--suite", "memory", "layer", "--providers", "peers"]).providers == ["peers"]


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_suite_has_items_of_their_own_names(name: str, device: str) -> None:
    few, every = (
        [item.label for item in SUITES[name].items(Request(full, device, DTYPES))]
        for full in (False, True)
    )
    assert few and len(set(few)) == len(few) and len(set(every)) == len(every) >= len(few)
    only = SUITES[name].items(Request(True, device, ("bf16",)))
    assert {item.dtype for item in only} == {"bf16"}


def test_a_suite_in_a_process_of_its_own() -> None:
    arguments = ["--rounds", "2", "--dtype", "fp32", "--budget", "300", "--suite", "layer"]
    done = command.run_in_fresh_processes(["overhead"], arguments, Console(quiet=True))
    assert done is not None and done.settings["suites"] == ["overhead"]
    assert done.suites and not done.records
    assert all(r.status == OK and r.timed for r in done.suites), [r.message for r in done.suites]


def test_budget_of_a_quick_suite_is_its_own(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {}
    monkeypatch.setattr(
        command, "run_suite", lambda suite, request, settings, *rest: given.update(
            {(suite.name, request.full, settings.budget_s): 1}
        )
    )  # fmt: skip
    for full, budget in ((False, None), (True, None), (True, 5.0)):
        request, settings = Request(full, "cpu", DTYPES), replace(SETTINGS, budget_s=budget)
        command.run_suites(["group"], request, settings, results, None, None)
    own = SUITES["group"].quick_seconds
    assert list(given) == [("group", False, own), ("group", True, None), ("group", True, 5.0)]
    assert math.isfinite(own)
