"""Every CUDA call that can fail, and arguments at the limits of what a launcher takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from .emulated import SMALL, fake_module

BF16 = 1
NO_MASK, NO_SPACE = (0, 0, 0), (0, 0, 0)
HOPPER = {**SMALL, "major": 9, "shared_bytes_per_block": 232448}
_fresh = itertools.count(20)  # devices of this file: what a device is, is read once per process


@pytest.fixture
def gpu() -> Iterator[ModuleType]:
    module = fake_module()
    module.control.reset([])
    yield module
    module.control.reset([])


def fresh_device(gpu: ModuleType) -> int:
    """The number of a device that nothing has asked about."""
    number = next(_fresh)
    gpu.control.reset([HOPPER] * (number + 1))
    return number


def at(size: int) -> tuple[int, int, int]:
    """A matrix with rows of `size` elements, at an address that nothing reads."""
    return (1 << 20, size, 1)


def ampere(gpu: ModuleType, device: int, M: int = 300, y: int = BF16, group: int = 1) -> None:
    layer = (at(128), at(128), at(16), (*at(64), y), 0, NO_MASK, 64, 16, 0, 1.0)
    gpu.matmul_sm80(
        (device, 7, False), BF16, M, 128, at(128), (*at(16), BF16), [layer],
        (128, 128, 64, group), (False, False, False), NO_SPACE,
    )  # fmt: skip


def hopper(gpu: ModuleType, device: int, M: int = 300, y: int = BF16, stride: int = 128) -> None:
    s, out = (*at(16), BF16), (*at(64), y)
    layer = (
        at(stride), at(128), at(128), at(16), s, out, 0, NO_MASK, 64, 128, 16, 1.0, s, 16,
    )  # fmt: skip
    gpu.matmul_sm90((device, 7, False), BF16, False, M, [layer], (128, 2, 1, 1, 0), [], NO_SPACE)


def reduce(gpu: ModuleType, device: int, M: int = 64, P: int = 128) -> None:
    job = (P, at(P), at(16), NO_MASK, (*at(16), BF16))
    gpu.reduce((device, 7, True), BF16, M, 16, [job], 1, NO_SPACE)


def decode(gpu: ModuleType, device: int, M: int = 4, N: int = 64, y: int = BF16) -> None:
    gpu.decode(
        (device, 7, False), BF16, M, 128, N, 16, at(128), at(128), at(128), at(16), 0, 1.0,
        (*at(64), y), (*at(16), BF16), 1, 1, NO_SPACE,
    )  # fmt: skip


SM80, SM90 = "lora_matmul_sm80_bf16_128x128x64_k_major", "lora_matmul_sm90_bf16_forward_n128"
FAILURES = [
    (ampere, "cudaGetDevice", "lora_fused (device N): current device"),
    (ampere, "cudaSetDevice", "lora_fused (device N): set device"),
    (ampere, "cudaGetDeviceCount", "lora_fused (device N): device count"),
    (ampere, "cudaGetDeviceProperties", "lora_fused (device N): device properties"),
    (ampere, "cudaDeviceGetAttribute", "lora_fused (device N): device attribute"),
    (ampere, "cudaDriverGetVersion", "lora_fused: driver version"),
    (ampere, "cudaOccupancyMaxActiveBlocksPerMultiprocessor", f"{SM80}: occupancy"),
    (ampere, "cudaFuncSetAttribute", f"{SM80}: shared memory opt-in"),
    (ampere, "cudaLaunchKernelExC", f"{SM80} (M=300 depth=128 columns=64 R=16): launch"),
    (hopper, "cudaLaunchKernelExC", f"{SM90} (M=300 columns=64 depth<=128 R=16): launch"),
    (reduce, "cudaDeviceGetAttribute", "lora_fused (device N): device attribute"),
    (reduce, "cudaLaunchKernelExC", "lora_reduce_sm80_bf16_r16 (M=64 R=16 columns 128): launch"),
    (decode, "cudaLaunchKernelExC", "lora_decode_sm80_bf16 (M=4 K=128 N=64 R=16): launch"),
]


@pytest.mark.parametrize(
    ("run", "function", "sentence"), FAILURES, ids=lambda part: getattr(part, "__name__", part)
)
def test_a_call_that_fails_is_named(
    gpu: ModuleType, run: Callable[[ModuleType, int], None], function: str, sentence: str
) -> None:
    """With the kernel and its problem where there is one; nothing is launched after it."""
    device = fresh_device(gpu)
    gpu.control.fail(function, 719)
    with pytest.raises(gpu.CudaError) as error:
        run(gpu, device)
    named = sentence.replace("N)", f"{device})")
    assert str(error.value) == f"{named}: cudaError719: as the test asked"
    launched = [c for c in gpu.control.calls() if c["function"] == "cudaLaunchKernelExC"]
    assert len(launched) == (function == "cudaLaunchKernelExC")
    gpu.control.reset([HOPPER] * (device + 1))
    run(gpu, device)  # nothing of the failure is remembered
    assert [c["device"] for c in gpu.control.calls() if c["function"] == "cudaLaunchKernelExC"] == [
        str(device)
    ]


def test_a_tensor_map_that_the_driver_refuses(gpu: ModuleType) -> None:
    device = fresh_device(gpu)
    gpu.control.fail("cuTensorMapEncodeTiled", 1)
    with pytest.raises(gpu.CudaError, match=f"{SM90}: tensor map of x: the driver refused it, cod"):
        hopper(gpu, device)


def test_empty_problems_launch_nothing(gpu: ModuleType) -> None:
    device = fresh_device(gpu)
    ampere(gpu, device, M=0)
    reduce(gpu, device, P=0)
    decode(gpu, device, M=0)
    decode(gpu, device, N=0)
    assert "cudaLaunchKernelExC" not in {call["function"] for call in gpu.control.calls()}
    with pytest.raises(ValueError, match="M: got 0, expected 1 to"):
        hopper(gpu, device, M=0)


def test_sizes_beyond_32_bits(gpu: ModuleType) -> None:
    """More than 2^31 elements are fine; what is counted in 32 bits is refused in time."""
    device = fresh_device(gpu)
    seen: list[dict] = []
    gpu.control.on_tensor_map(lambda asked: seen.append(asked) or bytes(128))
    hopper(gpu, device, M=1 << 25)
    assert seen[0]["size"] == [128, 1 << 25]
    hopper(gpu, device, stride=(1 << 38) // 2)
    assert seen[7]["stride_bytes"] == [1 << 38] or seen[6]["stride_bytes"] == [1 << 38]
    ampere(gpu, device, M=1 << 25)
    reduce(gpu, device, M=1 << 40)
    launches = [c for c in gpu.control.calls() if c["function"] == "cudaLaunchKernelExC"]
    assert len(launches) == 4
    for run, M, sentence in (
        (hopper, 1 << 31, r"M: got 2147483648, expected 1 to 2\^31 - 1024"),
        (ampere, 1 << 29, "M: got 536870912, expected 0 to 536870911"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run(gpu, device, M)
    with pytest.raises(ValueError, match="stride of dimension 1: got 1099511627776, expected a mu"):
        hopper(gpu, device, stride=(1 << 40) // 2)
    with pytest.raises(ValueError, match="stride of dimension 1: got 258, expected a multiple of"):
        hopper(gpu, device, stride=129)


@pytest.mark.parametrize("run", [ampere, hopper, decode])
@pytest.mark.parametrize("dtype", [0, 2])
def test_an_output_of_another_dtype_is_refused(
    gpu: ModuleType, run: Callable[..., None], dtype: int
) -> None:
    with pytest.raises(ValueError, match=f"dtype of y: got {dtype}, expected 1, the operands'"):
        run(gpu, fresh_device(gpu), y=dtype)


@pytest.mark.parametrize("group", [0, 17])
def test_tickets_of_too_few_or_too_many_s_tiles_are_refused(gpu: ModuleType, group: int) -> None:
    with pytest.raises(ValueError, match=f"shrink_group: got {group}, expected 1 to 16"):
        ampere(gpu, fresh_device(gpu), group=group)
