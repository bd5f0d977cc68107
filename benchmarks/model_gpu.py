"""`python -m benchmarks --model-gpu h100`: what the cost model says of a GPU. Nothing is measured.

For each shape the frozen GEMM in microseconds and, in per cent of it, the tax of every way to add
the adapter: PEFT's five operations, addmm, the library (s Bᵀ first, then the GEMM with beta = 1),
LoRAFusion's design (dropout, S, one Triton GEMM; backward with its seven launches), and our
strategies. `goal` is the same strategy at the vendor's GEMM speed, by tiles of the kernels that
the design study describes; `split` to `decode` are the kernels that this installation has for the
device, with the shared memory and registers that were read from their compiled code and the
speed that published kernels of their kind reach.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lora_fused import backends, cost, gpu_choice
from lora_fused.config import Candidate, Problem, Tiles
from lora_fused.devices import DEVICES, Device
from lora_fused.roofline import (
    LAUNCH_US,
    Rates,
    Work,
    elementwise_us,
    library_gemm_us,
    rates_of,
    read_us,
    work_of,
)

LAYERS = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024))
TOKENS = (1, 16, 512, 2048, 4096, 8192, 16384)
RANKS = (16, 64, 128)
STRATEGIES = ("split", "s_first", "one_pass", "decode")
COLUMNS = ("PEFT", "addmm", "library", "LoRAFusion", "goal", *STRATEGIES)
_NEEDS = frozenset({"x", "lora_A", "lora_B"})
_TRITON_SPEED = 0.95  # of LoRAFusion's GEMM, as its published numbers suggest
_GOAL_TILES = ((128, 256), (128, 128), (64, 256), (64, 128))


@dataclass(frozen=True)
class Row:
    """One shape: the frozen GEMM in microseconds, and each tax in per cent of it."""

    direction: str
    M: int
    K: int
    N: int
    R: int
    dropout: bool
    frozen_us: float
    tax: dict[str, float | None]
    chosen: str


def device_named(text: str) -> Device:
    """A known device by its name in any spelling: h100, rtx4090, "RTX 4090"."""
    wanted = _plain(text)
    for name, device in DEVICES.items():
        if wanted in (_plain(name), _plain(name).removeprefix("rtx")):
            return device
    known = ", ".join(_plain(name) for name in DEVICES)
    raise ValueError(f"no GPU is called {text!r}; known: {known}")


def _plain(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def rows(device: Device, dropout: bool = False) -> Iterator[Row]:
    """Every shape at rank 16, and every rank at 8192 tokens, forward and backward."""
    for direction in ("forward", "backward"):
        for K, N in LAYERS:
            for M in TOKENS:
                for R in RANKS if M == 8192 else RANKS[:1]:
                    yield row(device, direction, M, K, N, R, dropout)


def row(
    device: Device, direction: str, M: int, K: int, N: int, R: int, dropout: bool = False
) -> Row:
    """One line of the table."""
    problem = Problem(
        M, K, N, R, torch.bfloat16, "cuda", torch.bfloat16, dropout=dropout, needs=_NEEDS,
        device=device,
    )  # fmt: skip
    rates = rates_of(device, problem.dtype)
    part = "forward" if direction == "forward" else "dx"
    frozen = library_gemm_us(rates, replace(work_of(problem, part), R=0, masked=False))
    names = tuple(n for n in gpu_choice.GPU_BACKENDS if backends.load(n) is not None)
    times: dict[str, float | None] = {
        "PEFT": peft_us(rates, problem, direction),
        "addmm": addmm_us(rates, problem, direction),
        "library": _with_reduce(problem, direction, cost.library_us(problem, part), None),
        "LoRAFusion": lorafusion_us(rates, problem, direction),
        "goal": goal_us(problem, direction),
    }
    for strategy in STRATEGIES:
        times[strategy] = _best_of(problem, direction, part, names, strategy)
    config = gpu_choice.configure_by_model(problem, names)
    strategy = config.forward if direction == "forward" else config.dx
    tax = {
        name: None if time is None else 100 * (time / frozen - 1) for name, time in times.items()
    }
    return Row(direction, M, K, N, R, dropout, frozen, tax, f"{config.backend} {strategy}")


# --- ours ---------------------------------------------------------------------------------------


def _best_of(
    problem: Problem, direction: str, part: str, names: tuple[str, ...], strategy: str
) -> float | None:
    """The best kernel of a strategy that is installed; None where there is none."""
    legal = [o for o in gpu_choice.options(problem, part, names) if o.strategy == strategy]
    if not legal:
        return None
    apart = _with_reduce(problem, direction, legal[0].predicted_us, names)
    if "backward" not in gpu_choice.parts_of(problem) or direction == "forward":
        return apart
    together = gpu_choice.options(problem, "backward", names)
    return min([apart, *(o.predicted_us for o in together if o.strategy == strategy)])


def _with_reduce(
    problem: Problem, direction: str, time: float, names: tuple[str, ...] | None
) -> float:
    """Backward is dx and the reduction; names: the backends that may do it, None: torch."""
    if direction == "forward":
        return time
    if names is None:
        return time + cost.library_us(problem, "reduce")
    return time + gpu_choice.options(problem, "reduce", names)[0].predicted_us


def goal_us(problem: Problem, direction: str) -> float:
    """S-first (decode up to 16 tokens) at the vendor's speed, and the one-launch reduction."""
    assert problem.device is not None
    part = "forward" if direction == "forward" else "dx"
    if problem.M <= 16:
        found = [Candidate("decode", Tiles(16, n, num_warps=8, splits=s), 16384, 108)
                 for n in (8, 16) for s in (1, 2, 4)]  # fmt: skip
    else:
        found = list(_goal_candidates(problem.device))
    time = min(cost.operation_us(problem, part, "goal", candidate) for candidate in found)
    if direction == "forward":
        return time
    reduce = [Candidate("reduce", Tiles(block_n=128, block_k=32, num_warps=8, splits=s), 32768, 128)
              for s in (1, 2, 4, 8, 16)]  # fmt: skip
    return time + min(cost.operation_us(problem, "reduce", "goal", c) for c in reduce)


def _goal_candidates(device: Device) -> Iterator[Candidate]:
    depth, stages = (64, 4) if device.shared_bytes_per_block > 160 * 1024 else (32, 4)
    for m, n in _GOAL_TILES:
        shared = (m + n) * depth * 2 * stages
        for group in (1, 2, 3, 4):
            tiles = Tiles(m, n, depth, 0, 8, stages, persistent=True, shrink_group=group)
            yield Candidate("s_first", tiles, shared, 168)


# --- the others ---------------------------------------------------------------------------------


def peft_us(rates: Rates, problem: Problem, direction: str) -> float:
    """PEFT's operations base, dropout, A, B, times scaling, plus; or their gradients."""
    forward, dx = work_of(problem, "forward"), work_of(problem, "dx")
    x, y = forward.x_bytes, forward.y_bytes
    if direction == "forward":
        time = _frozen(rates, forward) + _skinny(rates, x, forward) + _skinny(rates, y, forward)
        time += elementwise_us(rates, 2 * y) + elementwise_us(rates, 3 * y)
        return time + (elementwise_us(rates, 2.5 * x) if problem.dropout else 0.0)
    time = _frozen(rates, dx) + elementwise_us(rates, 2 * y)  # dy times scaling
    time += 2 * _skinny(rates, y, forward)  # ds, dB
    time += 2 * _skinny(rates, x, forward)  # dA, ds A
    time += elementwise_us(rates, 3 * x)  # the sum of both gradients of x
    return time + (elementwise_us(rates, 2.5 * x) if problem.dropout else 0.0)


def addmm_us(rates: Rates, problem: Problem, direction: str) -> float:
    """The frozen GEMM, s, and a rank-R GEMM that reads and writes the result once more."""
    forward, dx = work_of(problem, "forward"), work_of(problem, "dx")
    x, y = forward.x_bytes, forward.y_bytes
    if direction == "forward":
        time = _frozen(rates, forward) + _skinny(rates, x, forward)
        time += elementwise_us(rates, 2 * y)
        return time + (elementwise_us(rates, 2.5 * x) if problem.dropout else 0.0)
    time = _frozen(rates, dx) + 2 * _skinny(rates, y, forward) + _skinny(rates, x, forward)
    time += elementwise_us(rates, 2 * x)
    return time + (elementwise_us(rates, 2.5 * x) if problem.dropout else 0.0)


def lorafusion_us(rates: Rates, problem: Problem, direction: str) -> float:
    """Its default path: forward [dropout], S, fused GEMM; backward seven launches, mask stored."""
    forward, dx = work_of(problem, "forward"), work_of(problem, "dx")
    x, y = forward.x_bytes, forward.y_bytes
    if direction == "forward":
        time = _triton_gemm(rates, forward) + _skinny(rates, x, forward)
        return time + (elementwise_us(rates, 2.5 * x) if problem.dropout else 0.0)
    small = 4 * (LAUNCH_US + 1.0)  # two memsets and two casts
    time = small + _triton_gemm(rates, dx) + _skinny(rates, y, forward) + _skinny(rates, x, forward)
    return time + (0.5 * x / rates.dram if problem.dropout else 0.0)


def _triton_gemm(rates: Rates, work: Work) -> float:
    plain = replace(work, masked=False)
    longer = 1 + work.R / work.K
    return LAUNCH_US + (_frozen(rates, plain) - LAUNCH_US) * longer / _TRITON_SPEED


def _frozen(rates: Rates, work: Work) -> float:
    return library_gemm_us(rates, replace(work, R=0, masked=False))


def _skinny(rates: Rates, nbytes: int, work: Work) -> float:
    """A GEMM with a rank-R side: it reads or writes the wide operand once."""
    return LAUNCH_US + max(1.0, read_us(rates, nbytes) + work.s_bytes / rates.dram)


# --- printing -----------------------------------------------------------------------------------


def main(name: str, dropout: bool, json_path: Path | None, console: Console) -> None:
    """Print the tables for one device, and write them if asked to."""
    device = device_named(name)
    found = list(rows(device, dropout))
    half = device.flops(torch.bfloat16) * device.sustained / 1e12
    console.print(
        f"[bold]modelled[/] for {device}: bf16 {half:.0f} Tflop/s sustained, "
        f"{device.bandwidth * 0.9 / 1e12:.2f} TB/s, {LAUNCH_US} us a launch"
        f"{', dropout' if dropout else ''}. No number below was measured; see docs/tuning.md.",
        highlight=False,
    )
    for direction in ("forward", "backward"):
        console.print(_table(direction, [r for r in found if r.direction == direction]))
    if json_path is not None:
        data = {"modelled": True, "device": device.name, "rows": [asdict(r) for r in found]}
        json_path.write_text(json.dumps(data, indent=1))


def _table(direction: str, found: list[Row]) -> Table:
    table = Table(title=f"{direction}: modelled tax over the frozen GEMM, %", title_justify="left")
    for heading in ("K>N", "M", "r", "frozen us", *COLUMNS, "chosen"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in found:
        cells = [_cell(line.tax[name]) for name in COLUMNS]
        table.add_row(
            f"{line.K}>{line.N}", str(line.M), str(line.R), f"{line.frozen_us:.1f}", *cells,
            line.chosen,
        )  # fmt: skip
    return table


def _cell(tax: float | None) -> str:
    return "-" if tax is None else f"{tax:.1f}"
