"""How calls are timed: CUDA graphs with a cold cache on a stand-in for torch.cuda, roofs, rotation.

Nothing here asserts a time that was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich")

from benchmarks import machine, roof, timing_gpu
from benchmarks import run as run_module
from benchmarks.roof import copy_gbytes, gemm_gflops
from benchmarks.roofline import Point, Roofs, layer_bytes, percent_of, point_of, roof_percent
from benchmarks.run import Settings, run
from benchmarks.shapes import Case, Layer, flops
from benchmarks.tensors import make_tensors
from benchmarks.timing import Stopwatch, clock_for, elapsed_ns, interleaved, pace_of, remark
from benchmarks.timing_gpu import MOST_REPEATS, WARM_UPS, GraphStopwatch

MS_PER_REPLAY = 0.25
CASE = Case(Layer("tiny", "layer", 32, 24), "fp32", 4, 4)


class FakeGpu:
    """The part of torch.cuda that GraphStopwatch uses; `log` is the order of what was queued.

    Work costs device time only when it is queued outside a capture: a replay MS_PER_REPLAY.
    """

    def __init__(self, l2_bytes: int = 50 << 20) -> None:
        self.log: list[str] = []
        self.now_ms = 0.0
        self.capturing = False
        self.l2_bytes = l2_bytes
        self.flush_bytes = 0

    def module(self) -> SimpleNamespace:
        """What stands for `torch` in timing_gpu."""
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing
                self.at = float("nan")

            def record(self) -> None:
                gpu.log.append("record")
                self.at = gpu.now_ms

            def elapsed_time(self, end: Event) -> float:
                assert gpu.log[-1] == "synchronize", "read before the device was done"
                return end.at - self.at

        class Stream:
            def wait_stream(self, other: Stream) -> None:
                gpu.log.append("wait")

        class CUDAGraph:
            def replay(self) -> None:
                gpu.log.append("replay")
                gpu.now_ms += MS_PER_REPLAY

        class Capture:
            def __init__(self, graph: CUDAGraph, pool: object = None) -> None:
                assert pool == "pool"

            def __enter__(self) -> None:
                gpu.log.append("begin capture")
                gpu.capturing = True

            def __exit__(self, *_: object) -> None:
                gpu.log.append("end capture")
                gpu.capturing = False

        class OnStream:
            def __init__(self, stream: Stream) -> None: ...
            def __enter__(self) -> None: ...
            def __exit__(self, *_: object) -> None: ...

        class Buffer:
            def zero_(self) -> None:
                gpu.log.append("flush")
                gpu.now_ms += 1.0  # between the pairs of events, so no part of any time

        def empty(size: int, dtype: torch.dtype, device: str) -> Buffer:
            gpu.flush_bytes = size * dtype.itemsize
            return Buffer()

        main = Stream()
        cuda = SimpleNamespace(
            Event=Event, Stream=Stream, CUDAGraph=CUDAGraph, graph=Capture, stream=OnStream,
            current_stream=lambda: main, graph_pool_handle=lambda: "pool",
            current_device=lambda: 0, synchronize=lambda: gpu.log.append("synchronize"),
            get_device_properties=lambda _: SimpleNamespace(L2_cache_size=gpu.l2_bytes),
        )  # fmt: skip
        return SimpleNamespace(cuda=cuda, empty=empty, uint8=torch.uint8)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    monkeypatch.setattr(timing_gpu, "torch", fake.module())
    return fake


def logged(gpu: FakeGpu, ms: float = 0.0) -> Callable[[], None]:
    def call() -> None:
        gpu.log.append("call")
        gpu.now_ms += ms

    return call


# CUDA graphs, events and the cold cache


def test_every_replay_is_between_events_and_after_a_flush(gpu: FakeGpu) -> None:
    watch = GraphStopwatch()
    call = logged(gpu)
    assert watch.time_ns(call, 2) == 2 * MS_PER_REPLAY * 1e6
    warm_ups = ["wait", *["call"] * WARM_UPS, "wait"]
    capture = ["begin capture", "call", "end capture"]
    each = ["flush", "record", "replay", "record"]
    assert gpu.log == [*warm_ups, *capture, *each, *each, "synchronize"]

    gpu.log.clear()
    watch.time_ns(call, 1)
    assert gpu.log == [*each, "synchronize"], "a call is captured once"
    assert watch.remark(call) == ""


@pytest.mark.parametrize("l2_bytes", [0, 50 << 20, 256 << 20])
def test_the_flush_is_larger_than_the_cache(monkeypatch: pytest.MonkeyPatch, l2_bytes: int) -> None:
    fake = FakeGpu(l2_bytes)
    monkeypatch.setattr(timing_gpu, "torch", fake.module())
    GraphStopwatch()
    assert fake.flush_bytes >= max(2 * l2_bytes, 1)


def test_what_cannot_be_captured_is_timed_with_its_launches_and_says_so(gpu: FakeGpu) -> None:
    def synchronises() -> None:
        gpu.log.append("call")
        gpu.now_ms += 3.0
        if gpu.capturing:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    watch = GraphStopwatch()
    assert watch.time_ns(synchronises, 2) == 6e6
    assert gpu.log[-4:] == ["record", "call", "record", "synchronize"]
    said = "timed without a CUDA graph (operation not permitted when stream is capturing)"
    assert remark(watch, synchronises) == said
    assert not gpu.capturing


def test_calls_have_graphs_of_their_own(gpu: FakeGpu) -> None:
    watch = GraphStopwatch()
    for call in (logged(gpu), logged(gpu)):
        watch.time_ns(call, 1)
    assert gpu.log.count("begin capture") == 2


def test_a_stopwatch_serves_where_a_clock_does(gpu: FakeGpu) -> None:
    watch = clock_for(1, "cuda")
    assert isinstance(watch, Stopwatch) and isinstance(watch, GraphStopwatch)
    call = logged(gpu)
    pace = pace_of(call, watch, sample_ns=10**12)
    assert pace.repeats == MOST_REPEATS
    assert elapsed_ns(call, 3, watch) == 3 * MS_PER_REPLAY * 1e6
    samples = interleaved({"a": call}, {"a": pace}, 2, watch)
    assert samples == {"a": [MS_PER_REPLAY * 1000] * 2}


def test_clocks_of_the_cpu_are_no_stopwatches() -> None:
    for clock in (clock_for(1), clock_for(2), clock_for(1, "cuda", eager=True)):
        assert not isinstance(clock, Stopwatch) and remark(clock, lambda: None) == ""


# Roofs


def test_copies_count_what_is_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = torch.ones

    def ones(size: int, **how: object) -> torch.Tensor:
        made.append(size)
        return real(16, dtype=torch.uint8)

    monkeypatch.setattr(torch, "ones", ones)
    now = iter(range(0, 10**12, 1_000_000_000))  # every sample lasts one second
    rate = copy_gbytes("cpu", lambda: next(now), cache_bytes=64 << 20, memory_bytes=0)
    assert made == [8 * (64 << 20)] and rate == pytest.approx(2 * made[0] / 1e9)
    copy_gbytes("cpu", lambda: next(now), cache_bytes=64 << 20, memory_bytes=1 << 30)
    assert made[-1] == 1 << 26, "no more than a sixteenth of the memory"


def test_gemm_sizes_grow_while_the_time_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def shortest(call: Callable[[], torch.Tensor], clock: object) -> float:
        n = call().shape[0]
        seen.append(n)
        return 2 * n**3 / 10.0  # 10 GFLOP/s

    monkeypatch.setattr(roof, "_shortest_ns", shortest)
    rates = gemm_gflops("cpu", lambda: 0)
    assert rates == {"fp32": 10.0, "bf16": 10.0, "fp16": 10.0}
    assert seen == [512] * 3, "1024 would take 0.2 s"


def test_roofs_of_this_machine_are_in_a_result() -> None:
    m = machine.describe_machine(1)
    assert m["copy_gbytes"] > 0 and all(m["gemm_gflops"][d] > 0 for d in ("fp32", "bf16", "fp16"))
    assert {"load", "cpu_mhz"} >= set(m["before"])
    assert {map_["dtype"] for map_ in m["strategy_maps"]} == {"bf16", "fp32"}


def test_the_slower_roof_counts() -> None:
    roofs = Roofs(gemm_gflops=100.0, copy_gbytes=20.0)
    assert roofs.ridge == 5 and roofs.gflops_at(1.0) == 20 and roofs.gflops_at(50.0) == 100
    assert roofs.least_us(1e6, 1e3) == pytest.approx(10)  # arithmetic
    assert roofs.least_us(1e3, 1e6) == pytest.approx(50)  # memory
    measured = {"gemm_gflops": {"fp32": 100.0}, "copy_gbytes": 20.0}
    assert roof_percent(measured, "fp32", 1e6, 1e3, us=40) == pytest.approx(25)
    assert roof_percent(measured, "bf16", 1e6, 1e3, us=40) is None
    assert roof_percent({}, "fp32", 1e6, 1e3, us=40) is None


def test_bytes_of_a_layer() -> None:
    M, K, N, R = 4, 96, 64, 8
    forward = M * K + K * N + R * K + N * R + M * N
    assert layer_bytes(M, K, N, R, "bf16", "F") == 2 * forward
    backward = M * N + K * N + R * K + N * R + M * K + M * K + R * K + N * R
    assert layer_bytes(M, K, N, R, "fp32", "F+B") == 4 * (forward + backward)
    assert layer_bytes(M, K, N, 0, "fp32", "F+B") == 4 * 2 * (M * K + K * N + M * N)


# A run


def test_a_record_on_the_roofline() -> None:
    done = run(Settings("quick", rounds=2, memory=False), [CASE])
    record = next(r for r in done.records if (r.provider, r.pass_) == ("ours", "F"))
    assert record.gflops is not None and record.median_us is not None
    work = flops(CASE.layer, CASE.M, CASE.R, "F")
    intensity = work / layer_bytes(4, 32, 24, 4, "fp32", "F")
    assert point_of(record, lora=True) == Point(pytest.approx(intensity), record.gflops)
    wanted = roof_percent(
        done.machine, "fp32", work, layer_bytes(4, 32, 24, 4, "fp32", "F"), record.median_us
    )
    assert percent_of(done.machine, record, lora=True) == pytest.approx(wanted)
    assert set(done.machine["after"]) == set(done.machine["before"])


def test_cold_rotates_inputs_and_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_tensors(CASE)
    monkeypatch.setattr(run_module, "cache_bytes", lambda: {"L3": 4 * one.streamed_bytes})
    copies = run_module._parameter_copies(CASE, Settings("quick", cold=True))
    assert len(copies) == 8
    for name in ("x", "dy", "w", "a", "b"):
        places = {getattr(c, name).data_ptr() for c in copies}
        assert len(places) == len(copies), f"{name} stays where it was"
        assert all(torch.equal(getattr(c, name), getattr(copies[0], name)) for c in copies)
    assert all(c.x.requires_grad for c in copies)
    monkeypatch.setattr(run_module, "cache_bytes", lambda: {"L3": 16})
    assert len(run_module._parameter_copies(CASE, Settings("quick", cold=True))) == 2


# Clocks and power


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    cuda = SimpleNamespace(
        current_device=lambda: 1,
        get_device_properties=lambda _: SimpleNamespace(uuid="1a2b"),
        clock_rate=lambda: 1980,
        power_draw=lambda: 412_500,
        temperature=lambda: 61,
    )
    monkeypatch.setattr(machine, "torch", SimpleNamespace(cuda=cuda))
    return cuda


def test_clocks_and_power_of_a_gpu_by_nvidia_smi(
    one_gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(command: list[str], **_: object) -> SimpleNamespace:
        assert "--id=GPU-1a2b" in command, "the number may be another one under a mask"
        return SimpleNamespace(stdout="1755 MHz, 2619 MHz, 612.31 W, 58, P0, 0x0000000000000004\n")

    monkeypatch.setattr(machine.subprocess, "run", said)
    assert machine.state("cuda")["gpu"] == {
        "clocks.sm": "1755 MHz", "clocks.mem": "2619 MHz", "power.draw": "612.31 W",
        "temperature.gpu": "58", "pstate": "P0",
        "clocks_throttle_reasons.active": "0x0000000000000004",
    }  # fmt: skip


def test_clocks_and_power_by_torch_or_not_at_all(
    one_gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(machine.subprocess, "run", absent)
    assert machine.state("cuda")["gpu"] == {
        "clocks.sm": "1980 MHz", "power.draw": "412.50 W", "temperature.gpu": "61"
    }  # fmt: skip

    def unknown() -> int:
        raise ModuleNotFoundError("pynvml does not seem to be installed")

    one_gpu.clock_rate = unknown
    assert machine.state("cuda")["gpu"] == {}
    assert "gpu" not in machine.state("cpu")
