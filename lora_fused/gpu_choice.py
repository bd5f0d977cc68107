"""Which kernels run a Problem on a GPU: every legal option of every part, ranked by the model.

A call has three parts: "forward" (y and s), "dx" (dx and ds) and "reduce" (da and db). Each can be
run by torch's operations ("library", always legal) or by a candidate of a backend; one backend runs
all parts that are not torch's. A fourth, "backward", is dx and reduce by one launch, in their
place. Pure functions: what a device says and what was timed comes in as arguments.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_fused import backends, cost
from lora_fused.config import FUSED_STRATEGIES, Candidate, Config, Problem, Tiles
from lora_fused.roofline import rates_of, work_of

GPU_BACKENDS = ("cuda", "triton")
SHORTLIST = 3
MARGIN = 0.98  # of the library's measured time: what a candidate must be faster than

Prices = Mapping[str, float]
"""Microseconds of options by name; those measured instead of those predicted."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run one part. shrink_tiles: of the launch that makes s or ds, if there is one."""

    part: str
    backend: str
    strategy: str
    tiles: Tiles | None
    shrink_tiles: Tiles | None
    predicted_us: float

    @property
    def is_library(self) -> bool:
        return self.strategy == "library"

    @property
    def name(self) -> str:
        """What tells it apart from the other options of the part, for people and for files."""
        if self.is_library:
            return "library"
        shrink = f", shrink {self.shrink_tiles}" if self.shrink_tiles else ""
        return f"{self.backend} {self.strategy} {self.tiles}{shrink}"

    def config(self) -> Config:
        """This option, everything else by torch."""
        return part_config(
            self.part, self.backend, self.strategy, self.tiles, shrink_tiles=self.shrink_tiles
        )


def part_config(
    part: str,
    backend: str,
    strategy: str,
    tiles: Tiles | None,
    shrink_tiles: Tiles | None = None,
) -> Config:
    """One part ("forward", "dx", "reduce", "backward" or "shrink") by a backend, the others by
    torch."""
    makes_dx = part in ("dx", "backward")
    return Config(
        backend,
        strategy if part == "forward" else "library",
        strategy if makes_dx else "library",
        forward_tiles=tiles if part == "forward" else None,
        dx_tiles=tiles if makes_dx else None,
        shrink_tiles=tiles if part == "shrink" else shrink_tiles,
        reduce_tiles=tiles if part == "reduce" else None,
    )


def parts_of(problem: Problem) -> tuple[str, ...]:
    """The parts that a call computes; "backward" is another way to run the two before it."""
    if problem.R == 0:
        return ()
    parts = ["forward"]
    if "x" in problem.needs:
        parts.append("dx")
    if not problem.needs.isdisjoint(("lora_A", "lora_B")):
        parts.append("reduce")
    if problem.needs >= {"x", "lora_A", "lora_B"} and not problem.dropout and not problem.group:
        parts.append("backward")
    return tuple(parts)


@functools.lru_cache(maxsize=4096)
def options(problem: Problem, part: str, names: tuple[str, ...]) -> tuple[Option, ...]:
    """Every way to run a part with these backends or by torch, the fastest by the model first."""
    library = Option(part, "torch", "library", None, None, cost.library_us(problem, part))
    found = [library]
    for name in names:
        found += _options_of(problem, part, name)
    return tuple(sorted(found, key=lambda option: option.predicted_us))


def _options_of(problem: Problem, part: str, backend: str) -> list[Option]:
    shrink = best_candidate(problem, "shrink", backend)
    found = []
    for candidate in _candidates(problem, part, backend):
        if problem.given_mask and candidate.strategy in FUSED_STRATEGIES:
            continue
        time = cost.operation_us(problem, part, backend, candidate)
        shrink_tiles = None
        if candidate.strategy == "split":
            if shrink is None:
                continue
            shrink_tiles = shrink.tiles
            time += _shrink_us(problem, part, shrink)
        found.append(Option(part, backend, candidate.strategy, candidate.tiles, shrink_tiles, time))
    return found


def _shrink_us(problem: Problem, part: str, candidate: Candidate) -> float:
    """Of the launch before the matmul."""
    assert problem.device is not None
    rates = rates_of(problem.device, problem.dtype, problem.tf32)
    return cost.shrink_us(rates, work_of(problem, part), candidate)


def best_candidate(problem: Problem, operation: str, backend: str) -> Candidate | None:
    """The candidate of a backend that the model thinks fastest; None where there is none."""
    legal = _candidates(problem, operation, backend)
    price = functools.partial(cost.operation_us, problem, operation, backend)
    return min(legal, key=price, default=None)


def _candidates(problem: Problem, operation: str, backend: str) -> list[Candidate]:
    module = backends.load(backend)
    if module is None or problem.device is None or not hasattr(module, "candidates"):
        return []
    legal: list[Candidate] = module.candidates(problem, problem.device, operation)
    return legal


def shortlist(found: Sequence[Option]) -> list[Option]:
    """The options worth timing: the library, and the best few, one of each backend first."""
    custom = [option for option in found if not option.is_library]
    first: dict[str, Option] = {}
    for option in custom:
        first.setdefault(option.backend, option)
    chosen = list(first.values())[:SHORTLIST]
    seen = {(option.backend, option.strategy) for option in chosen}
    for distinct in (True, False):
        for option in custom:
            new = (option.backend, option.strategy) not in seen or not distinct
            if len(chosen) < SHORTLIST and option not in chosen and new:
                chosen.append(option)
                seen.add((option.backend, option.strategy))
    return [next(option for option in found if option.is_library), *chosen]


def configure(
    problem: Problem,
    considered: Mapping[str, Sequence[Option]],
    shrinks: Mapping[str, Tiles | None],
    measured: Mapping[str, Prices] | None = None,
) -> Config:
    """The Config with the least total time: one backend, each part by it or by torch.

    considered lists the options of each part, the library among them; shrinks gives for each
    backend the tiles of its shrink, None where that may not be used; measured, by part, the times
    of the options that were timed: where there are any, the others are left aside.
    """
    measured = measured or {}
    best: tuple[float, str, dict[str, Option]] | None = None
    for backend in (*shrinks, "torch"):
        chosen = {
            part: min(
                (option for option in found if option.backend in (backend, "torch")),
                key=lambda option, part=part: _rank(option, measured.get(part)),  # type: ignore[misc]
            )
            for part, found in considered.items()
        }
        chosen = _together_or_apart(chosen, measured)
        total = sum(_rank(option, measured.get(part)) for part, option in chosen.items())
        total += _mask_penalty(problem, backend, chosen)
        if best is None or total < best[0]:
            best = total, backend, chosen
    assert best is not None
    _, backend, chosen = best
    if all(option.is_library for option in chosen.values()):
        backend = "torch"
    return _assemble(backend, chosen, shrinks.get(backend), measured)


def _together_or_apart(
    chosen: dict[str, Option], measured: Mapping[str, Prices]
) -> dict[str, Option]:
    """The best options of the parts, with "backward" or with what it stands for."""
    together = chosen.get("backward")
    apart = {part: option for part, option in chosen.items() if part != "backward"}
    pair = [part for part in ("dx", "reduce") if part in apart]
    if together is None or together.is_library or len(pair) < 2:
        return apart
    if len({part in measured for part in (*pair, "backward")}) > 1:
        return apart  # measured times are not held against modelled ones
    costs = sum(_rank(apart[part], measured.get(part)) for part in pair)
    if _rank(together, measured.get("backward")) >= costs:
        return apart
    return {part: option for part, option in chosen.items() if part not in pair}


def _mask_penalty(problem: Problem, backend: str, chosen: Mapping[str, Option]) -> float:
    """For a dx by torch under a mask that a backend's kernels regenerate elsewhere in the call."""
    dx = chosen.get("dx")
    if not problem.dropout or problem.given_mask or dx is None or not dx.is_library:
        return 0.0
    if all(option.is_library for option in chosen.values()):
        return 0.0
    splits = any(c.strategy == "split" for c in _candidates(problem, "dx", backend))
    return cost.masked_expand_us(problem, splits)


def _rank(option: Option, prices: Prices | None) -> float:
    """What the options are compared by: a measured library has a head start."""
    if not prices:
        return option.predicted_us
    return prices.get(option.name, math.inf) * (MARGIN if option.is_library else 1.0)


def _assemble(
    backend: str,
    chosen: Mapping[str, Option],
    shrink: Tiles | None,
    measured: Mapping[str, Prices],
) -> Config:
    tiles = {part: option.tiles for part, option in chosen.items()}
    strategies = {part: option.strategy for part, option in chosen.items()}
    makes_dx = "backward" if "backward" in chosen else "dx"
    times = [measured[part].get(o.name) for part, o in chosen.items() if part in measured]
    known = [time for time in times if time is not None]
    return Config(
        backend,
        strategies.get("forward", "library"),
        strategies.get(makes_dx, "library"),
        forward_tiles=tiles.get("forward"),
        dx_tiles=tiles.get(makes_dx),
        shrink_tiles=shrink,
        reduce_tiles=tiles.get("reduce"),
        predicted_us=sum(option.predicted_us for option in chosen.values()),
        measured_us=sum(known) if known and len(known) == len(chosen) else None,
    )


def configure_by_model(problem: Problem, names: Sequence[str]) -> Config:
    """The Config that the model alone would choose, every candidate taken to be right."""
    shrinks = {name: best_candidate(problem, "shrink", name) for name in names}
    return configure(
        problem,
        {part: options(problem, part, tuple(names)) for part in parts_of(problem)},
        {name: None if found is None else found.tiles for name, found in shrinks.items()},
    )
