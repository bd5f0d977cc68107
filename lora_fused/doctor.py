"""`python -m lora_fused doctor`: which kernels this machine has, and whether they compute right.

On a GPU every kernel that the dispatcher could choose for that device is compiled, launched and
compared with torch on small problems, in each dtype, and the verdicts are stored: what fails is not
used any more. Then the dispatcher chooses (and times) for some sizes, and full calls with gradients
and dropout are compared. Without a GPU the backends of the CPU are checked.
"""

from __future__ import annotations

import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from lora_fused import (
    __version__,
    backends,
    dispatch,
    gpu_choice,
    gpu_store,
    selfcheck,
    small_check,
)
from lora_fused.config import Config, Problem
from lora_fused.devices import Device, device_of
from lora_fused.testing import check_case, make_case

_NEEDS = frozenset({"x", "lora_A", "lora_B"})
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_RANKS = (16, 64, 128)
_TOKENS = (1, 16, 128, 4096)
_CALLS = ((1, 256, 192, 8), (37, 264, 136, 16), (300, 512, 384, 64))


@dataclass
class Findings:
    """What was looked at: rows of (what, verdict, detail), and whether anything was wrong."""

    title: str
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, what: str, wrong: str, detail: str = "") -> None:
        """One row; `wrong` is empty for what is right."""
        self.rows.append((what, "wrong" if wrong else "ok", wrong or detail))

    @property
    def failures(self) -> int:
        return sum(verdict == "wrong" for _, verdict, _ in self.rows)


def main(arguments: Sequence[str]) -> int:
    """Examine, print, and return the exit status: 0 where everything is right."""
    quick = "--quick" in arguments
    unknown = [word for word in arguments if word != "--quick"]
    if unknown:
        print(
            f"python -m lora_fused doctor: unknown {' '.join(unknown)}, expected --quick or nothing"
        )
        return 2
    print(f"lora_fused {__version__}, torch {torch.__version__}, python {sys.version.split()[0]}")
    failures = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for findings in examine(quick):
            show(findings)
            failures += findings.failures
    print(f"\n{failures} wrong" if failures else "\neverything that was checked is right")
    return 1 if failures else 0


def examine(quick: bool = False) -> Iterator[Findings]:
    """What there is to say about this machine, in turn. quick: nothing but full calls."""
    yield _backends()
    yield from _calls_on("cpu")
    if not torch.cuda.is_available():
        findings = Findings("GPUs")
        findings.add("none", "", "torch sees no GPU: only the backends of the CPU were checked")
        yield findings
        return
    for index in range(torch.cuda.device_count()):
        where = torch.device("cuda", index)
        with torch.cuda.device(where):
            device = device_of(where)
            if not quick:
                yield _kernels_on(device, where)
            yield from _calls_on(f"cuda:{index}")
            yield _choices(device, where)
            yield _demoted(device)


def _backends() -> Findings:
    findings = Findings("backends")
    problem = Problem(64, 64, 64, 16, torch.float32)
    for name, reasons in dispatch.reasons_against(problem).items():
        findings.add(name, "", f"not on this CPU: {reasons[0]}" if reasons else "ready on the CPU")
    for name in gpu_choice.GPU_BACKENDS:
        missing = backends.load(name) is None
        findings.add(name, "", backends.why_missing(name) if missing else "installed")
    return findings


def _calls_on(where: str) -> Iterator[Findings]:
    """Forward and backward of whole layers, by whatever the dispatcher chooses and by torch."""
    for backend in ("auto", "torch"):
        findings = Findings(f"layers on {where}, backend {backend}")
        for dtype, size, dropout_p in itertools.product(_DTYPES, _CALLS, (0.0, 0.3)):
            case = make_case(*size, dtype, bias=True, dropout_p=dropout_p, device=where)
            name = f"{_short(dtype)} M={size[0]} K={size[1]} N={size[2]} R={size[3]}"
            name += f" dropout {dropout_p}" if dropout_p else ""
            findings.add(name, _why(functools.partial(check_case, case, backend)))
        yield findings


def _why(run: Callable[[], object]) -> str:
    """What went wrong; "" if nothing did."""
    try:
        run()
    except Exception as error:  # whatever a kernel does wrong is a row of the report
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return ""


def _kernels_on(device: Device, where: torch.device) -> Findings:
    """Every kernel that the dispatcher can choose there, checked now, whatever is on disk."""
    findings = Findings(f"kernels on {device}")
    for kernel in kernels_of(device):
        findings.add(str(kernel), selfcheck.check_again(kernel, where))
    return findings


def kernels_of(device: Device) -> list[small_check.Kernel]:
    """The kernels of all backends for problems of all kinds on a device."""
    found: dict[small_check.Kernel, None] = {}
    for dtype in _DTYPES:
        for R in _RANKS:
            for M in _TOKENS:
                for layout in ("row", "column"):
                    problem = Problem(
                        M, 4096, 4096, R, dtype, "cuda", dtype, needs=_NEEDS, device=device,
                        weight_layout=layout,
                    )  # fmt: skip
                    found.update(dict.fromkeys(_kernels_for(problem)))
    return list(found)


def _kernels_for(problem: Problem) -> Iterator[small_check.Kernel]:
    names = dispatch.gpu_backends_for(problem)
    for part in gpu_choice.parts_of(problem):
        for option in gpu_choice.options(problem, part, names):
            yield from selfcheck.kernels_of(problem, option)
    for name in names:
        shrink = gpu_choice.best_candidate(problem, "shrink", name)
        if shrink is not None:
            yield selfcheck.shrink_kernel(problem, name, shrink.tiles)


def _choices(device: Device, where: torch.device) -> Findings:
    """What is chosen, predicted and measured for layers of 4096 x 4096."""
    findings = Findings(f"choices on {device}, bfloat16, 4096 x 4096, r = 16")
    for M in _TOKENS:
        try:
            findings.add(f"M={M}", "", _in_words(_choice(M, where)))
        except Exception as error:  # as above
            findings.add(f"M={M}", f"{type(error).__name__}: {error}")
    return findings


def _choice(M: int, where: torch.device) -> Config:
    def empty(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, device=where).requires_grad_()

    tensors = (empty(M, 4096), empty(4096, 4096).detach(), empty(16, 4096), empty(4096, 16))
    return dispatch.route_for(*tensors, None, False, "auto").config


def _in_words(config: Config) -> str:
    measured = "" if config.measured_us is None else f", measured {config.measured_us:.1f} us"
    predicted = "" if config.predicted_us is None else f", modelled {config.predicted_us:.1f} us"
    return f"{config}{predicted}{measured}"


def _demoted(device: Device) -> Findings:
    """Everything that is not used on this device, by what is stored about it."""
    findings = Findings(f"demoted on {device} (kept in {gpu_store.directory(device)})")
    for answer in gpu_store.answers(device, "check"):
        if answer.get("state") != "passed":
            findings.rows.append(
                (str(answer["key"]), "demoted", str(answer.get("why", "no answer")))
            )
    if not findings.rows:
        findings.add("nothing", "")
    return findings


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def show(findings: Findings) -> None:
    """Print the findings: a table by rich where that is installed, else plain lines."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _show_plainly(findings)
        return
    console = Console()
    if not console.is_terminal:
        _show_plainly(findings)
        return
    table = Table(title=Text(findings.title), title_justify="left", box=None, show_header=False)
    colours = {"ok": "green", "wrong": "bold red", "demoted": "yellow"}
    for what, verdict, detail in findings.rows:
        table.add_row(Text(what), Text(verdict, style=colours[verdict]), Text(detail))
    console.print(table)


def _show_plainly(findings: Findings) -> None:
    print(f"\n{findings.title}")
    for what, verdict, detail in findings.rows:
        print(f"  {verdict:7} {what}{f'  ({detail})' if detail else ''}")
