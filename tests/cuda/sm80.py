"""The sm_80 matmul in the emulator: variants, arguments, runs against the reference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lora_fused.reference import effective_scaling
from lora_fused.testing import Case, assert_close_to_ref
from tests.ptx_emulator import Report, Struct, Uninitialised

from .compile import ROOT, launch, ptx

MATHS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "tf32"}
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FLAGS = 2  # words of the workspace before the flags


@dataclass(frozen=True)
class Variant:
    """One kernel, as variants.h states it."""

    math: str
    block_m: int
    block_n: int
    block_k: int
    warps_m: int
    warps_n: int
    stages: int
    resident: int
    layout: str

    @property
    def name(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"lora_matmul_sm80_{self.math}_{tile}_{self.layout}"

    @property
    def source(self) -> str:
        return f"csrc/cuda/sm80/matmul_{self.math}.cu"

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def element_bytes(self) -> int:
        return 4 if self.math == "tf32" else 2

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.block_m + self.block_n) * self.block_k * self.element_bytes

    @property
    def chunk_ranks(self) -> int:
        return min(self.block_n, 128)

    @property
    def instantiation(self) -> str:
        """A source file with this kernel alone, for csrc/cuda/sm80."""
        numbers = (self.block_m, self.block_n, self.block_k, self.warps_m, self.warps_n)
        listed = ", ".join(map(str, (*numbers, self.stages, self.resident)))
        element = {"f16": "fp16", "tf32": "float"}.get(self.math, self.math)
        macro = f"LORA_FUSED_SM80_KERNEL({self.math}, {element}, {listed}, {self.layout})"
        return f'#include "instantiate.cuh"\n{macro}\n'

    def __str__(self) -> str:
        return self.name.removeprefix("lora_matmul_sm80_")


def variants() -> list[Variant]:
    text = (ROOT / "csrc/cuda/sm80/variants.h").read_text()
    found = []
    for kind, maths in (("16BIT", ("bf16", "f16")), ("BF16", ("bf16",)), ("32BIT", ("tf32",))):
        body = re.search(rf"VARIANTS_{kind}\(X, MATH, T\)((?:.*\\\n)*.*)", text)[1]
        for row in re.findall(r"X\(MATH, T, ([^)]*)\)", body):
            *numbers, layout = row.split(", ")
            found += [Variant(math, *map(int, numbers), layout) for math in maths]
    return found


SHIPPED = variants()


def variant(name: str) -> Variant:
    return next(v for v in SHIPPED if name in (str(v), v.name))


@cache
def kernel_text(shipped: Variant, arch: str) -> str:
    """The PTX of one kernel of the file that holds many."""
    text = ptx(shipped.source, arch)
    begin = text.index(f".visible .entry {shipped.name}(")
    end = text.find(".visible .entry", begin + 1)
    header = text[: text.index(".visible .entry")]
    tail = text[text.index("\t.file") :] if end > 0 else ""
    return header + text[begin : end if end > 0 else None] + tail


# ---- arguments -----------------------------------------------------------------------------------


def _base(tensor: Tensor) -> Tensor:
    """The contiguous memory that a view without offset looks into."""
    assert tensor.storage_offset() == 0
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return torch.as_strided(tensor, (size,), (1,))


def _matrix(tensor: Tensor) -> Struct:
    return Struct(_base(tensor), *map(np.int64, tensor.stride()))


def _output(tensor: Tensor) -> Struct:
    fields = (Uninitialised(_base(tensor)), *map(np.int64, tensor.stride()))
    return Struct(*fields, np.int32(DTYPE_CODES[tensor.dtype]))


def vectors(tensor: Tensor, contiguous: int) -> bool:
    """Rows along dimension `contiguous` can be read 16 bytes at a time."""
    other = tensor.stride(1 - contiguous) * tensor.element_size()
    return tensor.stride(contiguous) == 1 and other % 16 == 0


@dataclass
class Projection:
    """One member, as the kernel sees it: w [N, D], shrink [R, D], expand [N, R]."""

    w: Tensor
    shrink: Tensor
    expand: Tensor
    y: Tensor
    bias: Tensor | None = None
    seed: int = 0


@dataclass
class Problem:
    x: Tensor
    members: list[Projection]
    scale: float
    s: Tensor | None = None  # given: split
    threshold: int = 0
    mask_output: bool = False
    group_m: int = 8
    shrink_group: int = 1  # S tiles of a ticket
    workspace: Tensor | None = None
    seed_on_device: bool = False
    error: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int32))


def _chunks(problem: Problem, begins: Sequence[int], width: int) -> list[int]:
    """Boundaries of the pieces of the stacked rank; a mask is one member's, so it ends there."""
    ranks = [m.shrink.shape[0] for m in problem.members]
    ends = [b + r for b, r in zip(begins, ranks, strict=True)]
    masked = problem.threshold > 0 and not problem.mask_output
    spans = list(zip(begins, [*begins[1:], ends[-1]], strict=True)) if masked else [(0, ends[-1])]
    marks = [b for begin, end in spans for b in range(begin, end, width)]
    return [*marks, ends[-1]]


def arguments(problem: Problem, shipped: Variant) -> tuple[Struct, Tensor, int]:
    """(struct MatmulArgs, s, number of tiles). s is allocated with rows of 16 bytes."""
    members = problem.members
    M, D = problem.x.shape
    begins, total = [], 0
    for member in members:
        begins.append(total)
        total += -(-member.shrink.shape[0] // 8) * 8
    split = problem.s is not None
    s = problem.s if split else torch.zeros(M, total, dtype=problem.x.dtype)
    marks = [0] if split else _chunks(problem, begins, shipped.chunk_ranks)
    tiles_m, tiles_end, structs = -(-M // shipped.block_m), 0, []
    outer = 0 if shipped.layout == "mn_major" else 1
    for member, begin in zip(members, begins, strict=True):
        N = member.w.shape[0]
        tiles_end += -(-N // shipped.block_n)
        seed = np.uint64(member.seed)
        on_device = problem.seed_on_device
        structs.append(
            Struct(
                *map(_matrix, (member.w, member.shrink, member.expand)),
                _output(member.y),
                np.int64(0) if member.bias is None else member.bias,
                torch.tensor([member.seed]) if on_device else np.int64(0),
                np.uint64(0) if on_device else seed,
                np.float32(problem.scale),
                *(N, member.shrink.shape[0], begin, tiles_end),
                int(not vectors(member.expand, outer)),
                int(not vectors(member.y, 1)),
                0,  # to a multiple of 8 bytes
            )
        )
    unused = Struct(*([np.int64(0)] * 20))
    chunks = len(marks) - 1
    by_elements = not all(vectors(m.shrink, outer) for m in members)
    by_elements |= len(members) > 1 and outer == 0
    if problem.workspace is None:
        problem.workspace = torch.zeros(FLAGS + tiles_m, dtype=torch.int32)
    padded = np.array(marks + [0] * (25 - len(marks)), np.int32).tobytes()
    s_struct = _output(s) if not split else Struct(*_matrix(s).fields, np.int32(0))
    struct = Struct(
        _matrix(problem.x),
        s_struct,
        *structs,
        *([unused] * (3 - len(structs))),
        problem.workspace,
        problem.error,
        *(M, D, len(members), tiles_m, problem.group_m, chunks),
        *(int(v) for v in np.frombuffer(padded, np.int32)),
        int(by_elements),
        np.uint32(problem.threshold),
        int(problem.mask_output),
        0,  # accumulate
        problem.shrink_group,
    )
    return struct, s, tiles_m * (chunks + tiles_end)


def run(
    problem: Problem, shipped: Variant, arch: str = "sm_80", grid: int | None = None, **options
) -> tuple[Report, Tensor]:
    """Execute; returns the report and s. The outputs are in the problem's tensors."""
    struct, s, tiles = arguments(problem, shipped)
    text = options.pop("text", None) or kernel_text(shipped, arch)
    options.setdefault("shared", shipped.shared_bytes)
    blocks = min(tiles, 4) if grid is None else grid
    report = launch(text, shipped.name, blocks, shipped.threads, [struct], **options)
    return report, s


# ---- against the reference -----------------------------------------------------------------------


def tf32(tensor: Tensor) -> Tensor:
    """fp32 values rounded to TF32, ties away from zero."""
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def baseline(case: Case) -> dict[str, Tensor]:
    """Plain torch in the dtype under test; fp32 with TF32 multiplications."""
    if case.x.dtype != torch.float32:
        return _with_ds(case, case.baseline())
    names = ("x", "weight", "lora_A", "lora_B", "dy")
    rounded = replace(case, **{name: tf32(getattr(case, name)) for name in names})
    return _with_ds(rounded, rounded.baseline())


def truth(case: Case) -> dict[str, Tensor]:
    return _with_ds(replace(case, dy=case.dy.double(), lora_B=case.lora_B.double()), case.truth())


def _with_ds(case: Case, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    scale = effective_scaling(case.scaling, case.dropout_p)
    return (
        outputs | {"ds": ((case.dy @ case.lora_B).float() * scale).to(case.dy.dtype)}
        if (case.dy.dtype != torch.float64)
        else outputs | {"ds": case.dy @ case.lora_B * scale}
    )


def problem_of(case: Case, direction: str, **options) -> Problem:
    """The forward or dx problem of a case, with outputs to be written."""
    threshold = round(case.dropout_p * 65536)
    scale = effective_scaling(case.scaling, case.dropout_p)
    if direction == "forward":
        y = torch.zeros(case.x.shape[0], case.weight.shape[0], dtype=case.x.dtype)
        member = Projection(case.weight, case.lora_A, case.lora_B, y, case.bias, case.seed)
        return Problem(case.x, [member], scale, threshold=threshold, **options)
    dx = torch.zeros_like(case.x)
    adapters = case.lora_B.t(), case.lora_A.t()
    member = Projection(case.weight.t(), *adapters, dx, None, case.seed)
    masked = {"threshold": threshold, "mask_output": threshold > 0}
    return Problem(case.dy, [member], scale, **masked, **options)


def check(
    case: Case, direction: str, shipped: Variant, arch: str = "sm_80", **options
) -> tuple[Problem, Report]:
    """Run one direction: no finding, numbers by the rule, a workspace that is zero again."""
    problem = problem_of(case, direction, **options.pop("problem", {}))
    report, s = run(problem, shipped, arch, **options)
    report.check()
    hold(case, direction, problem, s)
    return problem, report


def hold(case: Case, direction: str, problem: Problem, s: Tensor) -> None:
    names = ("y", "s") if direction == "forward" else ("dx", "ds")
    expected, allowed = truth(case), baseline(case)
    outputs = problem.members[0].y, s[:, : case.lora_A.shape[0]]
    for name, got in zip(names, outputs, strict=True):
        assert_close_to_ref(name, got, expected[name], allowed[name])
    assert problem.workspace is not None
    assert not problem.workspace.any() and not problem.error.any()
