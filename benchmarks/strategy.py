"""Strategy maps: what the dispatcher chooses over a grid of tokens M and ranks R.

`maps_of_this_machine` asks the dispatcher about the device of a run; its answers go into the result
file. `modelled_map` asks the cost model about a GPU that is not here, as --model-gpu does; those
answers are labelled "modelled" wherever they are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.model_gpu import device_named
from benchmarks.tensors import TORCH_DTYPES
from lora_fused import backends, gpu_choice
from lora_fused.config import Config, Problem
from lora_fused.devices import gpu_of
from lora_fused.dispatch import choose

MODELLED_GPUS = ("h100", "a100", "rtx4090")
_GPU_LAYER = (4096, 4096)
_GPU_TOKENS, _GPU_RANKS = (1, 4, 16, 64, 256, 1024, 2048, 4096, 8192), (8, 16, 32, 64, 128, 256)
# Smaller for a CPU: where nobody has measured it, the dispatcher times each of the points.
_CPU_LAYER = (2048, 2048)
_CPU_TOKENS, _CPU_RANKS = (1, 4, 16, 64, 256, 1024), (8, 16, 64)
_NEEDS = frozenset({"x", "lora_A", "lora_B"})


@dataclass(frozen=True)
class StrategyMap:
    """forward[i][j], dx[i][j]: "backend strategy" at ranks[i] and tokens[j]; K x N is the layer."""

    device: str
    modelled: bool
    dtype: str
    K: int
    N: int
    tokens: list[int]
    ranks: list[int]
    forward: list[list[str]]
    dx: list[list[str]]


def maps_of_this_machine(device: str) -> list[StrategyMap]:
    """One map per dtype that training uses, for the run's device."""
    if device == "cpu":
        asked = [
            replace(_problem(*_CPU_LAYER, dtype), threads=torch.get_num_threads())
            for dtype in ("bf16", "fp32")
        ]
        return [_map("this CPU", False, p, _CPU_TOKENS, _CPU_RANKS, choose) for p in asked]
    gpu = gpu_of(torch.empty(1, device=device))
    problem = replace(_problem(*_GPU_LAYER, "bf16"), device_type="cuda", device=gpu)
    name = f"this {gpu.name if gpu else device}"
    return [_map(name, True, problem, _GPU_TOKENS, _GPU_RANKS, choose)]


def modelled_map(name: str) -> StrategyMap:
    """What the cost model chooses for a GPU by its name, of the kernels of this installation."""
    device = device_named(name)
    problem = replace(_problem(*_GPU_LAYER, "bf16"), device_type="cuda", device=device)
    names = tuple(n for n in gpu_choice.GPU_BACKENDS if backends.load(n) is not None)
    by_model = partial(gpu_choice.configure_by_model, names=names)
    return _map(device.name, True, problem, _GPU_TOKENS, _GPU_RANKS, by_model)


def _problem(K: int, N: int, dtype: str) -> Problem:
    """A training step's call, of one token and rank 1."""
    torch_dtype = TORCH_DTYPES[dtype]
    return Problem(1, K, N, 1, torch_dtype, adapter_dtype=torch_dtype, needs=_NEEDS)


def _map(
    device: str,
    modelled: bool,
    problem: Problem,
    tokens: Sequence[int],
    ranks: Sequence[int],
    chosen: Callable[[Problem], Config],
) -> StrategyMap:
    configs = [[chosen(replace(problem, M=M, R=R)) for M in tokens] for R in ranks]
    return StrategyMap(
        device=device,
        modelled=modelled,
        dtype=next(name for name, dtype in TORCH_DTYPES.items() if dtype == problem.dtype),
        K=problem.K,
        N=problem.N,
        tokens=list(tokens),
        ranks=list(ranks),
        forward=[[_words(c.backend, c.forward) for c in row] for row in configs],
        dx=[[_words(c.backend, c.dx) for c in row] for row in configs],
    )


def _words(backend: str, strategy: str) -> str:
    """The library is torch's, whichever backend runs the other parts."""
    return "library" if strategy == "library" else f"{backend} {strategy}"
