"""What else a GPU could have run for a Problem, what each would take, and why it was not taken."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lora_fused import gpu_tuning, selfcheck
from lora_fused.backends import BACKENDS
from lora_fused.config import Config, Problem
from lora_fused.gpu_choice import GPU_BACKENDS, Option, options, parts_of


def describe(
    problem: Problem, config: Config, names: tuple[str, ...], where: torch.device
) -> list[str]:
    """A line per part with the times of what is used, and one per faster option that is not.

    And one for each strategy that a backend has, but not for this problem.
    """
    lines = [_total(config)] if config.predicted_us is not None else []
    for part in _parts_run(problem, config):
        found = options(problem, part, names)
        times = gpu_tuning.recalled(problem, part) or {}
        used = next((o for o in found if _is_used(o, config)), None)
        if used is None:
            continue
        lines.append(f"{part}: {used.name}{_time(used, times)}")
        lines += _refusals(problem, part, found, used, times, where)
    for name in GPU_BACKENDS:
        if name in names and not _offers_anything(problem, name):
            lines.append(f"{name}: no kernel of it fits these sizes")
        elif name in names:
            left_out = getattr(BACKENDS[name], "left_out", None)
            lines += [f"{name}: {reason}" for reason in left_out(problem)] if left_out else []
    return lines


def _parts_run(problem: Problem, config: Config) -> list[str]:
    """The parts of the call: "backward", or dx and reduce."""
    together = config.tiles("backward") is not None
    run = {"forward", "backward"} if together else {"forward", "dx", "reduce"}
    return [part for part in parts_of(problem) if part in run]


def _total(config: Config) -> str:
    measured = f", {config.measured_us:.1f} us measured" if config.measured_us else ""
    return f"{config.predicted_us:.1f} us modelled{measured}, all launches of the layer"


def _is_used(option: Option, config: Config) -> bool:
    part = option.part
    tiles = config.tiles(part)
    if option.is_library:
        return tiles is None
    makes_dx = part in ("dx", "backward")
    strategy = config.forward if part == "forward" else config.dx if makes_dx else "reduce"
    return (option.backend, option.strategy, option.tiles) == (config.backend, strategy, tiles)


def _time(option: Option, times: dict[str, float]) -> str:
    measured = times.get(option.name)
    timed = f", {measured:.1f} us measured" if measured is not None else ""
    return f", {option.predicted_us:.1f} us modelled{timed}"


def _refusals(
    problem: Problem,
    part: str,
    found: tuple[Option, ...],
    used: Option,
    times: dict[str, float],
    where: torch.device,
) -> Iterator[str]:
    """The best option of every backend and strategy that the model, or a timing, calls faster."""
    seen = {(used.backend, used.strategy)}
    for option in found:
        if (option.backend, option.strategy) in seen:
            continue
        seen.add((option.backend, option.strategy))
        faster = option.predicted_us < used.predicted_us or (
            used.name in times and times.get(option.name, used.predicted_us) < times[used.name]
        )
        if faster:
            why = _reason(problem, option, used, times, where)
            yield f"not {option.name}{_time(option, times)}: {why}"


def _reason(
    problem: Problem, option: Option, used: Option, times: dict[str, float], where: torch.device
) -> str:
    for kernel in selfcheck.kernels_of(problem, option):
        verdict = selfcheck.verdict(kernel, where, may_run=False)
        if verdict:
            return f"demoted, {verdict}"
        if verdict is None:
            return "not checked on this device yet"
    if option.name in times and used.name in times:
        if times[option.name] >= times[used.name]:
            return "measured slower"
        return "measured hardly faster" if used.is_library else "the other parts run elsewhere"
    if times:
        return "not among the few that were timed"
    return "the parts together are faster this way"


def _offers_anything(problem: Problem, name: str) -> bool:
    return any(
        option.backend == name
        for part in parts_of(problem)
        for option in options(problem, part, (name,))
    )
