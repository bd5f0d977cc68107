"""Choosing on GPUs without one: candidates, model, check, timing, and what is left of them."""

from __future__ import annotations

import json
import multiprocessing
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fused import (
    FusedLoRALinear,
    LoRAWeights,
    backends,
    dispatch,
    explain,
    gpu_choice,
    gpu_store,
    gpu_tuning,
    lora_linear,
    lora_linear_group,
    selfcheck,
    small_check,
)
from lora_fused.backends import torch_ops
from lora_fused.config import Config, Problem
from lora_fused.devices import DEVICES
from lora_fused.testing import check_case, make_case
from tests import fake_backend
from tests.gpu_double import Clock, forget, pretended_gpu

NEEDS = frozenset({"x", "lora_A", "lora_B"})
PROBLEM = Problem(8192, 4096, 4096, 16, torch.bfloat16, "cuda", needs=NEEDS, device=DEVICES["H100"])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("LORA_FUSED_CACHE_DIR", str(tmp_path))
    with pretended_gpu():
        yield


def run(M: int = 24, dropout_p: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> None:
    check_case(make_case(M, 64, 48, 16, dtype, bias=True, dropout_p=dropout_p))


def config_of(M: int = 24) -> Config:
    case = make_case(M, 64, 48, 16, torch.bfloat16)
    tensors = [t.requires_grad_() for t in (case.x, case.weight, case.lora_A, case.lora_B)]
    return dispatch.route_for(*tensors, None, False, "auto").config


# --- by the model -------------------------------------------------------------------------------


@pytest.mark.parametrize("device", sorted(DEVICES))
@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 20_000), st.integers(1, 9000), st.integers(1, 9000)),
    st.integers(0, 512),
    st.sets(st.sampled_from(sorted(NEEDS))),
    st.booleans(),
    st.booleans(),
)
def test_only_legal_configurations_and_the_library_always(
    device: str,
    sizes: tuple[int, int, int],
    R: int,
    needs: set[str],
    dropout: bool,
    given_mask: bool,
) -> None:
    M, K, N = sizes
    problem = Problem(
        M, K, N, R, torch.bfloat16, "cuda", dropout=dropout, needs=frozenset(needs),
        device=DEVICES[device], given_mask=given_mask,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.BACKENDS, "triton", fake_backend)  # type: ignore[arg-type]
        gpu_choice.options.cache_clear()
        config = gpu_choice.configure_by_model(problem, ("triton",))
        for part in gpu_choice.parts_of(problem):
            found = gpu_choice.options(problem, part, ("triton",))
            assert [o.name for o in found].count("library") == 1
            assert list(found) == sorted(found, key=lambda o: o.predicted_us)
            listed = gpu_choice.shortlist(found)
            assert listed[0].is_library and len(listed) <= 4 and len(set(listed)) == len(listed)
            legal = {
                (c.strategy, c.tiles)
                for c in fake_backend.candidates(problem, DEVICES[device], part)
            } | {("library", None)}
            if part != "reduce":
                assert (getattr(config, part), config.tiles(part)) in legal
        if given_mask:
            assert {config.forward, config.dx} <= {"library", "split"}
        if R == 0:
            assert config.backend == "torch"
        gpu_choice.options.cache_clear()


def test_a_gpu_without_our_kernels_takes_the_library() -> None:
    with pretended_gpu(names=()):
        run()
        config = config_of()
        assert config.backend == "torch" and config.forward == config.dx == "library"
        assert any(
            note.startswith("triton: it is not in this installation") for note in config.notes
        )


def test_large_problems_by_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FUSED_AUTOTUNE", "0")
    with pretended_gpu(names=("cuda", "triton")):
        config = dispatch.choose(PROBLEM)
        assert config.backend == "cuda" and config.forward == "s_first"
        assert config.predicted_us is not None and config.measured_us is None
        assert dispatch.choose(PROBLEM, "triton").backend == "triton"
        few = dispatch.choose(replace(PROBLEM, M=4))
        assert few.forward == "decode"


# --- the self-check -----------------------------------------------------------------------------


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


# --- timing -------------------------------------------------------------------------------------


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


@pytest.mark.usefixtures("gpu")
def test_nothing_is_measured_under_capture_but_later(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.001, shrink_matmul=0.0001, reduce=0.0001)
    monkeypatch.setattr(gpu_tuning, "stopwatch", clock)
    monkeypatch.setattr(gpu_tuning, "may_measure", lambda where: False)
    assert config_of().backend == "torch" and clock.runs == 0
    assert not gpu_store.answers(DEVICES["H100"], "check")
    monkeypatch.setattr(gpu_tuning, "may_measure", lambda where: True)
    assert config_of().backend == "triton" and clock.runs > 0
    monkeypatch.setattr(gpu_tuning, "may_measure", lambda where: False)
    assert config_of().backend == "triton", "what is known is used under capture, too"


@pytest.mark.parametrize(
    ("capturing", "same_stream", "allowed"),
    [(False, True, True), (True, True, False), (False, False, False)],
)
def test_when_a_gpu_may_be_measured(
    capturing: bool, same_stream: bool, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda where: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: 0 if same_stream else 1)
    assert gpu_tuning.may_measure(torch.device("cuda", 0)) is allowed
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not gpu_tuning.may_measure(torch.device("cuda", 0))


# --- on disk ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": "something else", "us": {}}', "\x00\xff"])
def test_damaged_and_foreign_files_are_ignored_with_one_warning(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(0.001, shrink_matmul=0.0001)
    monkeypatch.setattr(gpu_tuning, "stopwatch", clock)
    config_of()
    files = list(gpu_store.directory(DEVICES["H100"]).glob("*.json"))
    assert len(files) > 3
    for file in files:
        file.write_text(text)
    forget()
    runs = clock.runs
    with pytest.warns(UserWarning, match="lora_fused: ignoring") as caught:
        config = config_of()
    assert len(caught) == 1 and config.backend == "triton" and clock.runs > runs
    for file in files:
        assert "key" in json.loads(file.read_text())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("times", [{"library": "fast"}, {"triton x": 1.0}, 3, {}])
def test_an_answer_that_makes_no_sense_is_timed_again(
    times: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(0.001, shrink_matmul=0.0001)
    monkeypatch.setattr(gpu_tuning, "stopwatch", clock)
    config_of()
    for file in gpu_store.directory(DEVICES["H100"]).glob("timing*.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "us": times}))
    forget()
    runs = clock.runs
    assert config_of().backend == "triton" and clock.runs > runs


@pytest.mark.usefixtures("gpu")
def test_answers_belong_to_a_device_and_its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    h100, a100 = DEVICES["H100"], DEVICES["A100"]
    gpu_store.remember(h100, "timing", "k", {"us": {"library": 1.0}})
    assert gpu_store.recall(h100, "timing", "k") == {"key": "k", "us": {"library": 1.0}}
    assert gpu_store.recall(a100, "timing", "k") is None
    assert gpu_store.recall(replace(h100, capability=91), "timing", "k") is None
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert gpu_store.recall(h100, "timing", "k") is None


def _store(number: int) -> None:
    for i in range(20):
        gpu_store.remember(DEVICES["H100"], "timing", f"{number} {i}", {"us": {"library": i}})
        gpu_store.remember(DEVICES["H100"], "timing", f"both {i}", {"us": {"library": i}})


@pytest.mark.usefixtures("gpu")
def test_processes_that_write_at_once_lose_nothing() -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_store, args=(n,)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = gpu_store.answers(DEVICES["H100"], "timing")
    assert len(found) == 3 * 20 + 20
    assert not list(gpu_store.directory(DEVICES["H100"]).glob("*.tmp"))


@pytest.mark.usefixtures("gpu")
def test_threads_that_ask_at_once_measure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.001, shrink_matmul=0.0001)
    monkeypatch.setattr(gpu_tuning, "stopwatch", clock)
    threads = [threading.Thread(target=config_of) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = clock.runs
    forget()
    for file in gpu_store.directory(DEVICES["H100"]).glob("timing*"):
        file.unlink()
    config_of()
    assert clock.runs == 2 * alone


@pytest.mark.usefixtures("gpu")
def test_a_disk_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("LORA_FUSED_CACHE_DIR", str(blocked / "sub"))
    monkeypatch.setattr(gpu_tuning, "stopwatch", Clock(0.001, shrink_matmul=0.0001))
    with pytest.warns(UserWarning, match="cannot remember"):
        config = config_of()
    assert config.backend == "triton"


# --- what surrounds it --------------------------------------------------------------------------


def group_call(dropout_p: float = 0.2) -> list[torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(24, 64, dtype=torch.bfloat16, requires_grad=True)
    group = [
        LoRAWeights(torch.randn(n, 64, dtype=x.dtype) / 8, torch.randn(8, 64, dtype=x.dtype) / 8,
                    torch.randn(n, 8, dtype=x.dtype).requires_grad_(), 1.5, dropout_p=p)
        for n, p in ((48, 0.0), (32, dropout_p))
    ]  # fmt: skip
    ys = lora_linear_group(x, group)
    torch.autograd.backward([y.sum() for y in ys])
    assert x.grad is not None and all(m.lora_B.grad is not None for m in group)
    return ys


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_a_group_is_run_as_one_where_that_is_faster(
    dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(0.001, group=0.0001, shrink_matmul=0.0002, reduce=0.0002)
    monkeypatch.setattr(gpu_tuning, "stopwatch", clock)
    group_call(dropout_p)
    timed = clock.runs
    fake_backend.calls.clear()
    group_call(dropout_p)
    assert fake_backend.calls == ["group_forward", "group_backward"] and clock.runs == timed
    keys = [answer["key"] for answer in gpu_store.answers(DEVICES["H100"], "timing")]
    assert sum("48r8 32r8" in key for key in keys) == 3


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("fault", ["slow", "wrong", "missing"])
def test_a_group_is_run_layer_by_layer_where_its_launches_are_no_good(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"group": 0.002, "shrink_matmul": 0.0002, "reduce": 0.0002}
    monkeypatch.setattr(gpu_tuning, "stopwatch", Clock(0.001, **times))
    if fault == "missing":
        monkeypatch.delattr(fake_backend, "group_forward")
    original = fake_backend.group_forward if fault == "wrong" else None

    def wrong(*args):  # type: ignore[no-untyped-def]
        ys, s = original(*args)  # type: ignore[misc]
        ys[-1][0, 0] += 3
        return ys, s

    if fault == "wrong":
        monkeypatch.setattr(fake_backend, "group_forward", wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group_call()
    fake_backend.calls.clear()
    ys = group_call()
    assert [y.shape[-1] for y in ys] == [48, 32]
    assert not {"group_forward", "group_backward"} & set(fake_backend.calls)
    assert "shrink_matmul forward" in fake_backend.calls


def test_the_library_draws_its_mask_on_a_gpu() -> None:
    with pretended_gpu(names=()):
        case = make_case(64, 64, 48, 16)
        x = case.x.requires_grad_()
        torch.manual_seed(3)
        y = lora_linear(x, case.weight, case.lora_A, case.lora_B, 1.0, dropout_p=0.5)
        y.backward(case.dy)
        torch.manual_seed(3)
        again = lora_linear(x, case.weight, case.lora_A, case.lora_B, 1.0, dropout_p=0.5)
        assert torch.equal(y, again)
        kept = (y - case.x @ case.weight.t()).detach()
        assert kept.abs().max() > 0
        seeded = [
            lora_linear(
                x,
                case.weight,
                case.lora_A,
                case.lora_B,
                1.0,
                dropout_p=0.5,
                seed=7,
                backend="torch",
            )
            for _ in range(2)
        ]
        assert torch.equal(*seeded)
    ours = lora_linear(x, case.weight, case.lora_A, case.lora_B, 1.0, dropout_p=0.5, seed=7)
    torch.testing.assert_close(seeded[0], ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_the_library_on_gpus(
    dropout_p: float, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    original_problem, original = dispatch.problem_of, torch_ops.rank_first
    monkeypatch.setattr(
        dispatch, "problem_of", lambda *args: replace(original_problem(*args), device_type="cuda")
    )
    seen: list[str] = []
    monkeypatch.setattr(
        torch_ops, "rank_first", lambda *args: seen.append("rank first") or original(*args)
    )
    check_case(make_case(24, 64, 48, 16, dtype, bias=bias, dropout_p=dropout_p), "torch")
    assert seen == ["rank first"] * 2
    check_case(make_case(24, 64, 48, 0, dtype, bias=bias), "torch")
    assert len(seen) == 2


# --- explain ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpu")
def test_explain_tells_times_and_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(route, direction, *rest):  # type: ignore[no-untyped-def]
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(gpu_tuning, "stopwatch", Clock(0.001, shrink=0.0007, reduce=0.002))
    monkeypatch.setattr(fake_backend, "shrink_matmul", wrong)
    layer = FusedLoRALinear(4096, 4096, r=16, dtype=torch.bfloat16)
    x = torch.randn(64, 4096, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = str(explain(layer, x))
    assert "M=64 K=4096 N=4096 R=16 bfloat16 on H100" in text
    assert "runs on  triton: forward split" in text and "dx split" in text
    assert "us modelled" in text and "us measured, all launches of the layer" in text
    assert "forward: triton split 128x256x64" in text
    assert "not triton s_first" in text and "demoted, RuntimeError: no kernel image" in text
    assert "cuda: it is not in this installation" in text
    assert "the native CPU kernels" not in text


@pytest.mark.usefixtures("gpu")
def test_explain_tells_what_was_slower_when_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tuning, "stopwatch", Clock(0.001, shrink=0.002, reduce=0.002))
    layer = FusedLoRALinear(4096, 4096, r=16, dtype=torch.bfloat16)
    text = str(explain(layer, torch.randn(64, 4096, dtype=torch.bfloat16)))
    assert "runs on  torch: forward library" in text
    assert "forward: library" in text and "1000.0 us measured" in text
    assert "2000.0 us measured: measured slower" in text
