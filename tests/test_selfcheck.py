"""A kernel is checked on the device before its first use: wrong and failing ones are demoted."""

from __future__ import annotations

import warnings

import pytest
import torch

from lora_fused import (
    gpu_store,
    gpu_tuning,
    selfcheck,
    small_check,
)
from lora_fused.devices import DEVICES
from tests import fake_backend
from tests.gpu_double import PROBLEM, Clock, config_of, forget, run


@pytest.mark.usefixtures("gpu")
def test_kernels_are_checked_once_and_then_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tuning, "stopwatch", Clock(1.0, shrink_matmul=0.1, reduce_pair=0.1))
    checked: list[str] = []
    original = selfcheck.run_check
    monkeypatch.setattr(
        selfcheck, "run_check", lambda k, where: checked.append(str(k)) or original(k, where)
    )
    run()
    assert checked and len(set(checked)) == len(checked)
    first = len(checked)
    forget()
    fake_backend.calls.clear()
    run()
    assert len(checked) == first, "the verdicts are on disk"
    assert set(fake_backend.calls) <= {
        "shrink_matmul forward", "shrink_matmul dx", "reduce_pair",
    }  # fmt: skip


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("fault", ["wrong", "raises", "nan"])
def test_a_kernel_that_is_wrong_or_fails_is_demoted(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_tuning, "stopwatch", Clock(1.0, shrink_matmul=0.1))
    original = fake_backend.shrink_matmul

    def faulty(route, direction, *rest):  # type: ignore[no-untyped-def]
        if fault == "raises":
            raise RuntimeError("CUDA error: invalid configuration argument\nmore")
        y, s = original(route, direction, *rest)
        if direction == "forward":
            y[0, 0] = float("nan") if fault == "nan" else y[0, 0] + 3
        return y, s

    monkeypatch.setattr(fake_backend, "shrink_matmul", faulty)
    with pytest.warns(UserWarning, match="is not used on H100") as caught:
        run()
    messages = [str(w.message) for w in caught]
    assert len(set(messages)) == len(messages)
    assert any("forward s_first" in message for message in messages)
    assert any("doctor" in message for message in messages)
    config = config_of()
    assert config.forward in ("library", "split")
    if fault != "raises":
        assert config.dx in ("s_first", "one_pass")
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()  # remembered: no second warning, and still right


@pytest.mark.usefixtures("gpu")
def test_everything_wrong_ends_on_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no kernel image is available")

    for name in ("shrink", "shrink_matmul", "reduce_pair", "matmul", "shrink_reduce", "reduce"):
        monkeypatch.setattr(fake_backend, name, broken)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run()
        run(dropout_p=0.3)
    assert config_of().backend == "torch"


@pytest.mark.usefixtures("gpu")
def test_a_check_that_never_came_back_counts_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = small_check.Kernel(
        DEVICES["H100"], "triton", "forward", "s_first",
        fake_backend.candidates(PROBLEM, DEVICES["H100"], "forward")[1].tiles, torch.bfloat16,
    )  # fmt: skip
    running = {"state": "running", "pid": 2**22 + 1, "host": selfcheck.platform.node()}
    here = torch.device("cpu")
    gpu_store.remember(kernel.device, "check", str(kernel), {**running, "began": 0.0})
    assert selfcheck.verdict(kernel, here) == "its check never came back"
    forget()
    other = {**running, "host": "elsewhere", "began": selfcheck.time.time()}
    gpu_store.remember(kernel.device, "check", str(kernel), other)
    assert selfcheck.verdict(kernel, here) == "", "another machine is at it: check for ourselves"
