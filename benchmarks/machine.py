"""Where a run happens: CPU, caches, load, instruction sets, versions, commit."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.roof import peak_gflops
from lora_fused.backends import cpu

_PACKAGES = (
    *("torch", "lora_fused", "peft", "transformers", "loralib", "numpy"),
    *("unsloth", "axolotl", "bitsandbytes", "lycoris-lora", "freesolo-chalk", "lorafusion"),
)


def describe_machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Everything about the machine that a reader of the numbers needs."""
    flags = _cpuinfo("flags").split()
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
    }


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
        **_nvidia_smi(),
    }


def _nvidia_smi() -> dict[str, str]:
    fields = ("driver_version", "power.limit", "power.draw", "clocks.sm", "clocks.mem", "pstate")
    query = f"--query-gpu={','.join(fields)}"
    index = f"--id={torch.cuda.current_device()}"
    try:
        said = subprocess.run(
            ["nvidia-smi", query, index, "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in said.split(",")), strict=False))


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
