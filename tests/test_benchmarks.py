"""The benchmark harness itself. Nothing here asserts a time."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from rich.console import Console

from benchmarks import run as run_module
from benchmarks.__main__ import cases_of, parse
from benchmarks.goals import goal_rows
from benchmarks.memory import SECTION_CASE, allocated_bytes, measure_in_fresh_process
from benchmarks.providers import (
    FROZEN,
    NAIVE,
    OURS,
    PEFT,
    PREPACKED,
    PROVIDERS,
    SMART,
    Provider,
)
from benchmarks.record import OK, WRONG, Results
from benchmarks.report import write_report
from benchmarks.run import Settings, run
from benchmarks.shapes import LAYERS, Case, Layer, flops, parse_layer, quick_cases
from benchmarks.summary import against_best, class_means, dropout_costs
from benchmarks.table import print_header, print_results
from benchmarks.tensors import CaseTensors, make_tensors
from benchmarks.timing import Pace, Quantiles, geometric_mean, interleaved, pace_of, paired_ratio

LAYER = Layer("tiny", "layer", 96, 64, bias=True)
CASE = Case(LAYER, "fp32", 4, 4, (0.0, 0.05))
SETTINGS = Settings("quick", rounds=3, memory=False)


def wrong_layer(t: CaseTensors, dropout: float) -> Callable[[Tensor], Tensor]:
    """Forgets the scaling."""
    return lambda x: torch.nn.functional.linear(x, t.w, t.bias) + x @ t.a.t() @ t.b.t()


def crashing_layer(t: CaseTensors, dropout: float) -> Callable[[Tensor], Tensor]:
    raise RuntimeError("no such kernel")


EXTRA = (
    Provider("wrong", "wrong on purpose", wrong_layer),
    Provider("crash", "crashes on purpose", crashing_layer),
    Provider("absent", "not there", wrong_layer, needs="no_such_package_anywhere"),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """One tiny run with every provider, and with a wrong, a crashing and a missing one."""
    threads = torch.get_num_threads()
    path = tmp_path_factory.mktemp("run") / "results.json"
    try:
        done = run(SETTINGS, [CASE], (*PROVIDERS, *EXTRA), save_to=path)
    finally:
        torch.set_num_threads(threads)
    assert Results.load(path).to_dict() == done.to_dict()
    return done


# Statistics on made-up samples


def test_quantiles_interpolate() -> None:
    q = Quantiles.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (q.q25, q.median, q.q75) == (2.0, 3.0, 4.0)
    assert (q.q10, q.q90) == pytest.approx((1.4, 4.6))
    assert Quantiles.of([7.0]) == Quantiles(7.0, 7.0, 7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="quantiles of nothing"):
        Quantiles.of([])


def test_paired_ratio_cancels_noise_of_a_round() -> None:
    noise = [1.0, 3.0, 0.5, 10.0, 1.2]
    ratio = paired_ratio([1.1 * n for n in noise], noise)
    assert ratio.q10 == pytest.approx(1.1) and ratio.q90 == pytest.approx(1.1)
    with pytest.raises(ValueError, match="equal numbers, got 2 and 1"):
        paired_ratio([1.0, 2.0], [1.0])


def test_geometric_mean() -> None:
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)


def test_interleaving_rotates_the_order_and_counts_the_repeats() -> None:
    now, order = 0, []

    def call(name: str, ns: int) -> Callable[[], None]:
        def run_it() -> None:
            nonlocal now
            now += ns
            order.append(name)

        return run_it

    calls = {"a": call("a", 1000), "b": call("b", 3000)}
    samples = interleaved(calls, {"a": Pace(2, 0), "b": Pace(1, 0)}, rounds=3, clock=lambda: now)
    assert samples == {"a": [1.0] * 3, "b": [3.0] * 3}
    assert "".join(order) == "aab" + "baa" + "aab"


def test_pace_makes_samples_long_enough() -> None:
    now = 0

    def call() -> None:
        nonlocal now
        now += 7_000

    pace = pace_of(call, lambda: now, sample_ns=100_000)
    assert pace.sample_ns == pace.repeats * 7_000 >= 100_000
    assert pace_of(call, lambda: now, sample_ns=10).repeats == 1


# Cases


def test_flops() -> None:
    assert flops(LAYER, 4, 0, "F") == 2 * 4 * 96 * 64
    assert flops(LAYER, 4, 4, "F") - flops(LAYER, 4, 0, "F") == 2 * 4 * 4 * (96 + 64)
    assert flops(LAYER, 4, 4, "F+B") == 4 * 4 * 96 * 64 + 6 * 4 * 4 * (96 + 64)


def test_quick_cases_reach_every_class_of_the_goals() -> None:
    cases = quick_cases()
    assert len(cases) == len(set(cases))
    assert {(c.dtype, c.M) for c in cases} >= {
        *(("bf16", M) for M in (1, 16, 128, 512, 2048)),
        *(("fp32", M) for M in (1, 16, 128, 512)),
        ("fp16", 16), ("fp16", 128),
    }  # fmt: skip
    assert {c.R for c in cases} == {8, 16, 64}
    assert {c.layer.model for c in cases} >= {"gpt2", "roberta-large", "llama-3.2-1b", "qwen2.5-7b"}
    assert any(len(c.dropouts) == 2 for c in cases)


def test_command_line_selects_cases() -> None:
    assert len(cases_of(parse([]))) == len(quick_cases())
    assert {c.dtype for c in cases_of(parse(["--dtype", "fp32"]))} == {"fp32"}
    (case,) = cases_of(parse(["--full", "--layers=64x96", "--m=4", "--r=2", "--dtype=bf16"]))
    assert (case.layer.K, case.layer.N, case.M, case.R) == (64, 96, 4, 2)
    assert {layer.model for layer in parse_layer("gpt2")} == {"gpt2"}
    with pytest.raises(ValueError, match="no layer is called 'gpt5'"):
        parse_layer("gpt5")


@pytest.mark.parametrize("layer", LAYERS[:3], ids=lambda layer: layer.key)
def test_tensors_have_the_layout_of_the_model(layer: Layer) -> None:
    t = make_tensors(Case(layer, "bf16", 2, 8))
    assert t.w.shape == (layer.N, layer.K) and t.stored_weight.is_contiguous()
    assert t.w.is_contiguous() is not layer.fan_in_fan_out
    copy = t.copy_of_parameters()
    assert (
        torch.equal(copy.w, t.w)
        and copy.w.data_ptr() != t.w.data_ptr()
        and copy.w.stride() == t.w.stride()
    )


# A run from end to end


def test_every_provider_is_checked_and_timed(results: Results) -> None:
    present = {p.name for p in PROVIDERS if p.missing() is None}
    assert present >= {FROZEN, NAIVE, SMART, OURS}
    for name in present:
        own = [r for r in results.records if r.provider == name]
        dropouts = (0.0,) if name == FROZEN else (0.0, 0.05)
        assert {(r.pass_, r.dropout) for r in own} == {
            (p, d) for p in ("F", "F+B") for d in dropouts
        }
        for r in own:
            assert r.status == OK and r.timed, (name, r.message)
            assert len(r.samples_us) == 3 and r.repeats and r.gflops and r.tax
            assert (r.ratio_to_peft is not None) == (PEFT in present)
            replayable = r.dropout == 0 or name in (OURS, PREPACKED)
            assert (r.error_ratio is not None) == replayable
            assert (r.peak_bytes is not None) == (r.pass_ == "F+B")
    assert all(r.tax == 1 for r in results.records if r.provider == FROZEN)
    assert all(r.ratio_to_peft == 1 for r in results.records if r.provider == PEFT)


def test_wrong_and_crashing_providers_are_shown_and_not_timed(results: Results) -> None:
    wrong = [r for r in results.records if r.provider == "wrong" and r.dropout == 0]
    assert len(wrong) == 2 and all(r.status == WRONG and not r.timed for r in wrong)
    assert wrong[0].error_ratio is not None and wrong[0].error_ratio > 100
    crash = [r for r in results.records if r.provider == "crash"]
    assert crash and all(r.message == "RuntimeError: no such kernel" and not r.timed for r in crash)
    assert [p["missing"] for p in results.providers if p["name"] == "absent"] == [
        "no_such_package_anywhere is not installed"
    ]


def test_summaries_quote_the_records(results: Results) -> None:
    means = class_means(results.records)
    taxes = [r.tax for r in results.records if (r.provider, r.pass_, r.dropout) == (OURS, "F", 0.0)]
    assert means["fp32", "4"][OURS, "F"].tax == pytest.approx(taxes[0])
    assert "wrong" not in {name for name, _ in means["fp32", "4"]}
    assert {r.rival for r in against_best(results.records, OURS)} <= {NAIVE, SMART, PEFT}
    assert len(against_best(results.records, OURS)) == 4
    assert set(dropout_costs(results.records, OURS)) == {("fp32", "F"), ("fp32", "F+B")}


def test_report_and_tables_show_it_all(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    goals = goal_rows(results)
    write_report(results, goals, path)
    page = path.read_text()
    assert "<title>" in page and page.count("data:image/svg+xml;base64,") >= 5
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page), (
        "the report must not need another file"
    )
    for text in (
        "not there",
        "no_such_package_anywhere is not installed",
        "WRONG",
        "ERROR",
        "Zen 4",
    ):
        assert text in page
    for g in goals:
        assert g.status in page

    console = Console(width=200, record=True, file=(tmp_path / "terminal").open("w"))
    print_header(console, results)
    print_results(console, results, goals)
    text = console.export_text()
    assert "left out: no_such_package_anywhere is not installed" in text
    assert "WRONG wrong on tiny.layer" in text and "ERROR crash on tiny.layer" in text


def test_goals_are_met_missed_or_not_measured(results: Results) -> None:
    record = next(
        r for r in results.records if (r.provider, r.pass_, r.dropout) == (OURS, "F", 0.0)
    )
    fast = replace(record, dtype="bf16", M=1, R=16, tax=0.4)
    slow = replace(fast, pass_="F+B", tax=0.7)
    rows = {(g.goal, g.pass_): g for g in goal_rows(replace(results, records=[fast, slow]))}
    assert rows["bf16, M = 1", "F"].met is True and rows["bf16, M = 1", "F"].measured == "0.400"
    assert rows["bf16, M = 1", "F+B"].met is False
    assert rows["bf16, M ≥ 512", "F"].status == "not measured"

    wrong = replace(fast, status=WRONG, tax=None)
    (row,) = (
        g for g in goal_rows(replace(results, records=[fast, wrong])) if g.measured == "0.400"
    )
    assert row.met is False and "1 more with wrong numerics" in row.note


def test_schema_refuses_what_it_does_not_know(results: Results) -> None:
    document = json.loads(json.dumps(results.to_dict()))
    assert Results.from_dict(document).to_dict() == results.to_dict()
    for change, message in (
        ({"schema_version": 99}, "version 99"),
        ({"surprise": 1}, "unknown fields"),
        ({"created": 5}, "results.created: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            Results.from_dict(document | change)
    del document["records"][0]["tax"]
    with pytest.raises(ValueError, match=r"records\[0\]: missing fields \['tax'\]"):
        Results.from_dict(document)
    for other, message in (
        ([], "expected a JSON object, got list"),
        (results.to_dict() | {"records": [5]}, r"records\[0\]: expected an object, got 5"),
        (results.to_dict() | {"memory": [5]}, r"memory\[0\]: expected an object, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            Results.from_dict(other)


def test_cases_beyond_the_budget_are_named() -> None:
    late = run(replace(SETTINGS, budget_s=0.0), [CASE], PROVIDERS[:2])
    assert late.records == [] and late.skipped == [f"{CASE.label} (no time left)"]


def test_cold_rotates_over_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "cache_bytes", lambda: {"L2": 30_000})
    done = run(replace(SETTINGS, cold=True), [replace(CASE, dropouts=(0.0,))], PROVIDERS)
    assert all(r.status == OK and r.timed for r in done.records)


# Memory


def test_allocated_bytes_sees_temporaries() -> None:
    x = torch.ones(1000, dtype=torch.float64)
    assert allocated_bytes(x.neg) == (8000, 8000)
    assert allocated_bytes(lambda: x.neg().abs()) == (16000, 8000)


def test_memory_in_a_fresh_process() -> None:
    case = replace(SECTION_CASE, layer=LAYER, M=8)
    memory = measure_in_fresh_process(SMART, 1, case)
    assert memory.provider == SMART and memory.peak_bytes > 8 * 64 * 2
