"""`python -m benchmarks --compare`: what counts as a change between two runs."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("rich")

from rich.console import Console

from benchmarks.compare import compare, show
from benchmarks.providers import FROZEN, OURS
from benchmarks.record import OK, WRONG, Results, SuiteRecord
from benchmarks.run import Settings, run
from benchmarks.shapes import Case, Layer
from benchmarks.timing import bootstrap

CASE = Case(Layer("tiny", "layer", 32, 24), "fp32", 4, 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Results:
    results = run(Settings("quick", rounds=9, memory=False), [CASE])
    results.records = [r for r in results.records if r.provider in (FROZEN, OURS)]
    return results


def timed(results: Results, tax: float, spread: float, hour: float = 1.0) -> Results:
    """The same cells with made-up samples: ours takes `tax` times the frozen layer's time."""
    draw = random.Random(7)
    records = []
    for record in results.records:
        factor = 1.0 if record.provider == FROZEN else tax
        samples = [100 * hour * factor * (1 + spread * (draw.random() - 0.5)) for _ in range(9)]
        records.append(replace(record, samples_us=samples, median_us=sorted(samples)[4]))
    return replace(results, records=records)


def test_a_slower_machine_is_no_change(made: Results) -> None:
    changes = compare(timed(made, 1.2, 0.02), timed(made, 1.2, 0.02, hour=3.0))
    assert len(changes) == 2 and not any(change.significant for change in changes)


def test_a_real_change_is_significant(made: Results) -> None:
    slower = compare(timed(made, 1.0, 0.02), timed(made, 1.2, 0.02))
    assert all(change.significant and change.ratio > 1.1 for change in slower)
    faster = compare(timed(made, 1.2, 0.02), timed(made, 1.0, 0.02))
    assert all(change.significant and change.ratio < 0.9 for change in faster)


def test_noise_and_small_changes_are_not(made: Results) -> None:
    noisy = compare(timed(made, 1.0, 1.5), timed(made, 1.1, 1.5))
    small = compare(timed(made, 1.0, 0.001), timed(made, 1.03, 0.001))
    assert not any(change.significant for change in (*noisy, *small))


def test_the_table_counts_and_names(made: Results) -> None:
    console = Console(record=True, width=200)
    show(console, compare(timed(made, 1.0, 0.02), timed(made, 1.3, 0.02)))
    said = console.export_text()
    assert "tiny.layer" in said and "2 cells in both: 2 slower, 0 faster, 0 without" in said


# Suites other than the layers'


def suite_results(made: Results, ratio: float, spread: float = 0.02, hour: float = 1.0) -> Results:
    """The same items with made-up samples: ours takes `ratio` times the base's time."""
    draw = random.Random(11)
    records = []
    for suite, item, base in (("decode", "gpt2", "merged"), ("block", "llama", "peft")):
        for provider, factor in ((base, 1.0), (OURS, ratio)):
            record = SuiteRecord(suite, item, {"M": 1}, "bf16", "F", provider, base, OK, "")
            samples = [100 * hour * factor * (1 + spread * (draw.random() - 0.5)) for _ in range(9)]
            record.set_times(1, samples, samples)
            records.append(record)
    broken = SuiteRecord("decode", "gpt2", {"M": 1}, "bf16", "F", "broken", "merged", WRONG, "off")
    return replace(made, records=[], suites=[*records, broken])


def test_suites_are_compared_by_their_own_base(made: Results) -> None:
    same = compare(suite_results(made, 1.2), suite_results(made, 1.2, hour=3.0))
    assert {(c.cell.suite, c.cell.provider) for c in same} == {("decode", OURS), ("block", OURS)}
    assert not any(change.significant for change in same)
    slower = compare(suite_results(made, 1.0), suite_results(made, 1.3))
    assert len(slower) == 2
    assert all(c.significant and c.ratio == pytest.approx(1.3, abs=0.03) for c in slower)


def test_what_one_run_did_not_time_is_no_change(made: Results) -> None:
    after = suite_results(made, 1.3)
    after.suites = [r for r in after.suites if r.provider != "merged"]
    changes = compare(suite_results(made, 1.0), after)
    assert [c.cell.suite for c in changes] == ["block"], "decode has lost its base"
    assert ("M=1", "broken") not in {(c.cell.sizes, c.cell.provider) for c in changes}


def test_the_table_counts_suite_by_suite(made: Results) -> None:
    before, after = timed(made, 1.0, 0.02), timed(made, 1.3, 0.02)
    before.suites, after.suites = suite_results(made, 1).suites, suite_results(made, 1).suites
    console = Console(record=True, width=200)
    show(console, compare(before, after))
    said = console.export_text()
    assert "layer: 2 cells in both: 2 slower, 0 faster, 0 without" in said
    assert "decode: 1 cells in both: 0 slower, 0 faster, 1 without" in said
    assert "M=4 R=4" in said and "llama" not in said


def test_nothing_of_the_table_is_cut_on_a_narrow_terminal(made: Results) -> None:
    console = Console(record=True, width=80)
    show(console, compare(suite_results(made, 1.0), suite_results(made, 1.3)))
    said = console.export_text()
    assert "…" not in said and "llama" in said and OURS in said


def test_nothing_in_common(made: Results) -> None:
    other = replace(made, records=[])
    with pytest.raises(ValueError, match="no timed case in common"):
        compare(made, other)


def test_bootstrap_brackets_the_median() -> None:
    interval = bootstrap([1.0, 2.0, 3.0, 4.0, 100.0])
    assert interval.low <= interval.median == 3.0 <= interval.high
    assert bootstrap([2.0] * 5).low == bootstrap([2.0] * 5).high == 2.0


def test_files_of_the_command_line(made: Results, tmp_path: Path, capsys, monkeypatch) -> None:
    from benchmarks import __main__ as command

    for name, tax in (("a", 1.0), ("b", 1.5)):
        timed(made, tax, 0.02).save(tmp_path / f"{name}.json")
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    monkeypatch.setattr("sys.argv", ["benchmarks", "--compare", *files])
    command.main()
    assert "2 slower" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["benchmarks", "--compare", files[0], "absent.json"])
    with pytest.raises(SystemExit, match=r"absent\.json"):
        command.main()
