"""What a GPU can do: the numbers behind every choice that is made for it.

The limits of a real device (multiprocessors, shared memory, caches) come from torch's properties
of that device; its bandwidth and its peak rates from the description below whose name it bears,
else from its clocks and its generation. An unknown GPU therefore gets numbers of the right size,
never an error.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

KB, MB = 1 << 10, 1 << 20


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU. kind is "cuda" or "hip"; capability 80 for sm_80, 942 for gfx942.

    bandwidth: of the memory, in bytes/s. tensor_flops: dense peak per compute dtype, in flop/s,
    with fp32 accumulation; IEEE arithmetic for float32, whose rate under TF32 is `tf32_flops`.
    sustained: the part of the peak that the vendor's GEMM holds at large sizes (power, clocks).
    flops_per_clock: of one multiprocessor in half precision, dense.
    """

    name: str
    kind: str
    capability: int
    sms: int
    shared_bytes_per_block: int
    shared_bytes_per_sm: int
    l2_bytes: int
    bandwidth: float
    tensor_flops: Mapping[torch.dtype, float] = field(hash=False)
    tf32_flops: float
    sustained: float = 0.8
    flops_per_clock: int = 1024
    registers_per_sm: int = 65536
    warp_size: int = 32

    @property
    def clock(self) -> float:
        """Of the multiprocessors at the peak rate, in Hz."""
        return self.tensor_flops[torch.bfloat16] / (self.sms * self.flops_per_clock)

    def flops(self, dtype: torch.dtype, tf32: bool = False) -> float:
        """The dense peak for a compute dtype, in flop/s."""
        if dtype == torch.float32 and tf32:
            return self.tf32_flops
        return self.tensor_flops.get(dtype, self.tensor_flops[torch.float32])

    def __str__(self) -> str:
        target = f"sm_{self.capability}" if self.kind == "cuda" else f"gfx{self.capability}"
        return f"{self.name} ({target}, {self.sms} multiprocessors)"


def _rates(half: float, single: float, double: float) -> dict[torch.dtype, float]:
    """Peak rates from Tflop/s."""
    return {
        torch.bfloat16: half * 1e12,
        torch.float16: half * 1e12,
        torch.float32: single * 1e12,
        torch.float64: double * 1e12,
    }


DEVICES = {
    device.name: device
    for device in (
        Device("H100", "cuda", 90, 132, 227 * KB, 228 * KB, 50 * MB, 3.35e12,
               _rates(989, 67, 67), 494e12, 0.73, 4096),
        Device("H200", "cuda", 90, 132, 227 * KB, 228 * KB, 50 * MB, 4.8e12,
               _rates(989, 67, 67), 494e12, 0.73, 4096),
        Device("A100", "cuda", 80, 108, 163 * KB, 164 * KB, 40 * MB, 2.04e12,
               _rates(312, 19.5, 19.5), 156e12, 0.85, 2048),
        Device("L40S", "cuda", 89, 142, 99 * KB, 100 * KB, 96 * MB, 0.864e12,
               _rates(362, 91.6, 1.4), 183e12, 0.70, 1024),
        Device("RTX 3090", "cuda", 86, 82, 99 * KB, 100 * KB, 6 * MB, 0.936e12,
               _rates(71, 35.6, 0.56), 35.6e12, 0.90, 512),
        Device("RTX 4090", "cuda", 89, 128, 99 * KB, 100 * KB, 72 * MB, 1.008e12,
               _rates(165, 82.6, 1.3), 82.6e12, 0.95, 512),
        Device("RTX 5090", "cuda", 120, 170, 99 * KB, 100 * KB, 96 * MB, 1.79e12,
               _rates(209.5, 104.8, 1.6), 104.8e12, 0.95, 512),
        Device("B200", "cuda", 100, 148, 227 * KB, 228 * KB, 126 * MB, 8.0e12,
               _rates(2250, 75, 37), 1125e12, 0.72, 8192),
        Device("MI300X", "hip", 942, 304, 64 * KB, 64 * KB, 256 * MB, 5.3e12,
               _rates(1307, 163.4, 163.4), 653.7e12, 0.55, 2048,
               registers_per_sm=131072, warp_size=64),
    )
}  # fmt: skip
"""By name. Data-sheet numbers (NVIDIA and AMD; SXM and OAM modules). `sustained` from published
bf16 GEMM rates at 4096 to 8192: H100 720 (pranjalssh/fast.cu), A100 267 (triton issue 743), B200
1610 (pyptx.dev), RTX 5090 224 Tflop/s at wide shapes, L20 95-98 % of its limit; rounded, the others
by analogy."""

_PER_CLOCK = {
    "cuda": {70: (1024, 128), 75: (512, 128), 80: (2048, 128), 86: (512, 256), 87: (1024, 256),
             89: (512, 256), 90: (4096, 256), 100: (8192, 256), 103: (8192, 256),
             120: (512, 256), 121: (512, 256)},
    "hip": {90: (1024, 256), 908: (1024, 256), 942: (2048, 256), 950: (4096, 256),
            1100: (512, 256), 1200: (1024, 256)},
}  # fmt: skip
"""flop per multiprocessor and clock: half precision with fp32 accumulation, and IEEE fp32."""

_SLOWEST_BANDWIDTH = 0.3e12
_USUAL_CLOCK = 1.5e9


def tf32_is_allowed() -> bool:
    """Whether torch lets float32 GEMMs on GPUs round their inputs to TF32, set either way.

    NOTE: torch's older switch raises once the newer one (torch 2.9) was used.
    """
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


def gpu_of(x: torch.Tensor) -> Device | None:
    """The GPU that a tensor is on; None elsewhere."""
    return device_of(x.device) if x.is_cuda else None


def device_of(device: torch.device | str) -> Device:
    """The description of a torch GPU; one of torch's CUDA (or HIP) devices."""
    where = torch.device(device)
    index = torch.cuda.current_device() if where.index is None else where.index
    return _device_of_index(index)


@functools.cache
def _device_of_index(index: int) -> Device:
    return from_properties(torch.cuda.get_device_properties(index), torch.version.hip is not None)


def from_properties(properties: Any, is_hip: bool = False) -> Device:
    """The description of a device from torch's properties of it, whatever torch's age."""
    kind = "hip" if is_hip else "cuda"
    capability = _capability(properties, is_hip)
    sms = int(properties.multi_processor_count)
    clock = getattr(properties, "clock_rate", 0) * 1e3 or _USUAL_CLOCK
    shared = getattr(properties, "shared_memory_per_multiprocessor", 0) or 64 * KB
    block = getattr(properties, "shared_memory_per_block_optin", 0)
    block = block or getattr(properties, "shared_memory_per_block", 0) or 48 * KB
    half, single = _per_clock(kind, capability)
    device = Device(
        name=str(properties.name),
        kind=kind,
        capability=capability,
        sms=sms,
        shared_bytes_per_block=block,
        shared_bytes_per_sm=max(shared, block),
        l2_bytes=getattr(properties, "L2_cache_size", 0) or 4 * MB,
        bandwidth=_bandwidth(properties),
        tensor_flops=_rates(*(rate * sms * clock / 1e12 for rate in (half, single, single / 64))),
        tf32_flops=half * sms * clock / 2,
        flops_per_clock=half,
        registers_per_sm=getattr(properties, "regs_per_multiprocessor", 0) or 65536,
        warp_size=getattr(properties, "warp_size", 0) or 32,
    )
    known = _known(device)
    if known is None:
        return device
    return replace(
        device,
        bandwidth=known.bandwidth,
        tensor_flops=known.tensor_flops,
        tf32_flops=known.tf32_flops,
        sustained=known.sustained,
        flops_per_clock=known.flops_per_clock,
    )


def _capability(properties: Any, is_hip: bool) -> int:
    if is_hip:
        digits = str(getattr(properties, "gcnArchName", "")).split(":")[0].removeprefix("gfx")
        return int(digits) if digits.isdigit() else 90 if digits == "90a" else 0
    return int(properties.major) * 10 + int(properties.minor)


def _per_clock(kind: str, capability: int) -> tuple[int, int]:
    """The rates of the newest generation that is not newer than the device."""
    table = _PER_CLOCK[kind]
    at_most = [known for known in table if known <= capability] or [min(table)]
    return table[max(at_most)]


def _bandwidth(properties: Any) -> float:
    """Two transfers per clock of the bus; torch tells the clock in kHz."""
    clock = getattr(properties, "memory_clock_rate", 0) * 1e3
    width = getattr(properties, "memory_bus_width", 0) / 8
    return float(max(2 * clock * width, _SLOWEST_BANDWIDTH))


def _known(device: Device) -> Device | None:
    """The description that the device's name contains, unless it is a smaller sister of it."""
    for name, known in DEVICES.items():
        words = device.name.replace("-", " ").split()
        if all(word in words for word in name.split()) and device.sms == known.sms:
            return known
    return None
