"""The HTML report of a real result file with made-up suites: what it shows, that it is one file."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from rich.console import Console

from benchmarks import model_gpu
from benchmarks.figures.roofline import roofline
from benchmarks.figures.strategy import strategy_maps
from benchmarks.goals import goal_rows
from benchmarks.providers import FROZEN, OURS, PEFT
from benchmarks.record import ERROR, OK, WRONG, Results, SuiteRecord
from benchmarks.report import write_report
from benchmarks.report.suites import sections
from benchmarks.roofline import percent_table, roof_rows
from benchmarks.strategy import StrategyMap, maps_of_this_machine, modelled_map
from benchmarks.summary import against_best, class_means, failures, remarks
from benchmarks.table import machine_lines, print_results, with_interval
from benchmarks.timing import Interval, mean_interval
from lora_fused.config import Problem
from lora_fused.devices import DEVICES
from lora_fused.dispatch import choose

RESULT = (
    Path(__file__).parent.parent / "benchmarks" / "results" / "2026-11-25-amd-zen4-vm-quick.json"
)
ROOFS = {
    "copy_gbytes": 20.0,
    "gemm_gflops": {"bf16": 200.0, "fp32": 90.0, "fp16": 20.0},
    "before": {"load": [0.5, 0.5, 0.5], "cpu_mhz": 2600},
    "after": {"load": [1.0, 1.0, 0.5], "cpu_mhz": 2601, "gpu": {"power.draw": "612.31 W"}},
}


def suite_record(suite: str, item: str, provider: str, base: str, times: float) -> SuiteRecord:
    """A record whose median is 100 µs for the base and `times` of it for the others."""
    record = SuiteRecord(
        suite, item, {"M": 16, "K": 64}, "bf16", "F", provider, base, OK, "",
        error_ratio=1.1, peak_bytes=3 << 20, flops=2_000_000, bytes_moved=500_000,
    )  # fmt: skip
    base_samples = [100.0, 101.0, 99.0, 100.0, 100.5]
    record.set_times(1, [times * s for s in base_samples], base_samples)
    return record


def suite_records() -> list[SuiteRecord]:
    """Two suites; in the first a wrong provider and a crashing one, in the second no times."""
    bad = [
        SuiteRecord("kernel", "shrink", {"M": 16}, "bf16", "F", name, FROZEN, status, message)
        for name, status, message in (("liar", WRONG, "y is off"), ("crash", ERROR, "no kernel"))
    ]
    peak = SuiteRecord("memory", "block", {"M": 16}, "bf16", "step", OURS, PEFT, OK, "")
    return [
        suite_record("kernel", "shrink", FROZEN, FROZEN, 1.0),
        suite_record("kernel", "shrink", OURS, FROZEN, 1.25),
        suite_record("kernel", "<reduce>", "own & only", FROZEN, 0.5),
        *bad,
        replace(peak, peak_bytes=5 << 20, held_bytes=3 << 20, resident_bytes=7 << 20),
    ]


@pytest.fixture(scope="module")
def results() -> Results:
    """The committed run, as if its machine's roofs had been measured and suites had run."""
    loaded = Results.load(RESULT)
    maps = [
        vars(StrategyMap("this CPU", False, "bf16", 64, 64, [1, 16], [8], [["cpu own", "library"]],
                         [["cpu own", "library"]]))
    ]  # fmt: skip
    machine = {**loaded.machine, **ROOFS, "strategy_maps": maps}
    records = [r for r in loaded.records if r.dtype != "fp32"]  # fewer figures to draw
    return replace(loaded, records=records, machine=machine, suites=suite_records())


@pytest.fixture(scope="module")
def page(results: Results, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(results, goal_rows(results), path)
    return path.read_text()


def section(page: str, anchor: str) -> str:
    """From one h2 to the next."""
    found = re.search(rf'<h2 id="{anchor}">.*?(?=<h2|</body>)', page, re.S)
    assert found is not None, f"no section {anchor}"
    return found[0]


def test_what_is_remarks_is_no_failure(results: Results, tmp_path: Path) -> None:
    """A provider may say of a case that it has nothing for it."""
    record = next(r for r in results.records if r.provider == PEFT and r.pass_ == "F+B")
    record = replace(record, message="timed without a CUDA graph (no)")
    odd = replace(
        record, provider="odd", status="not served", message="no bias [3]", tax=None, median_us=None
    )
    alone = replace(results, records=[record, odd], suites=[])
    assert failures(alone.records) == []
    assert remarks(alone.records) == {("odd", "no bias [3]"): 1, (PEFT, record.message): 1}
    write_report(alone, [], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "PEFT: timed without a CUDA graph (no) (1 records)" in page
    assert "odd: no bias [3] (1 records)" in page and "failed" not in section(page, "numerics")
    console = Console(record=True, width=200)
    print_results(console, alone, [])
    text = console.export_text()
    assert "odd: no bias [3] (1 records)" in text and "NOT SERVED" not in text


# One file, readable on a phone


def test_the_page_needs_no_other_file(page: str) -> None:
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)
    assert "@import" not in page and "url(" not in page and "<script" not in page


def test_every_link_leads_somewhere(page: str) -> None:
    links = re.findall(r'href="#([^"]+)"', page)
    assert {"tax", "roofline", "strategy", "suite-kernel", "suite-memory"} <= set(links)
    assert all(f'id="{link}"' in page for link in links)


def test_nothing_is_wider_than_a_phone(page: str) -> None:
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    tables = page.count("<table")
    assert tables > 8 and tables == len(re.findall(r'<div class="scroll"><table', page))
    assert ".scroll { overflow-x: auto;" in page
    images = page.count("<img")
    inside = sum(
        figures.count("<img") for figures in re.findall(r'<div class="figures">.*?</div>', page)
    )
    assert images == inside > 10 and ".figures img { width: 100%;" in page


def test_a_run_of_suites_alone_has_no_empty_sections(results: Results, tmp_path: Path) -> None:
    alone = replace(results, records=[], memory=[])
    write_report(alone, goal_rows(alone), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    headings = re.findall(r'<h2 id="([^"]+)">', page)
    assert headings == ["roofline", "strategy", "suite-kernel", "suite-memory", "provenance"]
    assert re.findall(r'href="#([^"]+)"', page) == headings
    assert "goals met" not in page


# Intervals


def test_the_mean_of_intervals() -> None:
    one = Interval(2.0, 1.0, 4.0)
    alone = mean_interval([one])
    assert (alone.median, alone.low, alone.high) == pytest.approx((2.0, 1.0, 4.0))
    four = mean_interval([one] * 4)  # four independent medians: half the width in logarithms
    assert (four.median, four.low, four.high) == pytest.approx((2.0, 2**0.5, 2 * 2**0.5))


def test_intervals_stand_in_the_table_and_the_report(results: Results, page: str) -> None:
    assert with_interval(1.04, 1.02, 1.06) == "1.04±.02"
    assert with_interval(1.04, None, None) == "1.04" and with_interval(3, 1, 5) == "3.00±2.00"
    mean = class_means(results.records)["bf16", "16"][OURS, "F"]
    assert mean.low < mean.tax < mean.high
    said = with_interval(mean.tax, mean.low, mean.high)
    assert said in section(page, "classes")
    console = Console(record=True, width=250)
    print_results(console, results, [])
    text = console.export_text()
    assert said in text
    worst = max(against_best(results.records, OURS), key=lambda r: r.ratio.median).interval
    assert with_interval(worst.median, worst.low, worst.high) in text
    assert re.search(f">{worst.low:.2f} . {worst.high:.2f}<", page)


@pytest.mark.parametrize("width", [80, 120])
def test_no_cell_of_the_table_is_cut(results: Results, width: int) -> None:
    console = Console(record=True, width=width)
    print_results(console, results, [])
    text = console.export_text()
    classes = text[: text.index("Worst cells")]
    percents = percent_table(results)
    assert percents is not None and "Per cent of the measured roofs" in classes
    assert all(cell in classes for _, _, cells in percents.rows for cell in cells)
    assert "…" not in classes
    for (dtype, M), row in class_means(results.records).items():
        for mean in (m for (name, _), m in row.items() if name != FROZEN):
            assert with_interval(mean.tax, mean.low, mean.high) in classes, (dtype, M)


# Roofs


def test_the_roofline_shows_the_measured_roofs(results: Results, page: str) -> None:
    assert "20.0 GB/s read and written" in section(page, "roofline")
    rows = {row.dtype: row for row in roof_rows(results)}
    assert rows["bf16"].roofs.ridge == 10 and rows["bf16"].fma_gflops == pytest.approx(236.1)
    assert roofline(results, "bf16", "F") is not None
    table = percent_table(results)
    assert table is not None and {FROZEN, OURS, PEFT} <= set(table.names)
    cells = {(dtype, M): cells for dtype, M, cells in table.rows}
    own = [
        r for r in results.records
        if (r.provider, r.dtype, r.M, r.pass_, r.dropout) == (OURS, "fp16", 128, "F", 0.0)
    ]  # fmt: skip
    assert len(own) == 1 and own[0].gflops is not None  # beyond the ridge: the GEMM's roof counts
    assert cells["fp16", "128"][table.names.index(OURS)] == f"{100 * own[0].gflops / 20:.0f}"


def test_a_file_without_roofs_and_suites_has_a_report_too(tmp_path: Path) -> None:
    bare = Results.load(RESULT)
    for measured in ("copy_gbytes", "gemm_gflops", "strategy_maps"):
        bare.machine.pop(measured, None)
    bare.save(tmp_path / "old.json")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", tmp_path / "old.json", tmp_path / "old.html"],
        capture_output=True, text=True, check=True, cwd=RESULT.parents[2],
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / "old.html")
    page = (tmp_path / "old.html").read_text()
    assert 'id="roofline"' not in page and "Suite " not in page and 'id="strategy"' in page
    assert roof_rows(bare) == []


def test_the_state_before_and_after_is_told(results: Results, page: str) -> None:
    lines = dict(machine_lines(results))
    assert lines["before the run"] == "load 0.5 0.5 0.5, CPU 2600 MHz"
    assert lines["after the run"].endswith("power.draw 612.31 W")
    assert lines["threads"] == "1, timed by CPU time"
    for eager, words in ((False, "device time of CUDA graphs"), (True, "wall clock of eager")):
        on_gpu = replace(results, settings={"device": "cuda", "eager": eager})
        assert words in dict(machine_lines(on_gpu))["threads"]
    assert lines["measured roofs"].endswith("GFLOP/s, copy 20.0 GB/s")
    assert all(line in page for line in lines.values() if "&" not in line)


# Strategy maps


def test_the_map_of_this_machine_is_the_dispatchers_answer() -> None:
    for found in maps_of_this_machine("cpu"):
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[found.dtype]
        for i, R in enumerate(found.ranks):
            for j, M in enumerate(found.tokens):
                problem = Problem(
                    M, found.K, found.N, R, dtype, adapter_dtype=dtype,
                    needs=frozenset({"x", "lora_A", "lora_B"}), threads=torch.get_num_threads(),
                )  # fmt: skip
                config = choose(problem)
                assert found.forward[i][j].split()[-1] == config.forward
                assert found.dx[i][j].split()[-1] == config.dx
        assert not found.modelled


@pytest.mark.parametrize("name", ["H100", "A100", "RTX 4090"])
def test_the_modelled_map_says_what_model_gpu_says(name: str) -> None:
    found = modelled_map(name)
    assert found.modelled and found.device == name
    for R in (16, 64):
        for M in (1, 16, 2048, 8192):
            i, j = found.ranks.index(R), found.tokens.index(M)
            for direction, cells in (("forward", found.forward), ("backward", found.dx)):
                chosen = model_gpu.row(DEVICES[name], direction, M, found.K, found.N, R).chosen
                said = cells[i][j]
                assert said == chosen or (said == "library" and chosen.endswith(" library"))


def test_equal_directions_share_a_figure() -> None:
    one = StrategyMap("X", True, "bf16", 8, 8, [1], [8], [["cuda split"]], [["cuda split"]])
    assert len(strategy_maps(one)) == 1
    assert len(strategy_maps(replace(one, dx=[["library"]]))) == 2


def test_the_report_labels_what_is_modelled(page: str) -> None:
    strategies = section(page, "strategy")
    here, modelled = strategies.split('<h3 id="modelled">On GPUs: modelled</h3>')
    assert here.count("<img") == 1, "forward and dx of the made-up map are the same"
    assert modelled.count("<img") >= 3 and "Nothing here was measured" in modelled


# Suites


def test_a_section_per_suite(page: str) -> None:
    kernel = section(page, "suite-kernel")
    assert "1.25±.00" in kernel and "divided by those of frozen nn.Linear" in kernel
    assert "WRONG</b> liar on shrink, bf16, F: y is off" in kernel
    assert "ERROR</b> crash on shrink, bf16, F: no kernel" in kernel
    assert "&lt;reduce&gt;" in kernel and "own &amp; only" in kernel
    memory = section(page, "suite-memory")
    for kind, size in (("allocator&#39;s", "5.0"), ("left for", "3.0"), ("resident", "7.0")):
        assert f"{kind} " in memory and f"{size} MiB" in memory, kind
    assert "bf16, step" in memory


def test_suites_keep_their_order_and_their_own_numbers() -> None:
    kernel, memory = sections(suite_records(), {**ROOFS, "peak_gflops": {}})
    assert (kernel.name, memory.name) == ("kernel", "memory")
    assert kernel.bases == [FROZEN] and memory.bases == []
    ratio, peak = kernel.tables
    assert ratio.names == [OURS, "own & only"], "the base's ratio is 1 and is not shown"
    assert dict(ratio.rows)["shrink K=64"] == ["1.25±.00", "-"]
    assert dict(peak.rows)["shrink K=64"] == ["3.0 MiB", "3.0 MiB", "-"]
    assert [r.status for r in kernel.failures] == [WRONG, ERROR]
    assert len(kernel.figures) == 3, "ratios, the roofline, peaks"
    assert [table.rows for table in memory.tables] == [
        [("block", [size])] for size in ("5.0 MiB", "3.0 MiB", "7.0 MiB")
    ]
    assert len(memory.figures) == 3
    without_roofs, _ = sections(suite_records(), {"peak_gflops": {}})
    assert len(without_roofs.figures) == 2 and sections([], {}) == []
