"""The Config of a call on a GPU: what the model shortlists, the self-check admits and timing picks.

The first call of a bucket (device, sizes with M rounded up to a power of two, dtype, layout,
dropout) times the library and at most three candidates per part on the call's own tensors, for half
a second in all; kernels that are compiled at their first use take longer. Answers are kept on disk.
A candidate must be 2 % faster than the library to be taken.

Nothing is timed, and no kernel is checked, while a CUDA graph is captured, under torch.compile's
tracing, or on another stream than the default one (where graphs are warmed up): such calls use
what is known, else the model, among kernels that have passed their check. Their choice is
remembered until something is checked or timed elsewhere (`choices.Choices`).
LORA_FUSED_AUTOTUNE=0 and torch.use_deterministic_algorithms(True) leave the choice to the model.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch

from lora_fused import autotune, gpu_store, selfcheck
from lora_fused.config import Config, Problem, Tiles
from lora_fused.gpu_choice import (
    Option,
    best_candidate,
    configure,
    options,
    parts_of,
    shortlist,
)
from lora_fused.small_check import Kernel

BUDGET_SECONDS = {"forward": 0.15, "dx": 0.125, "reduce": 0.1, "backward": 0.125}
_MAX_ROUNDS = 50
_TRIAL_DROPOUT = 6554  # of 65536

Trial = Callable[[str, list[Option]], dict[str, Callable[[], object]]]
"""From a part and its options: a call of each, by name, on tensors of the size to tune for."""

_lock = threading.RLock()
_known: dict[tuple[Problem, str], dict[str, float]] = {}


def may_measure(where: torch.device) -> bool:
    """Whether kernels may be checked and timed now; see the top of this file."""
    if torch.compiler.is_compiling():
        return False
    if where.type != "cuda":
        return True
    return not torch.cuda.is_current_stream_capturing() and (
        torch.cuda.current_stream(where) == torch.cuda.default_stream(where)
    )


def choose(
    problem: Problem, names: tuple[str, ...], where: torch.device, trial: Trial
) -> tuple[Config, bool]:
    """The Config, and whether a later call may find a better one.

    names: the backends that can run the problem. trial makes the calls to time.
    """
    admission = _Admission(problem, where, may_measure(where))
    considered = {
        part: [o for o in shortlist(options(problem, part, names)) if admission.of(o)]
        for part in parts_of(problem)
    }
    measured: dict[str, dict[str, float]] = {}
    timed = True
    if autotune.enabled():
        for part, found in considered.items():
            times = recalled(problem, part)
            complete = times is not None and all(option.name in times for option in found)
            if len(found) > 1 and not complete and admission.free:
                times = _measure(problem, part, found, where, trial)
                complete = True
            if times is not None:
                measured[part] = times
            timed = timed and (complete or len(found) == 1)
    shrinks = {name: admission.shrink_of(name) for name in names}
    config = configure(problem, considered, shrinks, measured)
    return config, admission.deferred or not timed


class _Admission:
    """Which options have passed their checks; free: checks may be run now."""

    def __init__(self, problem: Problem, where: torch.device, free: bool) -> None:
        self.problem, self.where, self.free = problem, where, free
        self.deferred = False

    def of(self, option: Option) -> bool:
        """Whether every kernel of the option is known to be right."""
        return all(self._passes(kernel) for kernel in selfcheck.kernels_of(self.problem, option))

    def shrink_of(self, backend: str) -> Tiles | None:
        """The tiles of a backend's shrink, where that is right."""
        found = best_candidate(self.problem, "shrink", backend)
        if found is None:
            return None
        kernel = selfcheck.shrink_kernel(self.problem, backend, found.tiles)
        return found.tiles if self._passes(kernel) else None

    def _passes(self, kernel: Kernel) -> bool:
        verdict = selfcheck.verdict(kernel, self.where, self.free)
        self.deferred = self.deferred or verdict is None
        return verdict == ""


def recalled(problem: Problem, part: str) -> dict[str, float] | None:
    """Microseconds by option name from an earlier timing of the bucket; None if there was none."""
    key = _bucket_of(problem), part
    with _lock:
        if key not in _known and problem.device is not None:
            answer = gpu_store.recall(problem.device, "timing", _key(*key))
            times = _sound(answer.get("us")) if answer else {}
            if times:
                _known[key] = times
        return _known.get(key)


def _sound(times: object) -> dict[str, float]:
    """The times as they were stored; nothing where they are something else."""
    if not isinstance(times, dict) or "library" not in times:
        return {}
    if not all(isinstance(us, int | float) and us > 0 for us in times.values()):
        return {}
    return {str(name): float(us) for name, us in times.items()}


def forget() -> None:
    """Forget what this process knows, so that the files are read again."""
    with _lock:
        _known.clear()


def _bucket_of(problem: Problem) -> Problem:
    """The problem whose timing this one shares; what a timing does not depend on is left out."""
    return replace(
        problem,
        M=autotune.bucket(problem.M),
        needs=frozenset(),
        threads=1,
        deterministic=False,
        prepacked=False,
    )


def _key(problem: Problem, part: str) -> str:
    flags = [
        word for word in ("has_bias", "dropout", "given_mask", "tf32") if getattr(problem, word)
    ]
    flags += [] if problem.aligned else ["unaligned"]
    group = "".join(f" {n}r{r}" for n, r in problem.group)
    adapters = str(problem.adapter_dtype).removeprefix("torch.")
    return (
        f"{part} {str(problem.dtype).removeprefix('torch.')} M{problem.M} K{problem.K} "
        f"N{problem.N} R{problem.R} {problem.weight_layout} adapters {adapters} "
        f"{' '.join(flags)}{group}"
    ).strip()


def _measure(
    problem: Problem, part: str, candidates: list[Option], where: torch.device, trial: Trial
) -> dict[str, float]:
    """Time the candidates of one part, and remember."""
    key = _bucket_of(problem), part
    with _lock:
        known = _known.get(key, {})
        if all(option.name in known for option in candidates):
            return known
        try:
            runs = trial(part, candidates)
        except (RuntimeError, MemoryError) as error:
            warnings.warn(f"lora_fused: nothing was timed: {error}", stacklevel=3)
            return {}
        times = fastest_times(runs, BUDGET_SECONDS[part], stopwatch(where))
        times = {name: seconds * 1e6 for name, seconds in times.items()}
        if "library" not in times:
            return times
        _known[key] = times
        if problem.device is not None:
            gpu_store.remember(problem.device, "timing", _key(*key), {"us": times})
        return times


def fastest_times(
    runs: dict[str, Callable[[], object]],
    budget: float,
    seconds_of: Callable[[Callable[[], object]], float],
) -> dict[str, float]:
    """The least time of each run in seconds: a warm-up call each, then rounds of all in turns.

    A run that raises takes for ever, with a warning. The warm-up calls do not count for the budget.
    """
    times: dict[str, float] = {}
    for name, run in runs.items():
        try:
            run()
            times[name] = seconds_of(run)
        except Exception as error:  # a candidate that cannot run has lost, and is named
            times[name] = math.inf
            warnings.warn(f"lora_fused: {name} failed when it was timed: {error}", stacklevel=3)
    runners = [name for name, seconds in times.items() if seconds < math.inf]
    spent, began = sum(times[name] for name in runners), time.perf_counter()
    for _ in range(_MAX_ROUNDS):
        for name in runners:
            if max(spent, time.perf_counter() - began) + times[name] > budget:
                return times
            seconds = seconds_of(runs[name])
            spent += seconds
            times[name] = min(times[name], seconds)
    return times


def stopwatch(where: torch.device) -> Callable[[Callable[[], object]], float]:
    """How long a call takes on the device, in seconds."""
    return _event_seconds if where.type == "cuda" else _wall_seconds


def _event_seconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _wall_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
