"""Two training runs, PEFT stock and PEFT on lora_fused, step by step in turn: what each costs.

Each run lives in a process of its own, and one step is made at a time, first by the one, then by
the other, in alternating order: whatever else the machine does meets both.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot

STOCK, OURS = "PEFT", "PEFT + lora_fused"
_WARM_UP = 3  # steps left out of the step time
_NOISE = 0.02  # a smaller difference in step time is called none


@dataclass
class Run:
    """What one of the two runs measured. Seconds per step, bytes, and the example's own numbers."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    fused_calls: int = 0
    report: str = ""

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds[_WARM_UP:] or self.seconds)


class Pace:
    """The worker's end: begin() waits for its turn, end(loss) reports the step."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._start = 0.0

    def begin(self) -> None:
        self._connection.recv()
        self._start = time.perf_counter()

    def end(self, loss: float) -> None:
        self._connection.send((loss, time.perf_counter() - self._start))

    def finish(self, peak_bytes: int, scores: dict[str, float], report: tuple[int, str]) -> None:
        self._connection.send((peak_bytes, scores, *report))


# Trains for args.steps steps; the flag says whether on lora_fused.
Train = Callable[[bool, argparse.Namespace, Pace], None]


def compare(train: Train, args: argparse.Namespace, title: str) -> dict[str, Run]:
    """Both runs, the table and the plot. The results are also written as JSON."""
    console = Console()
    runs = {STOCK: Run(), OURS: Run()}
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name in runs:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(train, name == OURS, args, theirs))
        process.start()
        theirs.close()
        workers[name] = (process, ours)
    try:
        _in_turn(runs, {name: pipe for name, (_, pipe) in workers.items()}, args.steps, console)
    except EOFError:
        raise SystemExit("A training process ended early; its message is above.") from None
    finally:
        for process, pipe in workers.values():
            pipe.close()
            process.join(timeout=30)
    args.out.mkdir(parents=True, exist_ok=True)
    results = {name: asdict(run) for name, run in runs.items()}
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    _plot(runs, title, args.out / "training.png")
    _print(runs, title, console)
    console.print(f"Plot: {args.out / 'training.png'}, numbers: {args.out / 'results.json'}")
    return runs


def _work(train: Train, ours: bool, args: argparse.Namespace, connection: Connection) -> None:
    train(ours, args, Pace(connection))


def _in_turn(
    runs: dict[str, Run], pipes: dict[str, Connection], steps: int, console: Console
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("loading", total=steps)
        for step in range(steps):
            order = list(pipes) if step % 2 == 0 else list(pipes)[::-1]
            for name in order:
                pipes[name].send("go")
                loss, seconds = pipes[name].recv()
                runs[name].losses.append(loss)
                runs[name].seconds.append(seconds)
            bar.update(task, advance=1, description=f"loss {runs[OURS].losses[-1]:.3f}")
    for name, run in runs.items():
        run.peak_bytes, run.scores, run.fused_calls, run.report = pipes[name].recv()


def largest_difference(runs: dict[str, Run]) -> float:
    """Of the losses of the two runs at the same step, relative to the first loss."""
    pairs = zip(runs[STOCK].losses, runs[OURS].losses, strict=True)
    return max(abs(a - b) for a, b in pairs) / abs(runs[STOCK].losses[0])


def _print(runs: dict[str, Run], title: str, console: Console) -> None:
    stock, ours = runs[STOCK], runs[OURS]
    table = Table(title=title)
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    rows: list[tuple[str, Sequence[str]]] = [
        ("first loss", [f"{run.losses[0]:.4f}" for run in runs.values()]),
        ("last loss", [f"{run.losses[-1]:.4f}" for run in runs.values()]),
        *((name, [f"{run.scores[name]:.3f}" for run in runs.values()]) for name in stock.scores),
        ("time per step, median", [f"{run.step_seconds * 1e3:.1f} ms" for run in runs.values()]),
        ("peak memory of a step", [f"{run.peak_bytes / 2**20:.1f} MiB" for run in runs.values()]),
    ]
    for name, values in rows:
        table.add_row(name, *values)
    console.print(table)
    console.print(ours.report)
    console.print(f"Largest difference of the losses: {largest_difference(runs):.1e} of the first.")
    console.print(_verdict("step time", *time_ratios(runs)))
    memory = ours.peak_bytes / max(stock.peak_bytes, 1)
    console.print(_verdict("peak memory", memory, memory, memory))


def time_ratios(runs: dict[str, Run]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of (our step / PEFT's step that was its turn)."""
    pairs = list(zip(runs[OURS].seconds, runs[STOCK].seconds, strict=True))
    ratios = [ours / stock for ours, stock in pairs[_WARM_UP:] or pairs]
    if len(ratios) < 2:
        return (ratios[0],) * 3
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


def _verdict(what: str, low: float, middle: float, high: float) -> str:
    """In words; a difference that the middle half of the steps does not show is none."""
    spread = "" if low == high else f", half of the steps between {low:.3f} and {high:.3f}"
    numbers = f"(ratio to stock PEFT {middle:.3f}{spread})"
    if abs(middle - 1) < _NOISE or low < 1 < high:
        return f"No clear difference in {what} in this run {numbers}."
    word = "less" if middle < 1 else "MORE"
    return f"lora_fused takes {abs(1 - middle):.0%} {word} {what} in this run {numbers}."


def _plot(runs: dict[str, Run], title: str, path: Path) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=True):
        left.plot(run.losses, style, label=name)
        right.plot([1e3 * seconds for seconds in run.seconds], style, label=name, linewidth=0.8)
    left.set(xlabel="step", ylabel="training loss", title=title)
    right.set(xlabel="step", ylabel="ms per step", ylim=(0, None), title="step time")
    for axes in (left, right):
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def arguments(description: str, steps: int, quick_steps: int, out: str) -> argparse.Namespace:
    """The command line that the examples share; --quick is a run of seconds, for tests."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, help=f"training steps (default {steps})")
    parser.add_argument("--rank", type=int, default=8, help="r of the adapters (default 8)")
    parser.add_argument(
        "--lora-dropout", type=float, default=0.0,
        help="with dropout, lora_fused draws torch's own masks, so that the losses can be "
        "compared; that is slower than its usual masks (default 0)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a few steps only, to try it out")
    parser.add_argument("--out", type=Path, default=Path("examples/output") / out)
    args = parser.parse_args()
    if args.quick:
        os.environ["OMP_NUM_THREADS"] = "1"
    args.steps = args.steps or (quick_steps if args.quick else steps)
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}, expected 1 or more")
    return args


def accelerate_if(ours: bool, model: Any, lora_dropout: float) -> None:
    """Switch lora_fused on for one of the two runs."""
    if ours:
        from lora_fused.integrations.peft import accelerate

        accelerate(model, match_torch_rng=lora_dropout > 0, verbose=False)


def report_if(ours: bool, model: Any) -> tuple[int, str]:
    """How many calls were fused, and what lora_fused says about the layers."""
    if not ours:
        return 0, ""
    from lora_fused.integrations.peft import explain

    report = explain(model)
    return report.fused_calls, str(report)


def quiet_and_offline() -> None:
    """Nothing from the hub, and no bars or reports of transformers, here and in the workers."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TRANSFORMERS_VERBOSITY="error",
        PYTHONWARNINGS="ignore::FutureWarning",
    )


def need(package: str) -> None:
    """End with a sentence where a package of the examples is missing."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        sys.exit(f"{package} is not installed: pip install 'lora_fused[examples]'")
