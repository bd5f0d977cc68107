"""Which strategy is faster on a CPU that nobody has measured: one trial per bucket of sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lora_fused import autotune
from lora_fused.backends import cpu
from lora_fused.config import Config, Problem, Route

_MAX_TRIAL_M = 256
_MAX_TRIAL_K = 4096
_MAX_TRIAL_FLOPS = 6e8


def fastest_strategy(problem: Problem, threads: int, direction: str, default: str) -> str:
    """The fastest strategy for one direction ("forward" or "dx") of a Problem that the CPU can run.

    Timed on synthetic tensors of the bucket's sizes, cut to what fits the time budget: beyond them
    the speed of either strategy per operation changes little. `default` where timing is off.
    """
    trial = _trial_of(problem)
    key = (
        f"{direction} {str(problem.dtype).removeprefix('torch.')} M{autotune.bucket(problem.M)} "
        f"K{trial.K} N{trial.N} R{trial.R} {problem.weight_layout} threads{threads}"
        f"{' packed' if problem.prepacked else ''}{' dropout' if problem.dropout else ''}"
    )
    return autotune.best(key, _candidates(trial, threads, direction), default)


def _trial_of(problem: Problem) -> Problem:
    """Powers of two, small enough for the budget: M and K are cut first, then N."""
    M = min(autotune.bucket(problem.M), _MAX_TRIAL_M)
    K = min(autotune.bucket(problem.K), _MAX_TRIAL_K)
    N = autotune.bucket(problem.N)
    while 2 * M * N * K > _MAX_TRIAL_FLOPS and N > 64:
        N //= 2
    return replace(problem, M=M, K=K, N=N, R=autotune.bucket(problem.R) if problem.R else 0)


def _candidates(trial: Problem, threads: int, direction: str) -> dict[str, Callable[[], object]]:
    """One call of the direction per strategy. Nothing is allocated before the first call."""
    made: list[Callable[[Config], object]] = []

    def run(strategy: str) -> object:
        if not made:
            made.append(_prepare(trial, direction))
        return made[0](Config("cpu", strategy, strategy, cpu.isa(), threads))

    names: tuple[str, ...] = ("own", "packed") if trial.prepacked else ("own",)
    names += ("hybrid",) if trial.dropout else ("hybrid", "library")
    return {name: lambda name=name: run(name) for name in names}  # type: ignore[misc]


def _prepare(trial: Problem, direction: str) -> Callable[[Config], object]:
    M, K, N, R = trial.M, trial.K, trial.N, trial.R

    def filled(*shape: int) -> Tensor:
        return torch.full(shape, 1 / 64, dtype=trial.dtype)

    by_column = trial.weight_layout == "column"
    weight = filled(K, N).t() if by_column else filled(N, K)
    forward = direction == "forward"
    x, adapter = (filled(M, K), filled(N, R)) if forward else (filled(M, N), filled(R, K))
    s = filled(M, R) if R else None
    packed = cpu.pack(weight, trial.threads) if trial.prepacked else None

    def call(config: Config) -> object:
        route = Route(
            trial, config, trial.dtype, False, frozenset(), (M, K), (M, N), (trial.dtype,) * 4
        )
        return cpu.matmul(route, direction, x, weight, s, adapter, packed=packed)

    return call
