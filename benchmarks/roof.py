"""The measured roof of one core: multiply-adds in registers (fma_peak.c, if there is a cc)."""

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("fma_peak.c")


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
    """The best of short bursts: a roof is what the core can do, not what it mostly does."""
    rates = []
    for _ in range(bursts):
        start = time.thread_time_ns()
        work = step(400_000)
        rates.append(work / max(time.thread_time_ns() - start, 1))
    return max(rates)
