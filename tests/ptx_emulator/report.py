"""What a run found: findings with places, counters, and the report that holds both."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .instruction import Instruction


class UnknownInstruction(NotImplementedError):
    """An opcode, modifier or operand form that the emulator does not implement."""

    def __init__(self, ins: Instruction, why: str = "") -> None:
        super().__init__(f"line {ins.line}: {ins.text}" + (f"  ({why})" if why else ""))


class EmulationStopped(Exception):
    """Raised inside a run after a finding that leaves nothing sensible to execute."""


@dataclass(frozen=True)
class Finding:
    """One defect: its kind, where it is and who did it."""

    kind: str
    message: str
    line: int
    source: str
    text: str

    def __str__(self) -> str:
        where = f"line {self.line}" + (f" ({self.source})" if self.source else "")
        return f"{self.kind} at {where}: {self.message}\n    {self.text}"


@dataclass
class Counters:
    """Exact dynamic counts; filled only when counting is on.

    buffer_bytes: by kind and number of the buffer, in the order of the arguments that name them."""

    warp_instructions: int = 0
    tensor_flops: int = 0
    barriers: int = 0
    global_bytes: Counter = field(default_factory=Counter)
    buffer_bytes: Counter = field(default_factory=Counter)
    global_sectors: Counter = field(default_factory=Counter)
    compulsory_bytes: Counter = field(default_factory=Counter)
    shared_wavefronts: int = 0
    ideal_wavefronts: int = 0
    wavefronts_by_line: Counter = field(default_factory=Counter)
    opcodes: Counter = field(default_factory=Counter)


@dataclass
class Report:
    """Result of one run."""

    kernel: str
    findings: list[Finding] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)
    steps: int = 0

    @property
    def ok(self) -> bool:
        return not self.findings

    def kinds(self) -> set[str]:
        return {finding.kind for finding in self.findings}

    def check(self) -> Report:
        """Raise with every finding listed unless there is none."""
        if self.findings:
            raise AssertionError(f"{self.kernel}\n" + "\n".join(map(str, self.findings)))
        return self
