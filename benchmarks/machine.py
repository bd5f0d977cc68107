"""Where a run happens: CPU, caches, roofs, load, clocks, instruction sets, versions, commit."""

import functools
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.roof import copy_gbytes, gemm_gflops, peak_gflops
from benchmarks.strategy import maps_of_this_machine
from benchmarks.timing import clock_for
from lora_fused.backends import cpu

_PACKAGES = (
    *("torch", "lora_fused", "peft", "transformers", "loralib", "numpy"),
    *("unsloth", "axolotl", "bitsandbytes", "lycoris-lora", "freesolo-chalk", "lorafusion"),
)


def describe_machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Everything about the machine that a reader of the numbers needs."""
    flags = _cpuinfo("flags").split()
    before = state(device)
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "family": _cpuinfo("cpu family"),
        "model": _cpuinfo("model"),
        "vendor": _cpuinfo("vendor_id"),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "virtual": "hypervisor" in flags,
        "cores": os.cpu_count() or 1,
        "threads": threads,
        "caches": cache_bytes(),
        "memory_bytes": memory_bytes(),
        "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else [],
        "amx": torch.cpu._is_amx_tile_supported(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": torch.backends.mkl.is_available(),
        "onednn": torch.backends.mkldnn.is_available(),
        "native": _native(),
        "peak_gflops": {k: round(v, 1) for k, v in peak_gflops().items()},
        "gpu": None if device == "cpu" else describe_gpu(),
        **_roofs(threads, device),
        "strategy_maps": [asdict(m) for m in maps_of_this_machine(device)],
        "before": before,
    }


@functools.cache
def _roofs(threads: int, device: str) -> dict[str, Any]:
    """Of the device, with as many threads as the run takes (torch.set_num_threads)."""
    clock = clock_for(threads, device)
    if device == "cpu":
        cache, memory = max(cache_bytes().values(), default=0), memory_bytes()
    else:
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        cache, memory = getattr(gpu, "L2_cache_size", 0), gpu.total_memory
    rates = gemm_gflops(device, clock)
    return {
        "copy_gbytes": round(copy_gbytes(device, clock, cache, memory), 2),
        "gemm_gflops": {dtype: round(rate, 1) for dtype, rate in rates.items()},
    }


def state(device: str = "cpu") -> dict[str, Any]:
    """What changes while a run goes on: load and clock of the CPU; clocks and power of the GPU.

    Recorded before and after: a GPU that throttles shows here. What is not known is left out.
    """
    found: dict[str, Any] = {}
    if hasattr(os, "getloadavg"):
        found["load"] = [round(x, 2) for x in os.getloadavg()]
    if mhz := _cpuinfo("cpu MHz"):
        found["cpu_mhz"] = round(float(mhz))
    if device != "cpu":
        found["gpu"] = _nvidia_smi(_STATE_FIELDS) or _sensors()
    return found


def describe_gpu() -> dict[str, Any]:
    """Name, size, clocks and power of the current CUDA device; what is not known is left out."""
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": p.name,
        "capability": [p.major, p.minor],
        "multiprocessors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "l2_bytes": getattr(p, "L2_cache_size", 0),
        "cuda": torch.version.cuda or torch.version.hip or "",
        **_nvidia_smi(("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")),
    }


_STATE_FIELDS = (
    "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "pstate",
    "clocks_throttle_reasons.active",
)  # fmt: skip


def _nvidia_smi(fields: Sequence[str]) -> dict[str, str]:
    """Fields of the current device as nvidia-smi prints them, units included; {} without it."""
    query = f"--query-gpu={','.join(fields)}"
    device = torch.cuda.current_device()
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    index = f"--id={device if uuid is None else f'GPU-{uuid}'}"  # numbers may be masked, ids not
    try:
        said = subprocess.run(
            ["nvidia-smi", query, index, "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in said.split(",")), strict=False))


def _sensors() -> dict[str, str]:
    """The same by torch, which takes pynvml (NVIDIA) or amdsmi (AMD)."""
    try:
        return {
            "clocks.sm": f"{torch.cuda.clock_rate()} MHz",
            "power.draw": f"{torch.cuda.power_draw() / 1000:.2f} W",
            "temperature.gpu": str(torch.cuda.temperature()),
        }
    except (ImportError, RuntimeError):
        return {}


def _native() -> str:
    """What lora_fused's own CPU code found."""
    module = cpu.native()
    if module is None:
        return "native kernels not built: the torch backend serves every call"
    if not cpu.isa():
        return "native kernels need AVX2, which this CPU lacks: the torch backend serves every call"
    return f"native kernels, {cpu.isa()} in use, can run {', '.join(module.supported_isas())}"


def versions() -> dict[str, str]:
    """Installed versions of what takes part; absent packages are absent here."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checkout's commit, marked if it has uncommitted changes; 'unknown' outside a checkout."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "-dirty" if git("status", "--porcelain") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cache_bytes() -> dict[str, int]:
    """Size of the data caches that core 0 sees, such as {'L1': 49152, 'L2': 2097152}."""
    sizes = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (cache / "type").read_text().strip() != "Instruction":
            size = (cache / "size").read_text().strip()
            level = "L" + (cache / "level").read_text().strip()
            sizes[level] = int(size.rstrip("KM")) * (1 << 20 if size.endswith("M") else 1 << 10)
    return sizes


def _cpuinfo(key: str) -> str:
    """The first value of `key` in /proc/cpuinfo, '' where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), ""
    )


def memory_bytes() -> int:
    """The machine's memory, 0 where it is not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
