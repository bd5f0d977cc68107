"""The host side on a runtime that records what it is asked: errors, attributes, maps, graphs."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch

from lora_fused.backends import cuda, cuda_native

from .compile import ROOT
from .emulated import SMALL, EmulatedGpu, fake_module
from .problems import data, route

BF16 = 1
WHERE = (0, 7, False)
NO_MASK, NO_SPACE = (0, 0, 0), (0, 0, 0)
OPERANDS = ((64, 128, 1), (64, 128, 1))


@pytest.fixture
def gpu() -> Iterator[ModuleType]:
    module = fake_module()
    module.control.reset([SMALL, SMALL])
    yield module
    module.control.reset([])


def shrink(module: ModuleType, where=WHERE, R: int = 16, M: int = 300, splits: int = 1) -> None:
    module.shrink(
        where, BF16, M, 128, R, *OPERANDS, NO_MASK, 1.0, (64, R, 1, BF16), splits, NO_SPACE
    )


def calls(module: ModuleType, function: str) -> list[dict[str, str]]:
    return [call for call in module.control.calls() if call["function"] == function]


# ---- launches ------------------------------------------------------------------------------------


def test_a_launch_says_kernel_grid_block_shared_and_stream(gpu: ModuleType) -> None:
    shrink(gpu)
    (launch,) = calls(gpu, "cudaLaunchKernelExC")
    assert launch["kernel"] == "lora_shrink_sm80_bf16_r16_along"
    assert (launch["grid"], launch["block"], launch["stream"]) == ("3,1,1", "256,1,1", "7")
    assert int(launch["shared"]) == 3 * (128 + 16) * 128
    assert not {"cluster", "dependent", "attribute"} & set(launch)


def test_dependent_launches_from_sm_90_on(gpu: ModuleType) -> None:
    hopper, ampere = 5, 6  # numbers of this test: what a device is, is read once per process
    gpu.control.reset([SMALL] * hopper + [{**SMALL, "major": 9}, {**SMALL, "major": 8}])
    for device in (hopper, ampere):
        shrink(gpu, (device, 0, True))
    first, second = calls(gpu, "cudaLaunchKernelExC")
    assert first["dependent"] == "1" and first["device"] == str(hopper)
    assert "dependent" not in second and second["device"] == str(ampere)


def test_the_device_of_the_thread_is_put_back(gpu: ModuleType) -> None:
    shrink(gpu, (1, 0, False))
    assert [call["to"] for call in calls(gpu, "cudaSetDevice")] == ["1", "0"]
    gpu.control.fail("cudaLaunchKernelExC", 700)
    with pytest.raises(gpu.CudaError):
        shrink(gpu, (1, 0, False))
    assert [call["to"] for call in calls(gpu, "cudaSetDevice")] == ["1", "0"] * 2


def test_an_empty_problem_launches_nothing(gpu: ModuleType) -> None:
    shrink(gpu, M=0)
    assert not calls(gpu, "cudaLaunchKernelExC")


def test_every_kernel_of_the_objects_is_registered(gpu: ModuleType) -> None:
    names = set(gpu.control.kernels())
    assert {"lora_decode_sm80_bf16", "lora_reduce_sm80_ieee_r64"} <= names
    assert all(name.startswith("lora_") for name in names)


def test_shared_memory_is_opted_into_once_per_device_and_size() -> None:
    code = """
        from tests.cuda.emulated import fake_module, SMALL
        gpu = fake_module()
        gpu.control.reset([SMALL, SMALL])
        def shrink(device, R):
            gpu.shrink((device, 0, False), 1, 300, 128, R, (64, 128, 1), (64, 128, 1), (0, 0, 0),
                       1.0, (64, R, 1, 1), 1, (0, 0, 0))
        for device, R in ((0, 16), (0, 16), (1, 16), (0, 64), (0, 64)):
            shrink(device, R)
        for call in gpu.control.calls():
            if call["function"] == "cudaFuncSetAttribute":
                print(call["device"], call["kernel"], call["attribute"], call["value"])
    """
    python = [sys.executable, "-c", textwrap.dedent(code)]
    told = subprocess.run(python, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    kernel, bytes_16, bytes_64 = "lora_shrink_sm80_bf16_r", 3 * 144 * 128, 3 * 192 * 128
    assert told.splitlines() == [
        f"0 {kernel}16_along 8 {bytes_16}",
        f"1 {kernel}16_along 8 {bytes_16}",
        f"0 {kernel}64_along 8 {bytes_64}",
    ]


# ---- errors --------------------------------------------------------------------------------------

FUNCTIONS = {
    "cudaGetDevice": "current device",
    "cudaLaunchKernelExC": "launch",
    "cudaFuncSetAttribute": "shared memory opt-in",
}
CODES = (1, 2, 98, 209, 700, 701, 719, 999)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("function", ["cudaLaunchKernelExC"])
def test_every_code_names_kernel_problem_and_step(gpu, function: str, code: int) -> None:
    gpu.control.fail(function, code)
    with pytest.raises(gpu.CudaError) as error:
        shrink(gpu)
    assert str(error.value) == (
        f"lora_shrink_sm80_bf16_r16_along (M=300 K=128 R=16): {FUNCTIONS[function]}: "
        f"cudaError{code}: as the test asked"
    )
    assert isinstance(error.value, RuntimeError)
    assert calls(gpu, "cudaGetLastError"), "the error is taken off the thread's state"


def test_errors_before_the_launch(gpu: ModuleType) -> None:
    gpu.control.fail("cudaGetDevice", 35)
    with pytest.raises(gpu.CudaError, match=r"lora_fused \(device 0\): no CUDA driver: "):
        shrink(gpu)
    gpu.control.reset([SMALL])
    gpu.control.fail("cudaSetDevice", 101)
    with pytest.raises(gpu.CudaError, match=r"device 5\): set device: cudaError101"):
        shrink(gpu, (5, 0, False))
    gpu.control.reset([SMALL])
    gpu.control.fail("cudaStreamGetCaptureInfo", 900)
    with pytest.raises(gpu.CudaError, match="capture info: cudaError900"):
        gpu.capture_id(7)


@pytest.mark.parametrize(
    ("code", "missing"),
    [(35, "no CUDA driver"), (34, "no CUDA driver"), (100, "no CUDA device")],
)
def test_without_a_driver_one_sentence_says_so(gpu, code: int, missing: str) -> None:
    gpu.control.fail("cudaGetDeviceCount", code)
    assert gpu.device_count() == 0
    with pytest.raises(gpu.CudaError, match=rf"^lora_fused \(device 9\): {missing}: [^\n]*$"):
        gpu.device_properties(9)


def test_this_machine_without_a_driver() -> None:
    native = cuda_native.native()
    if native is None or native.device_count():
        pytest.skip("the CUDA part is not built, or there is a GPU")
    with pytest.raises(native.CudaError, match="no CUDA driver"):
        shrink(native)


def test_bad_arguments_say_what_got_expected(gpu: ModuleType) -> None:
    for change, sentence in (
        ({"R": -1}, "R: got -1, expected at least 0"),
        ({"splits": 0}, "splits: got 0, expected at least 1"),
        ({"M": 1 << 62}, r"blocks of the grid: got \d+, expected at most 2\^31 - 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            shrink(gpu, **change)
    with pytest.raises(ValueError, match=r"dtype: got 4, expected 0 \(fp32\)"):
        gpu.shrink_workspace(4, 1, 1, 1)
    with pytest.raises(ValueError, match="gradients: got 3, expected 1 or 2"):
        gpu.reduce_workspace(1, [1, 2, 3], 4, 1)
    with pytest.raises(ValueError, match="device: got 2, expected 0 to 1"):
        gpu.device_properties(2)
    args = (WHERE, BF16, 17, 8, 8, 4, *OPERANDS, *OPERANDS, 0, 1.0)
    with pytest.raises(ValueError, match="M: got 17, expected at most 16 for decode"):
        gpu.decode(*args, (0, 1, 1, 1), (0, 1, 1, 1), 1, 1, NO_SPACE)


# ---- workspaces, graphs, threads -----------------------------------------------------------------


def run(gpu: EmulatedGpu, d, r) -> torch.Tensor:
    gpu.see(*d.all())
    return cuda.shrink_matmul(r, "forward", d.x, d.weight, d.lora_A, d.lora_B, 2.0)[0]


def test_a_graph_has_words_of_its_own_and_replays() -> None:
    shape = (3, 128, 48, 8)
    d, r = data(*shape, torch.bfloat16), route(*shape, torch.bfloat16, 2)
    with EmulatedGpu() as gpu:
        eager = run(gpu, d, r)
        control = fake_module().control
        seen = []
        for capture in (0, 41, 41, 42, 0):
            control.capture(capture)
            assert torch.equal(run(gpu, d, r), eager)
            words = cuda_native._captured if capture else cuda_native._words
            seen.append(words[0, gpu.stream][1].data_ptr())
        gpu.check()
    assert seen[1] == seen[2] and seen[0] == seen[4]
    assert len({seen[0], seen[1], seen[3]}) == 3


def test_replaying_a_captured_sequence_needs_no_reset() -> None:
    """The same launches with the same arguments again and again: what a graph's replay is."""
    shape = (5, 300, 72, 20)
    d, r = data(*shape, torch.bfloat16), route(*shape, torch.bfloat16, 2)
    with EmulatedGpu() as gpu:
        y = run(gpu, d, r)
        s = cuda.shrink(r, d.x, d.lora_A, 2.0)
        first = y.clone(), s.clone()
        recorded = list(gpu.replayable)
        for _ in range(2):
            y.zero_(), s.zero_()
            for again in recorded:
                gpu.replay(again)
            assert torch.equal(y, first[0]) and torch.equal(s, first[1])
        gpu.check()
    assert len(recorded) == 2 and y.any()


def test_streams_share_no_words() -> None:
    shape = (3, 128, 48, 8)
    d, r = data(*shape, torch.bfloat16), route(*shape, torch.bfloat16, 2)
    with EmulatedGpu() as gpu:
        for stream in (7, 8):
            gpu.stream = stream
            run(gpu, d, r)
        assert len({words.data_ptr() for _, words in cuda_native._words.values()}) == 2
        assert [launch.told["stream"] for launch in gpu.launches] == ["7", "8"]


def test_words_grow_with_the_problem() -> None:
    with EmulatedGpu() as gpu:
        place = gpu.place_of(torch.zeros(1))
        (_, first, error), _ = cuda_native.workspace(place, 0, 10)
        (_, second, _), _ = cuda_native.workspace(place, 0, 5000)
        (_, third, _), _ = cuda_native.workspace(place, 0, 10)
    assert first == error + 16 and second == third != first


def test_threads_launch_side_by_side(gpu: ModuleType) -> None:
    def many(device: int) -> None:
        for _ in range(50):
            shrink(gpu, (device, device, False), R=64)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(many, [0, 1, 0, 1]))
    launches = calls(gpu, "cudaLaunchKernelExC")
    assert len(launches) == 200
    assert all(launch["device"] == launch["stream"] for launch in launches)


def test_kernels_cover_every_math_and_rank(gpu: ModuleType) -> None:
    for math, R in itertools.product(range(4), (1, 16, 17, 64, 65, 512)):
        gpu.shrink(WHERE, math, 8, 64, R, *OPERANDS, NO_MASK, 1.0, (64, R, 1, 1), 1, NO_SPACE)
        job = (64, *OPERANDS, NO_MASK, (64, 1, R, 1))
        gpu.reduce(WHERE, math, 8, R, [job], 1, NO_SPACE)
    names = {call["kernel"] for call in calls(gpu, "cudaLaunchKernelExC")}
    assert len(names) == 20
