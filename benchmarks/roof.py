"""The measured roofs of a device: copies of memory, the vendor's GEMM, and of one core the FMAs.

Each is the best of several bursts: a roof is what the device can do, not what it mostly does. The
FMA peak (multiply-adds in registers, fma_peak.c) takes a cc and an x86.
"""

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.timing import Clock, elapsed_ns, pace_of

SOURCE = Path(__file__).with_name("fma_peak.c")
COPY_BYTES = 256 << 20  # of the source, or 8 last caches if that is more, or 1/16 of the memory
GEMM_SIZES = (512, 1024, 2048, 4096, 8192)
GEMM_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BURSTS = 5
_GEMM_NS = 100_000_000  # a larger product is not tried if it would take longer
_ROOF_NS = 600_000_000  # no burst begins after that


def copy_gbytes(device: str, clock: Clock, cache_bytes: int, memory_bytes: int) -> float:
    """torch's copy between two buffers beyond the last cache: 10^9 bytes/s, read and written.

    cache_bytes: the last cache; memory_bytes: the device's, 0 if not known.
    """
    size = max(COPY_BYTES, 8 * cache_bytes)
    if memory_bytes:
        size = min(size, memory_bytes // 16)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _shortest_ns(lambda: target.copy_(source), clock)


def gemm_gflops(device: str, clock: Clock) -> dict[str, float]:
    """The vendor's GEMM x Wᵀ of squares as large as the time allows: 10^9 FLOP/s per dtype."""
    return {name: _gemm_rate(dtype, device, clock) for name, dtype in GEMM_DTYPES.items()}


def _gemm_rate(dtype: torch.dtype, device: str, clock: Clock) -> float:
    best = 0.0
    for n in GEMM_SIZES:
        if best and 2 * n**3 / best > _GEMM_NS:
            break
        x, w = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        with torch.no_grad():
            shortest = _shortest_ns(partial(torch.nn.functional.linear, x, w), clock)
        best = max(best, 2 * n**3 / shortest)
    return best


def _shortest_ns(call: Callable[[], object], clock: Clock) -> float:
    """Of one call, in the best of several bursts."""
    pace = pace_of(call, clock)
    bursts, spent = [pace.sample_ns], pace.sample_ns
    while len(bursts) < _BURSTS and spent < _ROOF_NS:
        bursts.append(elapsed_ns(call, pace.repeats, clock))
        spent += bursts[-1]
    return max(min(bursts), 1) / pace.repeats


def peak_gflops() -> dict[str, float]:
    """GFLOP/s per dtype, best of several bursts; empty where it cannot be measured.

    fp16 is left out: its roof depends on whether it is computed in fp16 or converted to fp32.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma_peak.so"
        built = subprocess.run(
            [compiler, "-O2", "-shared", "-fPIC", str(SOURCE), "-o", str(library)],
            capture_output=True,
            check=False,
        )
        if built.returncode:  # not x86, or a compiler that does not know the instructions
            return {}
        native = ctypes.CDLL(str(library))
    native.fp32_peak_step.restype = native.bf16_peak_step.restype = ctypes.c_double
    native.fp32_peak_step.argtypes = [ctypes.c_int64]
    native.bf16_peak_step.argtypes = [ctypes.c_int64, ctypes.c_int]
    has_amx = int(torch.cpu._is_amx_tile_supported())
    peaks = {
        "fp32": _best_rate(native.fp32_peak_step),
        "bf16": _best_rate(lambda n: native.bf16_peak_step(n, has_amx)),
    }
    return {dtype: rate for dtype, rate in peaks.items() if rate > 0}


def _best_rate(step: Callable[[int], float], bursts: int = 15) -> float:
    rates = []
    for _ in range(bursts):
        start = time.thread_time_ns()
        work = step(400_000)
        rates.append(work / max(time.thread_time_ns() - start, 1))
    return max(rates)
