"""`python -m benchmarks`: measures what a LoRA layer costs on this machine, writes a report."""

import argparse
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import compare, gpu_report, model_gpu
from benchmarks.claims import suite as claims
from benchmarks.goals import goal_rows
from benchmarks.progress import Progress
from benchmarks.providers import PROVIDER_NAMES, named
from benchmarks.record import Results, load_or_exit
from benchmarks.report import write_report
from benchmarks.run import Settings, new_results, run
from benchmarks.shapes import (
    DTYPES,
    LAYERS,
    RANKS,
    TOKENS,
    Case,
    gpu_cases,
    parse_layer,
    product_cases,
    quick_cases,
)
from benchmarks.suites import SUITES
from benchmarks.suites.command import (
    CLAIMS,
    LAYER,
    MEMORY,
    NAMES,
    run_in_fresh_processes,
    run_suites,
)
from benchmarks.suites.item import Request
from benchmarks.suites.table import print_suites
from benchmarks.table import print_header, print_results

LOCAL = Path(__file__).parent / "results" / "local"
MODEL_COLUMNS = 170  # of the modelled table, on terminals too narrow for it and in files
SUITE_COLUMNS = 150  # likewise, of the suites' tables
_OWN_OPTIONS = {
    "layers": {LAYER}, "m": {LAYER}, "r": {LAYER}, "cold": {LAYER}, "providers": {LAYER, MEMORY},
}  # fmt: skip
"""Options that only some suites know."""
QUICK_BUDGET_S = 255.0  # with imports, tables and the report: below five minutes


def positive(text: str) -> int:
    """For argparse, which makes a sentence of the error."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--quick",
        action="store_true",
        help="a representative subset in under five minutes (default)",
    )
    mode.add_argument(
        "--full", action="store_true", help="every combination of what is named below"
    )
    parser.add_argument(
        "--suite",
        nargs="+",
        choices=(*NAMES, "all"),
        default=[LAYER],
        help="layer: the LoRA tax (default); claims: the LoRA paper's, on this machine; "
        + "; ".join(f"{suite.name}: {suite.about}" for suite in SUITES.values()),
    )
    parser.add_argument(
        "--fresh-process",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="run each suite in a process of its own",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--gpu-report",
        action="store_true",
        help="all about this GPU, in under 15 minutes: kernels checked, layers timed, one file",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("BEFORE", "AFTER"),
        help="tell the significant changes between two result files",
    )
    parser.add_argument(
        "--threads", type=positive, default=1, help="1 is timed by CPU time, more by the wall clock"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: all")
    parser.add_argument(
        "--layers", nargs="+", help="gpt2, gpt2.c_fc, vllm, 768x2304, ...; see models.py"
    )
    parser.add_argument("--m", nargs="+", type=positive, help=f"tokens; default: {TOKENS}")
    parser.add_argument("--r", nargs="+", type=positive, help=f"ranks; default: {RANKS}")
    parser.add_argument(
        "--providers", nargs="+", choices=PROVIDER_NAMES, metavar="NAME", help=(
            f"names or groups: {', '.join(PROVIDER_NAMES)}; default: default, also with --full"
        ),
    )  # fmt: skip
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument(
        "--cold",
        action="store_true",
        help="rotate over copies of x, dy and the parameters that are larger than the caches",
    )
    parser.add_argument(
        "--eager",
        action="store_true",
        help="on a GPU: the wall clock with launches, not CUDA graphs with a cold cache",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave the memory section out")
    parser.add_argument(
        "--budget", type=float, metavar="S", help="seconds after which no case starts any more"
    )
    parser.add_argument(
        "--model-gpu",
        metavar="GPU",
        help="measure nothing: print what the cost model says of h100, h200, a100, l40s, rtx3090, "
        "rtx4090, rtx5090, b200 or mi300x",
    )
    parser.add_argument("--dropout", action="store_true", help="with --model-gpu: p > 0")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--html", type=Path, metavar="OUT")
    args = parser.parse_args(arguments)
    if "all" in args.suite:
        args.suite = list(NAMES)
    for name, suites in _OWN_OPTIONS.items():
        if getattr(args, name) and not set(args.suite) <= suites:
            words = " and ".join(sorted(suites))
            wrong = f"--{name} is for the suite{'s' * (len(suites) > 1)} {words} alone"
            parser.error(f"{wrong}, got --suite {' '.join(args.suite)}")
    return args


def cases_of(args: argparse.Namespace) -> list[Case]:
    """The quick set, filtered by what was named; or, with --full, the product of it."""
    layers = (
        [layer for text in args.layers for layer in parse_layer(text)]
        if args.layers
        else list(LAYERS)
    )
    dtypes, tokens, ranks = args.dtype or DTYPES, args.m or TOKENS, args.r or RANKS
    if args.full:
        return product_cases(layers, dtypes, args.m, args.r)
    if args.device != "cpu" and not (args.layers or args.m or args.r):
        return [c for c in gpu_cases() if c.dtype in dtypes]
    return [
        c for c in quick_cases()
        if c.layer in layers and c.dtype in dtypes and c.M in tokens and c.R in ranks
    ]  # fmt: skip


def main() -> None:
    console = Console()
    args = parse(sys.argv[1:])
    if args.compare:
        try:
            before, after = (load_or_exit(path, "python -m benchmarks") for path in args.compare)
            compare.show(console, compare.compare(before, after))
        except ValueError as error:
            sys.exit(f"python -m benchmarks: {error}")
        return
    if (args.gpu_report or args.device != "cpu") and not torch.cuda.is_available():
        sys.exit("python -m benchmarks: torch sees no GPU")
    if args.gpu_report:
        stem = LOCAL / f"{datetime.now():%Y%m%d-%H%M%S}-gpu"
        json_path = args.json or stem.with_suffix(".json")
        sys.exit(
            gpu_report.main("cuda", json_path, args.html or json_path.with_suffix(".html"), console)
        )
    if args.model_gpu:
        try:
            wide = Console(width=max(console.width, MODEL_COLUMNS))
            model_gpu.main(args.model_gpu, args.dropout, args.json, wide)
        except ValueError as error:
            sys.exit(f"python -m benchmarks: {error}")
        return
    stem = LOCAL / f"{datetime.now():%Y%m%d-%H%M%S}-{'full' if args.full else 'quick'}"
    json_path = args.json or stem.with_suffix(".json")
    if CLAIMS in args.suite:
        alone = args.suite == [CLAIMS]
        claims.run(console, json_path if alone else json_path.with_name(f"{stem.name}-claims.json"))
    names = [name for name in args.suite if name != CLAIMS]
    if not names:
        return
    try:
        results = measure(args, names, json_path, console)
    except ValueError as error:
        sys.exit(f"python -m benchmarks: {error}")
    results.settings["suites"] = names
    goals = goal_rows(results)
    results.save(json_path)
    if LAYER in names:
        print_results(console, results, goals)
    print_suites(Console(width=max(console.width, SUITE_COLUMNS)), results.suites)
    if results.skipped and LAYER not in names:
        console.print(f"[yellow]Not run: {'; '.join(results.skipped)}", highlight=False)
    html_path = args.html or json_path.with_suffix(".html")
    write_report(results, goals, html_path)
    console.print(f"[bold]{html_path}[/]  (open it in a browser)\n{json_path}", highlight=False)


def measure(
    args: argparse.Namespace, names: list[str], json_path: Path, console: Console
) -> Results:
    """The named suites, in this process or in fresh ones. ValueError for what cannot be run."""
    if args.fresh_process:
        merged = run_in_fresh_processes(names, sys.argv[1:], console)
        if merged is None:
            raise ValueError("no suite left a result; run it without --fresh-process to see why")
        return merged
    settings = Settings(
        "full" if args.full else "quick",
        args.threads,
        args.rounds,
        args.cold,
        args.budget,
        not args.no_memory and args.device == "cpu",
        args.device,
        args.eager,
    )
    if LAYER in names:
        results = measure_layers(args, settings, json_path, console)
    else:
        results = new_results(settings, named(args.providers))
        print_header(console, results)
    chosen = tuple(args.providers) if args.providers else None
    request = Request(args.full, args.device, tuple(args.dtype or DTYPES), chosen)
    others = [name for name in names if name != LAYER]
    run_suites(others, request, settings, results, console, json_path)
    return results


def measure_layers(
    args: argparse.Namespace, settings: Settings, json_path: Path, console: Console
) -> Results:
    cases = cases_of(args)
    if not cases:
        raise ValueError("the quick set has no such case; add --full")
    budget = args.budget or (None if args.full else QUICK_BUDGET_S)
    return run(
        replace(settings, budget_s=budget), cases, named(args.providers), Progress(console, budget),
        on_header=lambda results: print_header(console, results), save_to=json_path,
    )  # fmt: skip


if __name__ == "__main__":
    main()
