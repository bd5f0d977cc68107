"""The sm_90a matmul in the emulator: problems, what a launcher passes to the kernel, and the truth.

`case.run(schedule)` executes one launch (or several on one workspace) and returns an `Outcome`.
Inputs depend on the case only. Names are those of the forward pass in both directions, as in
csrc/cuda/sm90/matmul.cuh: dx has dy for x, lora_B for a and lora_A for b.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from lora_fused.testing import assert_close_to_ref
from tests.ptx_emulator import TOGETHER, Report, Schedule, parse
from tests.ptx_emulator.syntax import Module

from .compile import ptx

SOURCE = "csrc/cuda/sm90/matmul.cu"
ARCH = "sm_90a"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
STAGES = {256: 4, 128: 6}


def shared_bytes(block_n: int) -> int:
    """Alignment, the ring, two staging buffers of 2 KB for each of 8 warps, control words."""
    stages = STAGES[block_n]
    return 1024 + stages * (128 + block_n) * 128 + 8 * 2 * 2048 + stages * 32


@cache
def kernel_text(kernel: str) -> str:
    """The PTX of one kernel of the source, with the head of the file."""
    text = ptx(SOURCE, ARCH)
    entry = re.compile(r"^(?:\s*// \.globl\s+\w+\s*)?\.visible \.entry (\w+)\(", re.M)
    entries = list(entry.finditer(text))
    which = next(i for i, found in enumerate(entries) if found[1] == kernel)
    tail = re.search(r"^\s*\.file\s", text, re.M)
    ends = [found.start() for found in entries[which + 1 :]] or [
        tail.start() if tail else len(text)
    ]
    files = "\n".join(re.findall(r"^\s*\.file\s.*$", text, re.M))
    return text[: entries[0].start()] + text[entries[which].start() : ends[0]] + files + "\n"


@cache
def _module(text: str) -> Module:
    return parse(text)


def kernel_module(kernel: str, text: str | None = None) -> Module:
    """A kernel as it was compiled, or a changed text of it."""
    return _module(kernel_text(kernel) if text is None else text)


@dataclass(frozen=True)
class Case:
    """`sizes`: (columns of y, depth of the contraction, R) of each member; a plain layer has one.

    Members of a forward group share depth and x, those of a dx group columns and y. split: s is
    given. blocks: S tiles of 64 times as many columns. separate: an S tile for each member of a
    forward group, as dropout needs. p: dropout. clusters: of `cluster` blocks; `resident` blocks at
    a time. group: S tiles of a ticket. parts: of the tokens, in which the gradients of the adapters
    are summed up by the same launch; `gradients` says which ("a", "b")."""

    M: int
    sizes: tuple[tuple[int, int, int], ...]
    direction: str = "forward"
    dtype: str = "bf16"
    block_n: int = 256
    split: bool = False
    blocks: int = 1
    separate: bool = False
    bias: bool = False
    p: float = 0.0
    cluster: int = 2
    clusters: int = 2
    resident: int = 64
    group: int = 1
    parts: int = 0
    gradients: str = "ab"

    @property
    def kernel(self) -> str:
        masked = "_masked" if self.p and not self.forward else ""
        return f"lora_matmul_sm90_{self.dtype}_{self.direction}{masked}_n{self.block_n}"

    @property
    def forward(self) -> bool:
        return self.direction == "forward"

    def but(self, **changes) -> Case:
        return replace(self, **changes)

    def run(
        self,
        schedule: Schedule = TOGETHER,
        text: str | None = None,
        launches: int = 1,
        **options,
    ) -> Outcome:
        from .sm90_launch import Launch

        return Launch(self).run(schedule, text, launches, **options)

    def __str__(self) -> str:
        sizes = "+".join("x".join(map(str, size)) for size in self.sizes)
        words = [w for w in ("split", "separate", "bias") if getattr(self, w)]
        words += [f"s{64 * self.blocks}"] * (self.blocks > 1)
        words += [f"c{self.cluster}x{self.clusters}"] + [f"r{self.resident}"] * (self.resident < 64)
        words += [f"g{self.group}"] * (self.group > 1)
        words += [f"parts{self.parts}{self.gradients}"] * (self.parts > 0)
        return "-".join([self.kernel[17:], f"M{self.M}", sizes, *words])


@dataclass
class Outcome:
    """Outputs by name with the truth (fp64) and what torch makes of it in the same precision."""

    report: Report
    got: dict[str, Tensor]
    truth: dict[str, Tensor]
    baseline: dict[str, Tensor]
    workspace: Tensor

    def check(self) -> Outcome:
        self.report.check()
        for name, tensor in self.got.items():
            assert_close_to_ref(name, tensor, self.truth[name], self.baseline[name])
        assert not self.workspace.any(), "the workspace is zero after a launch"
        return self

    def wrong(self) -> bool:
        """Whether some output is not what it should be."""
        try:
            for name, tensor in self.got.items():
                assert_close_to_ref(name, tensor, self.truth[name], self.baseline[name])
        except AssertionError:
            return True
        return False

    def same_as(self, other: Outcome) -> bool:
        return all(torch.equal(tensor, other.got[name]) for name, tensor in self.got.items())
