"""Choosing: backends, environment variables, fallbacks, the timing cache, import and fork."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path as FilePath

import pytest
import torch

from lora_fused import FusedLoRALinear, autotune, dispatch, lora_linear
from lora_fused.backends import cpu, cpu_rule, cpu_trial
from lora_fused.config import Problem
from lora_fused.testing import check_case, make_case
from tests.conftest import native_isas

needs_native = pytest.mark.skipif(not native_isas(), reason="this CPU runs no native kernels")
PROBLEM = Problem(64, 32, 48, 4, torch.float32)


# --- backends -----------------------------------------------------------------------------------


@needs_native
def test_auto_takes_the_native_kernels() -> None:
    config = dispatch.choose(PROBLEM)
    assert config.backend == "cpu" and config.isa == native_isas()[-1]
    assert config.forward in ("own", "hybrid", "library")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "there are no native kernels for float64"),
        ({"device_type": "cuda"}, "the tensors are on cuda"),
        ({"plain": False}, "a tensor is not an ordinary strided torch.Tensor"),
        ({"M": 0}, "the problem is empty"),
    ],
)
def test_reasons_against_the_native_kernels(changes: dict[str, object], reason: str) -> None:
    problem = dataclasses.replace(PROBLEM, **changes)
    assert reason in dispatch.reasons_against(problem)["cpu"]
    config = dispatch.choose(problem)
    assert config.backend == "torch" and f"cpu: {reason}" in config.notes


def test_everything_works_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "native", lambda: None)
    dispatch.forget_choices()
    for dtype in (torch.float32, torch.bfloat16):
        check_case(make_case(9, 40, 24, 4, dtype, bias=True, dropout_p=0.2))
    assert "cpu: the native kernels are not built" in dispatch.choose(PROBLEM).notes
    with pytest.raises(ValueError, match="the native kernels are not built"):
        dispatch.choose(PROBLEM, "cpu")


def test_a_cpu_without_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        supported_isas = staticmethod(lambda: [])
        facts = staticmethod(lambda *tensors: None)

    monkeypatch.setattr(cpu, "native", Module)
    dispatch.forget_choices()
    assert "cpu: the CPU has no AVX2" in dispatch.choose(PROBLEM).notes
    check_case(make_case(9, 40, 24, 4, bias=True))


def test_backend_variable_replaces_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FUSED_BACKEND", "torch")
    assert dispatch.choose(PROBLEM).backend == "torch"
    if native_isas():
        assert dispatch.choose(PROBLEM, "cpu").backend == "cpu"
    monkeypatch.setenv("LORA_FUSED_BACKEND", "gpu")
    dispatch.forget_choices()
    names = "auto, cpu, cuda, triton, torch"
    with pytest.raises(
        ValueError, match=rf"^LORA_FUSED_BACKEND is 'gpu', expected one of {names}\.$"
    ):
        dispatch.choose(PROBLEM)


@needs_native
def test_isa_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in native_isas():
        monkeypatch.setenv("LORA_FUSED_CPU_ISA", isa)
        dispatch.forget_choices()
        assert dispatch.choose(PROBLEM).isa == isa
    monkeypatch.setenv("LORA_FUSED_CPU_ISA", "sse2")
    dispatch.forget_choices()
    with pytest.raises(ValueError, match=r"^LORA_FUSED_CPU_ISA is 'sse2', expected one of avx2"):
        dispatch.choose(PROBLEM)


def test_verbose_prints_each_choice_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_FUSED_VERBOSE", "1")
    layer = FusedLoRALinear(40, 24, r=4, backend="torch")
    for _ in range(3):
        layer(torch.randn(5, 40))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(
        "lora_fused: M=5 K=40 N=24 R=4 float32 on cpu -> torch: forward library"
    )


def test_silent_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    FusedLoRALinear(40, 24, r=4)(torch.randn(5, 40))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_tiny_problems_run_on_one_thread() -> None:
    tiny = Problem(1, 32, 32, 4, torch.float32, threads=8)
    large = Problem(512, 1024, 1024, 4, torch.float32, threads=8)
    assert cpu_rule.thread_count(tiny) == 1 and cpu_rule.thread_count(large) == 8


def test_routes_follow_what_they_depend_on() -> None:
    case = make_case(9, 40, 24, 4)
    args = (case.x, case.weight, case.lora_A, case.lora_B, None, False, "auto")
    plain = dispatch.route_for(*args)
    assert dispatch.route_for(*args) is plain
    case.lora_A.requires_grad_()
    assert dispatch.route_for(*args).needs == {"lora_A"}
    with torch.no_grad():
        assert dispatch.route_for(*args).needs == frozenset()
    torch.use_deterministic_algorithms(True)
    try:
        assert dispatch.route_for(*args).problem.deterministic
    finally:
        torch.use_deterministic_algorithms(False)
    transposed = case.weight.t().contiguous().t()
    assert dispatch.route_for(case.x, transposed, *args[2:]).problem.weight_layout == "column"


def test_remembered_routes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch._routes, "most", 5)
    layer = FusedLoRALinear(8, 6, r=2)
    for tokens in range(1, 30):
        layer(torch.randn(tokens, 8))
    assert len(dispatch._routes) <= 5


# --- the timing cache ---------------------------------------------------------------------------


def candidates(log: list[str]) -> dict[str, object]:
    def fast() -> None:
        log.append("fast")

    def slow() -> None:
        log.append("slow")
        time.sleep(0.002)

    return {"slow": slow, "fast": fast}


def timing_files() -> list[FilePath]:
    return [p for p in FilePath(os.environ["LORA_FUSED_CACHE_DIR"]).rglob("*") if p.is_file()]


@pytest.fixture
def empty_cache(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> FilePath:
    monkeypatch.setenv("LORA_FUSED_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("LORA_FUSED_AUTOTUNE", raising=False)
    # Rounds enough that a busy machine cannot turn an answer.
    monkeypatch.setattr(autotune, "BUDGET_SECONDS", 3.0)
    return tmp_path / "cache"


def test_the_faster_one_wins_and_is_remembered(empty_cache: FilePath) -> None:
    log: list[str] = []
    assert autotune.best("key", candidates(log), "slow") == "fast"
    timed = len(log)
    assert timed >= 4
    assert autotune.best("key", candidates(log), "slow") == "fast" and len(log) == timed
    autotune.forget()  # as a new process
    assert autotune.best("key", candidates(log), "slow") == "fast" and len(log) == timed
    assert autotune.best("another key", candidates(log), "slow") == "fast" and len(log) > timed
    assert [p.read_text() for p in timing_files()] == ["fast", "fast"]


def test_budget(empty_cache: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that fills half the budget is called for warm-up and in one round at most."""
    monkeypatch.setattr(autotune, "BUDGET_SECONDS", 0.1)
    calls: list[str] = []

    def slow(name: str) -> None:
        calls.append(name)
        time.sleep(autotune.BUDGET_SECONDS / 2)

    autotune.best("sleepy", {"a": lambda: slow("a"), "b": lambda: slow("b")}, "a")
    assert calls[:2] == ["a", "b"] and len(calls) <= 4


@pytest.mark.parametrize("off", ["variable", "deterministic"])
def test_switched_off(empty_cache: FilePath, monkeypatch: pytest.MonkeyPatch, off: str) -> None:
    log: list[str] = []
    autotune.best("key", candidates([]), "slow")
    if off == "variable":
        monkeypatch.setenv("LORA_FUSED_AUTOTUNE", "0")
    torch.use_deterministic_algorithms(off == "deterministic")
    try:
        assert autotune.best("key", candidates(log), "slow") == "slow"
    finally:
        torch.use_deterministic_algorithms(False)
    assert log == []


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b'{"key": 1}', b"gone"])
def test_damaged_files_are_ignored_with_one_warning(empty_cache: FilePath, content: bytes) -> None:
    autotune.best("key", candidates([]), "slow")
    timing_files()[0].write_bytes(content)
    autotune.forget()
    with pytest.warns(UserWarning, match="ignoring the timing in") as caught:
        assert autotune.best("key", candidates([]), "slow") == "fast"
    assert len(caught) == 1
    assert timing_files()[0].read_text() == "fast"


def test_an_unwritable_cache_is_no_error(
    tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("LORA_FUSED_CACHE_DIR", str(blocked))
    with pytest.warns(UserWarning):
        assert autotune.best("key", candidates([]), "slow") == "fast"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is remembered in the process, and said once
        assert autotune.best("key", candidates([]), "slow") == "fast"


def test_a_failing_candidate_has_lost(empty_cache: FilePath) -> None:
    def broken() -> None:
        raise RuntimeError("no such instruction")

    with pytest.warns(UserWarning, match="broken failed when it was timed: no such instruction"):
        assert autotune.best("one", {"broken": broken, "ok": lambda: None}, "broken") == "ok"
    with pytest.warns(UserWarning):
        assert autotune.best("all", {"broken": broken}, "broken") == "broken"


def test_threads_measure_once(empty_cache: FilePath) -> None:
    log: list[str] = []
    barrier = threading.Barrier(8)

    def ask() -> str:
        barrier.wait()
        return autotune.best("key", {"only": lambda: log.append("run")}, "only")

    with ThreadPoolExecutor(8) as pool:
        assert {f.result() for f in [pool.submit(ask) for _ in range(8)]} == {"only"}
    assert len(log) <= 1 + autotune._MAX_ROUNDS


def test_processes_do_not_lose_each_others_answers(empty_cache: FilePath) -> None:
    code = (
        "import sys; from lora_fused import autotune\n"
        "for i in range(20): autotune.best(f'{sys.argv[1]} {i}', {'only': lambda: None}, 'only')"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, name]) for name in ("a", "b")]
    assert [p.wait(60) for p in running] == [0, 0]
    assert len(timing_files()) == 40
    assert {p.read_text() for p in timing_files()} == {"only"}


def test_keys_with_odd_characters_and_buckets(empty_cache: FilePath) -> None:
    assert autotune.best("a/b ../c:d", {"only": lambda: None}, "only") == "only"
    assert all(empty_cache in p.parents for p in timing_files())
    assert [autotune.bucket(n) for n in (0, 1, 2, 3, 4, 5, 1000)] == [1, 1, 2, 4, 4, 8, 1024]


@needs_native
@pytest.mark.parametrize("direction", ["forward", "dx"])
@pytest.mark.parametrize("prepacked", [False, True])
def test_a_trial_of_strategies(empty_cache: FilePath, direction: str, prepacked: bool) -> None:
    problem = Problem(3000, 5000, 700, 8, torch.float32, threads=1, prepacked=prepacked)
    answer = cpu_trial.fastest_strategy(problem, 1, direction, "own")
    assert answer in {"own", "hybrid", "library"} | ({"packed"} if prepacked else set())
    (file,) = timing_files()
    assert file.read_text() == answer and "M4096-K4096" in file.name
    near = Problem(2500, 4100, 900, 8, torch.float32, threads=1, prepacked=prepacked)
    assert cpu_trial.fastest_strategy(near, 1, direction, "own") == answer
    assert len(timing_files()) == 1


# --- the rule of the CPU ------------------------------------------------------------------------


def a_cpu(vendor: str, isa: str, *flags: str) -> cpu.CpuInfo:
    family = {"GenuineIntel": 6, "AuthenticAMD": 25}[vendor]
    return cpu.CpuInfo(isa, vendor, family, 1, "a CPU", frozenset(flags))


TILES = a_cpu(
    "GenuineIntel", "amx_bf16", "avx2", "avx512", "avx512_bf16", "avx512_fp16", "amx_bf16"
)
TILES_FORCED_LOWER = a_cpu("GenuineIntel", "avx512_bf16", *TILES.flags)
ZEN4 = a_cpu("AuthenticAMD", "avx512_bf16", "avx2", "avx512", "avx512_bf16")
OLD = a_cpu("AuthenticAMD", "avx2", "avx2")


@pytest.mark.parametrize(
    ("info", "dtype", "M", "prepacked", "expected"),
    [
        (TILES, torch.bfloat16, 1, False, ("own", "own")),
        (TILES, torch.bfloat16, 1, True, ("own", "own")),
        (TILES, torch.bfloat16, 64, True, ("packed", "packed")),
        (TILES, torch.bfloat16, 512, False, ("own", "hybrid")),
        (TILES, torch.bfloat16, 512, True, ("own", "packed")),
        (TILES, torch.float32, 1, False, ("own", "library")),
        (TILES, torch.float32, 128, True, ("own", "own")),
        (TILES, torch.float32, 512, True, ("library", "library")),
        (TILES, torch.float16, 512, True, ("own", "own")),
        (TILES_FORCED_LOWER, torch.bfloat16, 1, False, ("own", "own")),
        (TILES_FORCED_LOWER, torch.bfloat16, 512, True, ("library", "library")),
        (ZEN4, torch.bfloat16, 4, True, ("own", "own")),
        (ZEN4, torch.bfloat16, 16, True, ("packed", "packed")),
        (ZEN4, torch.bfloat16, 128, False, ("own", "own")),
        (ZEN4, torch.bfloat16, 129, False, ("hybrid", "own")),
        (ZEN4, torch.bfloat16, 256, False, ("hybrid", "own")),
        (ZEN4, torch.bfloat16, 256, True, ("packed", "packed")),
        (ZEN4, torch.float32, 256, False, ("own", "own")),
        (ZEN4, torch.bfloat16, 512, False, ("own", "own")),
        (ZEN4, torch.bfloat16, 512, True, ("packed", "packed")),
        (ZEN4, torch.float32, 1, False, ("own", "own")),
        (ZEN4, torch.float32, 512, False, ("own", "own")),
        (ZEN4, torch.float16, 16, True, ("packed", "packed")),
        (OLD, torch.float32, 512, True, ("packed", "packed")),
    ],
)
def test_the_rule(
    monkeypatch: pytest.MonkeyPatch,
    info: cpu.CpuInfo,
    dtype: torch.dtype,
    M: int,
    prepacked: bool,
    expected: tuple[str, str],
) -> None:
    monkeypatch.setenv("LORA_FUSED_AUTOTUNE", "0")
    problem = Problem(M, 2048, 2048, 16, dtype, prepacked=prepacked)
    config = cpu_rule.choose_cpu(problem, info)
    assert (config.forward, config.dx) == expected
    assert config.isa == info.isa


def test_the_rule_follows_the_weight_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """fan_in_fan_out reads the weight forward as nn.Linear reads it for dx."""
    monkeypatch.setenv("LORA_FUSED_AUTOTUNE", "0")
    row = Problem(1, 2048, 2048, 16, torch.float32)
    column = dataclasses.replace(row, weight_layout="column")
    there, here = cpu_rule.choose_cpu(row, TILES), cpu_rule.choose_cpu(column, TILES)
    assert (there.forward, there.dx) == ("own", "library") == (here.dx, here.forward)
    strided = cpu_rule.choose_cpu(dataclasses.replace(row, weight_layout="strided"), TILES)
    assert (strided.forward, strided.dx) == ("hybrid", "hybrid")


@needs_native
def test_only_unmeasured_cpus_are_timed(
    empty_cache: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(8, 64, 64, 4, torch.float32)
    for measured in (TILES, ZEN4):
        cpu_rule.choose_cpu(problem, measured)
    assert not timing_files()
    unknown = dataclasses.replace(OLD, family=23, isa=native_isas()[-1])
    config = cpu_rule.choose_cpu(problem, unknown)
    assert sorted(p.read_text() for p in timing_files()) == sorted((config.forward, config.dx))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    config = cpu_rule.choose_cpu(dataclasses.replace(problem, M=500), unknown)
    assert (config.forward, config.dx) == ("own", "own") and len(timing_files()) == 2


# --- processes ----------------------------------------------------------------------------------


def test_import_does_nothing(tmp_path: FilePath) -> None:
    """No thread pool, no GPU, no file, no environment variable read at import."""
    code = """
import os, sys
class Watching(dict):
    pass
import torch
reads = []
real = os.environ.__class__.__getitem__
os.environ.__class__.__getitem__ = lambda self, key: (reads.append(key), real(self, key))[1]
import lora_fused
assert not [k for k in reads if k.startswith("LORA_FUSED")], reads
assert "lora_fused._C" not in sys.modules
assert not torch.cuda.is_initialized()
assert os.listdir(os.environ["LORA_FUSED_CACHE_DIR"]) == []
"""
    environment = {**os.environ, "LORA_FUSED_CACHE_DIR": str(tmp_path), "LORA_FUSED_BACKEND": "bad"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


def _work(queue: object) -> None:
    check_case(make_case(60, 256, 200, 8, bias=True, dropout_p=0.1))
    queue.put("done")  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_after_fork() -> None:
    """The kernels work in a child forked after they ran in the parent (a DataLoader worker)."""
    check_case(make_case(60, 256, 200, 8, bias=True, dropout_p=0.1))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's own pool does not survive a fork
    try:
        child = context.Process(target=_work, args=(queue,))
        child.start()
        child.join(60)
        assert child.exitcode == 0 and queue.get(timeout=5) == "done"
    finally:
        torch.set_num_threads(threads)


def test_many_threads_at_once() -> None:
    cases = [make_case(20 + i, 64, 48, 4, dropout_p=0.1, seed=i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(check_case, case) for case in cases * 6]:
            future.result()


def test_inside_a_parallel_region_of_torch() -> None:
    """Called from torch's own worker threads (autograd runs hooks there) nothing deadlocks."""
    case = make_case(64, 128, 96, 8)
    outer = case.x.clone().requires_grad_()

    def hook(grad: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            lora_linear(case.x, case.weight, case.lora_A, case.lora_B, 2.0)
        return grad

    doubled = outer * 2
    doubled.register_hook(hook)
    doubled.sum().backward()
    assert torch.equal(outer.grad, torch.full_like(outer, 2.0))
