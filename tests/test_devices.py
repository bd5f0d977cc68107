"""Descriptions of GPUs: the known ones, and any other from its properties."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lora_fused.devices import DEVICES, Device, from_properties, tf32_is_allowed
from lora_fused.request import are_aligned

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
    L2_cache_size=50 << 20, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472, regs_per_multiprocessor=65536, warp_size=32,
    clock_rate=1980000, memory_clock_rate=2619000, memory_bus_width=5120,
)  # fmt: skip


def properties(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(H100), **changes})


@pytest.mark.parametrize("device", DEVICES.values(), ids=str)
def test_the_descriptions_are_sound(device: Device) -> None:
    assert 0.9e9 < device.clock < 3e9
    assert device.flops(torch.bfloat16) > device.flops(torch.float32, tf32=True) * 0.99
    assert device.flops(torch.float32, tf32=True) >= device.flops(torch.float32)
    assert device.shared_bytes_per_block <= device.shared_bytes_per_sm
    assert hash(device) == hash(device) and device in {device}
    assert device.flops(torch.complex64) > 0  # an unexpected dtype has a rate, too


def test_a_known_gpu_by_its_name() -> None:
    device = from_properties(H100)
    assert device.capability == 90 and device.bandwidth == DEVICES["H100"].bandwidth
    assert device.flops(torch.bfloat16) == DEVICES["H100"].flops(torch.bfloat16)
    assert device.sustained == DEVICES["H100"].sustained


def test_a_smaller_sister_of_a_known_gpu_is_not_taken_for_it() -> None:
    pcie = from_properties(
        properties(name="NVIDIA H100 PCIe", multi_processor_count=114, memory_clock_rate=1593000)
    )
    assert pcie.bandwidth == pytest.approx(2 * 1593e6 * 640)
    assert pcie.flops(torch.bfloat16) == pytest.approx(4096 * 114 * 1.98e9)
    laptop = from_properties(
        properties(name="NVIDIA GeForce RTX 4090 Laptop GPU", major=8, minor=9,
                   multi_processor_count=76)
    )  # fmt: skip
    assert laptop.flops(torch.bfloat16) < DEVICES["RTX 4090"].flops(torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "major", "minor"),
    [
        ("Tesla V100", 7, 0),
        ("Jetson Orin", 8, 7),
        ("GB300", 10, 3),
        ("Rubin", 13, 0),
        ("K80", 3, 7),
    ],
)
def test_an_unknown_gpu_from_its_properties(name: str, major: int, minor: int) -> None:
    device = from_properties(properties(name=name, major=major, minor=minor))
    assert device.capability == major * 10 + minor
    assert 1e12 < device.flops(torch.bfloat16) < 1e16
    assert device.bandwidth == pytest.approx(2 * 2619e6 * 640)


def test_a_torch_that_tells_little() -> None:
    device = from_properties(SimpleNamespace(name="X", major=8, minor=0, multi_processor_count=10))
    assert device.shared_bytes_per_block == 48 << 10 and device.bandwidth > 0
    assert device.flops(torch.float16) > 0 and device.warp_size == 32


@pytest.mark.parametrize(
    ("arch", "capability"),
    [("gfx942:sramecc+:xnack-", 942), ("gfx1100", 1100), ("gfx90a:x", 90), ("", 0)],
)
def test_an_amd_gpu(arch: str, capability: int) -> None:
    device = from_properties(
        properties(name="AMD Instinct MI300X", gcnArchName=arch, multi_processor_count=304,
                   warp_size=64),
        is_hip=True,
    )  # fmt: skip
    assert device.kind == "hip" and device.capability == capability and device.warp_size == 64
    assert device.bandwidth == DEVICES["MI300X"].bandwidth


def test_either_switch_for_tf32() -> None:
    matmul = torch.backends.cuda.matmul
    assert not tf32_is_allowed()
    try:
        matmul.allow_tf32 = True
        assert tf32_is_allowed()
        matmul.allow_tf32 = False
        assert not tf32_is_allowed()
        if hasattr(matmul, "fp32_precision"):
            matmul.fp32_precision = "tf32"
            assert tf32_is_allowed()
    finally:
        if hasattr(matmul, "fp32_precision"):
            matmul.fp32_precision = "none"
        matmul.allow_tf32 = False


def test_alignment() -> None:
    t = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert are_aligned(t, None, t.t(), t[:, :60][:, ::1], torch.zeros(0, 3))
    assert not are_aligned(t[:, 1:]) and not are_aligned(torch.zeros(4, 5))
    assert not are_aligned(t.as_subclass(type("Sub", (torch.Tensor,), {})))
