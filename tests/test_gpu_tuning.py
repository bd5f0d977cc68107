"""Candidates are timed once for a bucket of sizes; the library keeps what is not clearly slower."""

from __future__ import annotations

import pytest
import torch

from lora_fused import (
    gpu_store,
    gpu_tuning,
)
from lora_fused.devices import DEVICES
from tests import fake_backend
from tests.gpu_double import Clock, config_of, forget, run


@pytest.mark.usefixtures("gpu")
def test_slow_kernels_end_on_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.001, shrink=0.0011, matmul=0.0011, reduce=0.0011)
    monkeypatch.setattr(gpu_tuning, "stopwatch", clock)
    run()
    config = config_of()
    assert config.backend == "torch" and config.forward == config.dx == "library"
    assert config.measured_us == pytest.approx(3000)


@pytest.mark.usefixtures("gpu")
def test_a_kernel_must_be_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tuning, "stopwatch", Clock(0.001, shrink=0.00099, reduce=0.00099))
    run()
    assert config_of().backend == "torch"


@pytest.mark.usefixtures("gpu")
def test_parts_are_chosen_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.001, **{"shrink_matmul dx": 0.0005, "shrink": 0.002, "reduce": 0.002})
    monkeypatch.setattr(gpu_tuning, "stopwatch", clock)
    run()
    config = config_of()
    assert config.backend == "triton" and config.forward == "library"
    assert config.dx in ("s_first", "one_pass") and config.reduce_tiles is None
    run(dropout_p=0.3)


@pytest.mark.usefixtures("gpu")
def test_a_bucket_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.001, shrink_matmul=0.0001)
    monkeypatch.setattr(gpu_tuning, "stopwatch", clock)
    config_of(24)
    runs = clock.runs
    assert runs > 0
    for M in (32, 17):  # the bucket of 24
        config_of(M)
    assert clock.runs == runs
    config_of(33)
    assert clock.runs > runs
    runs = clock.runs
    forget()
    config_of(24)
    assert clock.runs == runs, "the answers are on disk"


@pytest.mark.usefixtures("gpu")
def test_a_candidate_that_fails_when_timed_has_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tuning, "stopwatch", Clock(0.001, shrink_matmul=0.0001))
    original = fake_backend.shrink_matmul

    def fails_when_large(route, *rest):  # type: ignore[no-untyped-def]
        if route.problem.N == 48:
            raise RuntimeError("out of resource")
        return original(route, *rest)

    monkeypatch.setattr(fake_backend, "shrink_matmul", fails_when_large)
    with pytest.warns(UserWarning, match="failed when it was timed: out of resource"):
        run()
    assert config_of().forward in ("library", "split")


def test_the_budget() -> None:
    assert sum(gpu_tuning.BUDGET_SECONDS.values()) <= 0.5
    calls = {"a": 0, "b": 0}

    def run_of(name: str) -> object:
        def call() -> None:
            calls[name] += 1

        return call

    times = gpu_tuning.fastest_times(
        {"a": run_of("a"), "b": run_of("b")},
        10.0,
        lambda run: run() or 2.0,  # type: ignore[func-returns-value]
    )
    assert times == {"a": 2.0, "b": 2.0}
    assert calls["a"] <= 4 and calls["b"] <= 4, "a call that would overrun the budget is not begun"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("reason", ["variable", "deterministic"])
def test_timing_can_be_switched_off(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.001)
    monkeypatch.setattr(gpu_tuning, "stopwatch", clock)
    if reason == "variable":
        monkeypatch.setenv("LORA_FUSED_AUTOTUNE", "0")
        run()
    else:
        torch.use_deterministic_algorithms(True)
        try:
            run()
        finally:
            torch.use_deterministic_algorithms(False)
    assert clock.runs == 0 and not list(gpu_store.directory(DEVICES["H100"]).glob("timing*"))
