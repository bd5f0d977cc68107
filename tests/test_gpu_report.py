"""The GPU report's machinery, on processes that stand in for a GPU's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from rich.console import Console

from benchmarks import gpu_report
from benchmarks.__main__ import cases_of, parse
from benchmarks.goals import goal_rows
from benchmarks.parts import Part, merged, run_parts
from benchmarks.record import Results, SuiteRecord
from benchmarks.run import Settings, run
from benchmarks.shapes import DTYPES, GPU_LAYERS, Case, Layer, gpu_cases
from benchmarks.suites import SUITES

TINY = Case(Layer("tiny", "layer", 32, 24), "fp32", 4, 4)


def part(name: str, code: str, seconds: float = 60, result: Path | None = None) -> Part:
    return Part(name, (sys.executable, "-c", code), seconds, result)


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    run(Settings("quick", rounds=2, memory=False), [TINY], save_to=tmp_path / "bf16.json")
    return tmp_path / "bf16.json"


def test_a_part_that_crashes_or_hangs_costs_only_itself(measured: Path) -> None:
    todo = [
        part("doctor", "print('everything is right')"),
        part("layers bf16", "", result=measured),
        part("layers fp16", "import os; print('illegal address', flush=True); os._exit(139)"),
        part("layers fp32", "import time; time.sleep(60)", seconds=0.5),
    ]
    printed, failed = run_parts(todo, Console(quiet=True))
    assert failed == [
        "layers fp16 (exit status 139: illegal address)",
        "layers fp32 (not done after 0 s)",
    ]
    results = merged(todo, failed)
    assert results is not None and results.records
    assert results.skipped[-2:] == failed
    assert printed["doctor"] == "everything is right\n"


def test_parts_come_together(measured: Path, tmp_path: Path) -> None:
    other = Results.load(measured)
    other.suites = [SuiteRecord("kernel", "item", {"M": 1}, "fp32", "F", "ours", "torch", "ok", "")]
    other.save(tmp_path / "kernel.json")
    todo = [part("layers", "", result=measured), part("k", "", result=tmp_path / "kernel.json")]
    whole = merged(todo, ["one sentence"])
    assert whole is not None and whole.suites == other.suites
    assert len(whole.records) == 2 * len(other.records) and whole.skipped == ["one sentence"]


def test_the_report_is_one_json_and_one_page(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doctor = part("doctor", "print('everything is right')")
    monkeypatch.setattr(
        gpu_report, "parts", lambda device, folder: [doctor, part("layers", "", result=measured)]
    )
    json_path, html_path = tmp_path / "out.json", tmp_path / "out.html"
    assert gpu_report.main("cuda", json_path, html_path, Console(quiet=True)) == 0
    results = Results.load(json_path)
    assert results.settings["mode"] == "gpu-report"
    assert results.machine["doctor"] == ["everything is right"]
    assert "tiny" in html_path.read_text()


def test_nothing_measured_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [part("doctor", "raise SystemExit('no driver')")]
    monkeypatch.setattr(gpu_report, "parts", lambda device, folder: broken)
    console = Console(record=True, width=200)
    assert gpu_report.main("cuda", tmp_path / "o.json", tmp_path / "o.html", console) == 1
    assert "nothing was measured: doctor (exit status 1: no driver)" in console.export_text()


def test_the_parts_fit_in_fifteen_minutes(tmp_path: Path) -> None:
    todo = gpu_report.parts("cuda", tmp_path)
    assert sum(p.seconds for p in todo) <= 15 * 60
    suites = []
    for p in todo[1:]:
        args = parse(list(p.command[3:]))
        assert args.device == "cuda" and args.json == p.result
        assert 0 < args.budget < p.seconds
        (suite,) = args.suite
        suites.append(suite)
        if suite == "layer":
            assert {case.dtype for case in cases_of(args)} == set(args.dtype)
    assert suites == ["layer"] * len(DTYPES) + list(SUITES)


def test_gpu_cases_begin_with_training_sizes_and_reach_every_layer() -> None:
    cases = gpu_cases()
    assert cases[0].M == 8192 and cases[0].R == 16
    assert {case.layer for case in cases} == set(GPU_LAYERS)
    assert {case.M for case in cases} == {1, 16, 512, 2048, 8192}


def test_goals_of_cpus_are_not_asked_of_a_gpu(measured: Path) -> None:
    results = Results.load(measured)
    assert goal_rows(results)
    results.settings["device"] = "cuda"
    assert goal_rows(results) == []
