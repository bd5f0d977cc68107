"""Which strategy runs each direction on the CPU: the one rule, and the measurements behind it.

Measured with torch 2.13, 1 thread, r = 16: time of the direction relative to the frozen GEMM, as
own / hybrid / library (packed in brackets). What tells the directions apart is how the weight lies
in memory: "forward" reads it along the contraction, "dx" across it. A weight stored [K, N]
(fan_in_fan_out) swaps the two.

AMD EPYC, Zen 4 (family 25 with AVX512-BF16, 1 MiB second-level cache), K x N = 1024 x 1024,
2048 x 2048 and 3584 x 512; own with M <= 4: 768 x 2304, 2048 x 2048, 3584 x 3584, 2048 x 8192 and
8192 x 2048, out of the cache from 8 MiB on. Beside heavy load, ratios good to about 0.1:
bf16, vendor's GEMM oneDNN at 75-92 % of the peak:
    forward  M = 1     0.4-0.5 / 1.0-2.4 / 1.1-1.5             M = 4    0.6-0.7 / 1.0-1.3 / 1.1-1.5
             M = 16    0.6-0.8 / 1.1-1.3 / 1.1-1.2  [0.6-0.7]  M = 128  0.9-1.0 / 1.1-1.2 / 1.0-1.2
             M = 512   1.0-1.1 / 1.0-1.1 / 1.0-1.1  [1.0]
             M = 160-256, out of the cache, little load, K x N = 2048 x 512, 2048, 8192 and
                       8192 x 2048: 1.08-1.15 / 1.02-1.07 / 1.03-1.16;
                       in the cache, 768 x 3072 and 1024 x 1024: 0.94-1.07 / 1.03-1.10
    dx       M = 1     0.3-0.5 / 0.8-1.2 / 0.9-1.2             M = 4    0.3-0.9 / 1.0 / 1.1-1.3
             M = 16    0.8-1.0 / 1.1-1.4 / 1.1-1.3  [0.5-0.6]
             M = 128   1.0-1.1 / 1.1    / 1.1-1.2   [0.9-1.0]  M = 512  1.0 / 1.0-1.1 / 1.0-1.1
fp32, vendor's GEMM MKL at 74-84 % of the peak from M = 128 on:
    forward  M = 1     0.6-0.95 / 1.0-1.1 / 1.0-1.2  M = 4   0.5-0.6 / 1.0-1.2 / 1.0-1.1
             M = 16    0.5-0.8 / 1.0-1.1 / 1.0-1.2  [0.5-0.6]  M = 128  0.8-0.9 / 1.0 / 1.0-1.1
             M = 512   0.9-1.0 / 1.0    / 1.0       [0.9]
    dx       M = 1     0.7-0.95 / 1.1-1.4 / 1.0-1.2  M = 4   0.3-0.4 / 1.0-1.2 / 1.0-1.2
             M = 16    0.8     / 1.1-1.2 / 0.9-1.0  [0.4-0.6]  M = 128  0.9 / 1.0 / 1.0-1.1  [0.8]
             M = 512   0.9     / 1.0    / 1.0       [0.8-0.9]
fp16, vendor's GEMM at 2-20 % of the fp32 peak: own takes 0.03-0.35 of its time.

Intel Xeon with AMX (family 6, 2 MiB second-level cache), layers from 768 to 8192 wide, weight
stored [N, K]; measured before fp32 products of few tokens were turned (csrc/cpu/run.cpp) and
before the kernels for M <= 4 fetched the next rows ahead (csrc/cpu/small.h):
bf16, own kernels on AMX tiles, vendor's GEMM oneDNN on AMX tiles:
    forward  M = 1     0.4-0.6 / 1.0-1.4 / 1.0-1.4  M = 4     0.8-0.9 / 1.1-1.5 / 1.0-1.4
             M = 16    0.8-1.0 / 1.1-1.6 / 1.0-1.4     [0.4-0.7] up to 8 M weights, above 1.0-1.3
             M = 128   0.9-1.2 / 1.1-1.4 / 1.0-1.4     [0.8-0.9] up to 4 M weights
             M >= 512  0.9-1.4 / 1.0-1.4 / 1.0-1.4     K = 8192: 1.1 / 1.0 / 1.0
    dx       M <= 4    0.5-0.7 / 1.0-1.7 / 1.0-1.7
             M = 16    0.8-1.3 / 1.0-1.4 / 1.0-1.6     [0.35-0.9]
             M = 128   1.0-1.4 / 1.1-1.3 / 1.0-1.4     [0.8-1.2]   own wins up to 2 M weights
             M = 512   1.1-1.3 / 1.0-1.3 / 1.0-1.5     [0.9-1.2]
             M = 2048  1.1-1.3 / 1.0-1.3 / 1.0-1.3     [1.0-1.3]
    The native shrink and reduce take 0.5-0.8 of the time of torch's, hence hybrid, never library.
fp32, vendor's GEMM MKL at 85-90 % of the peak:
    forward  M <= 16   0.5-1.0 / 1.0-1.4 / 0.9-1.2     M = 1: 1.0 / 1.2 / 1.1
             M = 128   0.9-1.1 / 1.0-1.2 / 1.0-1.1     M = 512: 1.0-1.1 / 1.0-1.1 / 1.0-1.05
    dx       M = 128   0.6-0.8 / 1.0-1.1 / 1.0-1.1     K = 2048, 8192; other K 1.0-1.3
             M = 16    0.8-0.9 / 1.1 / 1.0-1.1         K = 2048, 8192, 16 M weights; else 1.4-1.8
             others    1.1-1.3 / 1.0-1.5 / 1.0-1.1
    A packed weight was never faster than a plain one here.
fp16, vendor's GEMM oneDNN; its dx runs at 0.1-2 GFLOP/s from M = 128 on, own 160:
    forward  0.5-1.0 / 1.1-1.4 / 1.0-1.2     dx (M <= 16)  0.4-1.1 / 1.0-1.4 / 1.0-1.4
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lora_fused.config import Config, Problem

if TYPE_CHECKING:
    from lora_fused.backends.cpu import CpuInfo

FEW_TOKENS = 4
"""Up to here native code reads a plain weight once, straight from memory."""

_TURNED_TOKENS = 128
"""Beyond that a plain weight is packed at every call: kTurnedTokens of csrc/cpu/engine.h."""

_MI = 1 << 20
_ZEN_3_AND_4 = 25  # of these only Zen 4 has AVX-512
_SERIAL_BELOW_FLOPS = 2 * _MI
"""Below this much work one thread is faster than waking the others."""


def choose_cpu(problem: Problem, cpu: CpuInfo) -> Config:
    """The strategies for a Problem that the native kernels can run."""
    forward, dx = _rule(problem, cpu)
    config = Config("cpu", forward, dx, cpu.isa, thread_count(problem))
    if _is_measured(cpu):
        return config
    from lora_fused.backends import cpu_trial

    forward, dx = (
        cpu_trial.fastest_strategy(problem, config.threads, direction, default)
        for direction, default in (("forward", forward), ("dx", dx))
    )
    return replace(config, forward=forward, dx=dx)


def thread_count(problem: Problem) -> int:
    """torch's thread count, or 1 for a tiny problem."""
    flops = 2 * problem.M * problem.N * problem.K
    return 1 if flops < _SERIAL_BELOW_FLOPS else problem.threads


def _is_measured(cpu: CpuInfo) -> bool:
    if cpu.vendor == "AuthenticAMD":
        return cpu.family == _ZEN_3_AND_4 and cpu.isa == "avx512_bf16"
    return cpu.vendor == "GenuineIntel" and "amx_bf16" in cpu.flags


def _rule(problem: Problem, cpu: CpuInfo) -> tuple[str, str]:
    """Strategy forward and for dx, as if every CPU with such features were the measured one."""
    if problem.weight_layout == "strided" and not problem.prepacked:
        return "hybrid", "hybrid"
    if problem.weight_layout == "column":
        along, across = _by_orientation(replace(problem, K=problem.N, N=problem.K), cpu)
        return across, along
    return _by_orientation(problem, cpu)


def _by_orientation(problem: Problem, cpu: CpuInfo) -> tuple[str, str]:
    """Strategy where the weight is read along its contraction, and where it is read across."""
    tiles = "amx_bf16" in cpu.flags
    if problem.dtype == torch.float32 and cpu.vendor == "GenuineIntel":
        return _fp32_beside_mkl_along(problem), _fp32_beside_mkl_across(problem)
    if problem.dtype == torch.float16 and tiles:
        return "own", "own"
    if problem.dtype == torch.bfloat16 and tiles:
        if cpu.isa == "amx_bf16":
            return _bf16_tiles_along(problem), _bf16_tiles_across(problem)
        slower = "own" if problem.M <= FEW_TOKENS else "library"
        return slower, slower
    return _by_vectors_along(problem), _by_vectors(problem)


def _bf16_tiles_along(problem: Problem) -> str:
    M, weights = problem.M, problem.K * problem.N
    if M <= FEW_TOKENS:
        return "own"
    if problem.prepacked and M <= 128 and weights <= 4 * _MI:
        return "packed"
    if problem.K > 4096 or (M <= 16 and weights > 8 * _MI):
        return "hybrid"
    return "own"


def _bf16_tiles_across(problem: Problem) -> str:
    M, weights = problem.M, problem.K * problem.N
    if M <= FEW_TOKENS:
        return "own"
    if problem.prepacked and M <= 512:
        return "packed"
    return "own" if M <= 128 and weights <= 2 * _MI else "hybrid"


def _by_vectors(problem: Problem) -> str:
    """No tiles on either side: own kernels win at nearly every size."""
    return "packed" if problem.prepacked and problem.M > FEW_TOKENS else "own"


def _by_vectors_along(problem: Problem) -> str:
    """Where a plain weight is packed at every call, and few tokens share what that takes."""
    packs = _TURNED_TOKENS < problem.M <= 2 * _TURNED_TOKENS and problem.K >= 2048
    strategy = _by_vectors(problem)
    bf16 = problem.dtype == torch.bfloat16
    return "hybrid" if strategy == "own" and packs and bf16 else strategy


def _fp32_beside_mkl_along(problem: Problem) -> str:
    return "own" if problem.M <= 128 else "library"


def _fp32_beside_mkl_across(problem: Problem) -> str:
    """MKL is slow where the stored rows (problem.K long) share the sets of a cache."""
    M, weights = problem.M, problem.K * problem.N
    own = (64 <= M <= 256 and weights >= _MI) or (4 <= M <= 256 and weights >= 16 * _MI)
    return "own" if own and problem.K % 2048 == 0 else "library"
