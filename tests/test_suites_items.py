"""What the suites of the harness measure: every contender is right, and a wrong one is caught."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich")
pytest.importorskip("peft")

from peft.tuners.lora.layer import Linear as PeftLinear

from benchmarks.memory import SECTION_CASE, SECTION_PROVIDERS, measure_in_fresh_process
from benchmarks.providers import ALL_PROVIDERS
from benchmarks.record import NOT_SERVED, OK, WRONG, Results, SuiteRecord
from benchmarks.run import Settings, new_results
from benchmarks.shapes import PASSES, Case, Layer
from benchmarks.suites import (
    compile,
    decode,
    group,
    kernel,
    layers,
    memory,
    operations,
    overhead,
    runner,
    training,
)
from benchmarks.suites.item import Item, Ready, Request
from benchmarks.suites.training import Network
from lora_fused.backends import cpu

LAYER = Layer("tiny", "layer", 96, 64, bias=True)
NATIVE = pytest.mark.skipif(not cpu.isa(), reason="the native kernels are not built")
COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile takes a C++ compiler")


@pytest.fixture(scope="module")
def empty() -> Results:
    return new_results(Settings("quick"))


def records_of(
    empty: Results, makers: Mapping[str, Callable[[], Ready]], passes: tuple[str, ...], base: str
) -> dict[tuple[str, str], SuiteRecord]:
    """Those of one item of these makers, in two rounds."""
    results = replace(empty, suites=[], skipped=[])
    item = Item("tiny", {}, "fp32", passes, base, lambda: makers)
    settings = Settings("quick", rounds=2)
    runner.run_item("test", item, settings, results, time.monotonic() + 1e9)
    assert not results.skipped
    return {(r.provider, r.pass_): r for r in results.suites}


def assert_right(records: Mapping[tuple[str, str], SuiteRecord], timed: bool = True) -> None:
    for key, r in records.items():
        assert r.status == OK and r.timed is timed, (key, r.message)


# kernel


@NATIVE
@pytest.mark.parametrize("operation", operations.OPERATIONS, ids=lambda o: o.name)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_operation_is_right(
    empty: Results, operation: operations.Operation, dtype: str
) -> None:
    case = Case(LAYER, dtype, 16, 4)
    base = "frozen" if operation.matmul else "torch"
    makers = kernel._makers(operation, case, "cpu")
    records = records_of(empty, makers, (kernel._pass(operation),), base)
    assert_right(records)
    names = {name for name, _ in records}
    assert {"torch", "ours", "ours-cpu-own"} <= names
    assert ({"frozen", "ours-cpu-hybrid", "ours-cpu-packed"} <= names) is operation.matmul
    for (name, _), r in records.items():
        assert r.flops and r.bytes_moved and r.error_ratio is not None, name


def test_an_operation_that_loses_the_rank_term_is_wrong(empty: Results) -> None:
    right = next(o for o in operations.OPERATIONS if o.name == "matmul y")

    def without_s(route: object, o: operations.Operands, packed: object) -> dict[str, Tensor]:
        return {"y": torch.nn.functional.linear(o.t.x, o.t.w, o.t.bias)}

    makers = kernel._makers(replace(right, run=without_s), Case(LAYER, "fp32", 16, 4), "cpu")
    records = records_of(empty, makers, ("F",), "frozen")
    assert records["ours", "F"].status == WRONG and records["frozen", "F"].status == OK


def test_work_of_the_operations() -> None:
    M, K, N, R = 5, 7, 11, 3
    work = {o.name: o.work(M, K, N, R) for o in operations.OPERATIONS}
    big = 2 * M * N * K
    assert work["shrink x"] == (2 * M * K * R, M * K + R * K + M * R)
    assert work["matmul y"][0] == big + 2 * M * N * R
    assert work["shrink x, matmul y"][0] == work["matmul y"][0] + work["shrink x"][0]
    assert work["matmul dx"] == (big + 2 * M * K * R, M * N + N * K + M * K + R * (M + K))
    assert work["reduce da, reduce db"][0] == 2 * M * R * (K + N)
    layer = layers.layer_work(Case(Layer("l", "l", K, N), "bf16", M, R), 0, "F")
    assert (layer.flops, layer.bytes_moved) == (big, 2 * (M * K + M * N + K * N))


# layers: decode, overhead, compile, group


def test_decode(empty: Results) -> None:
    case = Case(LAYER, "fp32", 2, 4)
    providers = layers.present(decode.CONTENDERS, "cpu")
    records = records_of(empty, layers.makers_of(case, providers, ("F",), "cpu"), ("F",), "frozen")
    assert_right(records)
    assert len(records) == len(providers)


def test_overhead_reaches_every_way_into_the_library(empty: Results) -> None:
    records = records_of(
        empty, overhead._makers(Case(LAYER, "fp32", 1, 4), "cpu"), PASSES, "frozen"
    )
    assert_right(records)
    assert {"ours", *(p.name for p in overhead.OUR_OWN)} <= {name for name, _ in records}


@COMPILER
def test_compiled_layers_are_right(empty: Results) -> None:
    providers = layers.present(("frozen", "ours"), "cpu")
    makers = compile._makers(Case(LAYER, "fp32", 4, 4), providers, "cpu")
    records = records_of(empty, makers, ("F",), "frozen")
    assert_right(records)
    assert {name for name, _ in records} == {"frozen", "ours", "compile-frozen", "compile-ours"}


GROUP = group.Group("tiny", 48, (32, 16), bias=True)


def group_makers() -> Mapping[str, Callable[[], Ready]]:
    providers = layers.present(group.CONTENDERS, "cpu")
    return group._makers(GROUP.cases("fp32", 5), providers, "cpu")


def test_groups_are_right(empty: Results) -> None:
    records = records_of(empty, group_makers(), PASSES, "frozen")
    assert_right(records)
    assert {name for name, _ in records} == {*group.CONTENDERS, group.GROUPED}


def test_a_group_that_mixes_its_members_up_is_wrong(
    empty: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = group.lora_linear_group

    def without_scaling(x: Tensor, members: list) -> list[Tensor]:
        return right(x, [replace(m, scaling=1.0) for m in members])

    monkeypatch.setattr(group, "lora_linear_group", without_scaling)
    records = records_of(empty, group_makers(), PASSES, "frozen")
    assert records[group.GROUPED, "F"].status == WRONG
    assert records["ours", "F"].status == OK


# block and model


def network(family: str, head: bool) -> Network:
    return Network("tiny", family, 48, 80, 4, 2, 2, 61, head=head)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_networks_with_and_without_us_agree(empty: Results, family: str, head: bool) -> None:
    makers = training.makers_of(network(family, head), torch.bfloat16, 12, "cpu")
    records = records_of(empty, makers, ("F", "step"), "frozen")
    assert_right(records)
    names = {name for name, _ in records}
    assert names == {"frozen", "full", "peft", "ours", "peft-fp32", "ours-fp32"}
    for name in names:
        assert records[name, "step"].peak_bytes
        assert (records[name, "step"].error_ratio is None) == (name in ("frozen", "full"))
    assert records["peft", "step"].error_ratio == pytest.approx(1)


def test_a_network_that_scales_twice_is_wrong(
    empty: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_fused.integrations import peft as integration

    def with_a_fault(model: torch.nn.Module, **options: object) -> integration.Report:
        for module in model.modules():
            if isinstance(module, PeftLinear):
                module.scaling["default"] *= 2
        return right(model, **options)

    right = integration.accelerate
    monkeypatch.setattr(integration, "accelerate", with_a_fault)
    makers = training.makers_of(network("llama", False), torch.float32, 12, "cpu")
    records = records_of(empty, makers, ("F", "step"), "frozen")
    assert set(makers) == {"frozen", "full", "peft", "ours"}
    assert records["ours", "step"].status == WRONG and records["peft", "step"].status == OK


# memory


def test_memory_is_measured_in_processes_and_not_timed(empty: Results) -> None:
    case = replace(SECTION_CASE, layer=LAYER, M=64)
    makers = memory._makers(case, layers.present(("frozen", "ours"), "cpu"), "cpu")
    records = records_of(empty, makers, ("F+B",), "frozen")
    assert_right(records, timed=False)
    assert set(records) == {("frozen", "F+B"), ("ours", "F+B")}
    for r in records.values():
        assert r.peak_bytes and r.held_bytes and r.peak_bytes >= r.held_bytes


def test_memory_of_every_provider_that_can_run(empty: Results) -> None:
    """On request any, in a full run all but those that are others with fp32 adapters anyway."""
    asked = {
        chosen: set(memory.names_of(Request(full, "cpu", ("bf16",), chosen)))
        for full, chosen in ((False, None), (False, ("loralib", "peers")), (True, ("all",)))
    }
    assert asked[None] == set(SECTION_PROVIDERS)
    assert {"frozen", "loralib", "peft-fp32", "compile-peft", "unsloth"} <= asked[
        "loralib", "peers"
    ]
    assert asked["all",] == {p.name for p in ALL_PROVIDERS}
    full = set(memory.names_of(Request(True, "cpu", ("bf16",))))
    assert asked["all",] - full == {"peft-fp32", "ours-fp32"}


def test_memory_of_peers_and_forced_strategies(empty: Results) -> None:
    case = replace(SECTION_CASE, layer=LAYER, M=64)
    names = ("frozen", "naive", "loralib", "merged", "lycoris", "peft-fp32", "ours-torch")
    providers = layers.present((*names, "ours-cpu-hybrid"), "cpu")
    records = records_of(empty, memory._makers(case, providers, "cpu"), ("F+B",), "frozen")
    for (name, _), r in records.items():
        if name == "lycoris":
            assert (r.status, r.message) == (
                NOT_SERVED, "LyCORIS drops elements of the branch's output, not of x",
            )  # fmt: skip
        else:
            assert r.status == OK and r.peak_bytes and r.held_bytes, (name, r.message)
            assert r.message == ("adapters in bf16" if name == "loralib" else "")
    assert {name for name, _ in records} == {p.name for p in providers} >= {"naive", "merged"}


@COMPILER
def test_what_compiling_takes_is_no_part_of_the_memory() -> None:
    found = measure_in_fresh_process("compile-naive", 1, replace(SECTION_CASE, layer=LAYER, M=64))
    assert found.peak_bytes > 0
    assert found.resident_bytes is None or found.resident_bytes < 8 << 20
