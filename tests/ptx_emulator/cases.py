"""The kernels of `kernels/` with inputs and expected results.

Every case is a function (ptx text, schedule, sizes) -> (report, result, truth); inputs depend on
the sizes only, so that schedules and mutated texts can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from . import TOGETHER, Report, Schedule, TensorMap, Uninitialised, parse, run
from .instruction import Kernel
from .syntax import Module
from .testing import bits, launch_of, module, relative_error

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Outcome:
    report: Report
    result: torch.Tensor
    truth: torch.Tensor

    @property
    def error(self) -> float:
        return relative_error(self.result, self.truth)


@dataclass
class Case:
    """One kernel at one size; `known` are findings that this compiler output really has."""

    fixture: str
    sizes: dict[str, int] = field(default_factory=dict)
    tolerance: float = 0.006
    options: dict = field(default_factory=dict)
    known: frozenset[str] = frozenset()

    def run(self, schedule: Schedule = TOGETHER, text: str | None = None) -> Outcome:
        torch.manual_seed(0)
        parsed = module(self.fixture) if text is None else parse(text)
        function = _RUNNERS[self.fixture.split("_")[0]]
        return function(self, parsed, schedule)

    def __str__(self) -> str:
        return "-".join([self.fixture, *(f"{k}{v}" for k, v in self.sizes.items())])


def _launch(case: Case, parsed: Module, kernel: str | Kernel, grid, block, args, schedule, **kw):
    return run(parsed, kernel, grid, block, args, schedule=schedule, **kw, **case.options)


def _random(*shape: int, kind: str = "bf16") -> torch.Tensor:
    return torch.randn(*shape).to(DTYPES[kind])


def _triton(case: Case) -> tuple[int, int, str]:
    from .testing import fixture

    return *launch_of(fixture(case.fixture)), case.fixture.split("_")[1]


def _lora(case: Case, parsed: Module, schedule: Schedule) -> Outcome:
    shared, threads, kind = _triton(case)
    M, N, K = (case.sizes[n] for n in "MNK")
    x, w, a, b = (_random(*s, kind=kind) for s in ((M, K), (N, K), (16, K), (N, 16)))
    y = torch.zeros(M, N, dtype=x.dtype)
    args = [*map(bits, (x, w, a, b)), Uninitialised(bits(y)), M, N, K, 0.5]
    grid = (-(-M // 64), -(-N // 64))
    report = _launch(case, parsed, "lora_kernel", grid, threads, args, schedule, shared=shared)
    s = (x.double() @ a.double().T * 0.5).to(x.dtype).double()
    return Outcome(report, y, x.double() @ w.double().T + s @ b.double().T)


def _descriptor(case: Case, parsed: Module, schedule: Schedule) -> Outcome:
    shared, threads, _ = _triton(case)
    M, N, K = (case.sizes[n] for n in "MNK")
    x, w, y = _random(M, K), _random(N, K), torch.zeros(M, N).bfloat16()
    grid = (-(-M // 64), -(-N // 64))
    args = [bits(x), bits(w), Uninitialised(bits(y)), M, N, K]
    kernel = parsed.kernel("descriptor_kernel")
    if len(kernel.params) > len(args):
        args.append(Uninitialised(np.zeros(grid[0] * grid[1] * 384, np.uint8)))
    report = _launch(case, parsed, kernel, grid, threads, args, schedule, shared=shared)
    return Outcome(report, y, x.double() @ w.double().T)


def _specialised(case: Case, parsed: Module, schedule: Schedule) -> Outcome:
    shared, threads, _ = _triton(case)
    M, N, K = (case.sizes[n] for n in "MNK")
    shapes = {"x": (M, K), "w": (N, K), "a": (16, K), "b": (N, 16), "y": (M, N)}
    rows, columns, depth = 64, 64, 32
    boxes = {
        "x": (rows, depth),
        "w": (columns, depth),
        "a": (16, depth),
        "b": (columns, 16),
        "y": (rows, 64),
    }
    tensors = {n: _random(*shape) * (n != "y") for n, shape in shapes.items()}
    kernel = parsed.kernel("specialised_kernel")
    args: list = []
    for n, tensor in tensors.items():
        height, width = tensor.shape
        swizzle = boxes[n][1] * 2
        args += [
            TensorMap(bits(tensor), "bf16", (height, width), boxes[n], swizzle),
            np.int32(height),
            np.int32(width),
            np.int64(width),
            np.int64(1),
        ]
    args.append(K)
    grid = (-(-M // rows), -(-N // columns))
    report = _launch(case, parsed, kernel, grid, threads, args, schedule, shared=shared)
    x, w, a, b = (tensors[n].double() for n in "xwab")
    truth = x @ w.T
    if case.fixture.endswith("90"):
        truth = truth + (x @ a.T).bfloat16().double() @ b.T
    return Outcome(report, tensors["y"], truth)


def _gradient(case: Case, parsed: Module, schedule: Schedule) -> Outcome:
    shared, threads, _ = _triton(case)
    M, K = case.sizes["M"], case.sizes["K"]
    x, ds, out = _random(M, K), _random(M, 16), torch.zeros(K, 16)
    args = [bits(x), bits(ds), bits(out), M, K]
    grid = (-(-K // 64), 2)
    report = _launch(case, parsed, "gradient_kernel", grid, threads, args, schedule, shared=shared)
    return Outcome(report, out, x.double().T @ ds.double())


def _softmax(case: Case, parsed: Module, schedule: Schedule) -> Outcome:
    shared, threads, _ = _triton(case)
    M, N = case.sizes["M"], case.sizes["N"]
    x, y = _random(M, N), torch.zeros(M, N).bfloat16()
    args = [bits(x), Uninitialised(bits(y)), N]
    report = _launch(case, parsed, "softmax_kernel", M, threads, args, schedule, shared=shared)
    return Outcome(report, y, torch.softmax(x.double(), 1))


def _dropout(case: Case, parsed: Module, schedule: Schedule) -> Outcome:
    shared, threads, _ = _triton(case)
    n = case.sizes["N"]
    x, y = _random(n, kind="fp32"), torch.zeros(n)
    args = [bits(x), Uninitialised(bits(y)), 1234, n, 0.25]
    grid = -(-n // 512)
    report = _launch(case, parsed, "dropout_kernel", grid, threads, args, schedule, shared=shared)
    keep = torch.from_numpy(philox_uniform(1234, n) > np.float32(0.25))
    return Outcome(report, y, torch.where(keep, x / 0.75, 0.0))


def philox_uniform(seed: int, n: int) -> np.ndarray:
    """Triton's `tl.rand`: word 0 of Philox4x32-10 at counter (offset, 0, 0, 0), as fp32."""
    words = [np.arange(n, dtype=np.uint64), *(np.zeros(n, np.uint64) for _ in range(3))]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * words[0], np.uint64(0xCD9E8D57) * words[2]
        words = [
            second >> np.uint64(32) ^ words[1] ^ key[0],
            second & low,
            first >> np.uint64(32) ^ words[3] ^ key[1],
            first & low,
        ]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    bits_ = words[0].astype(np.uint32).view(np.int32)
    return np.where(bits_ < 0, -bits_ - 1, bits_).astype(np.float32) * np.float32(4.6566127342e-10)


def _tile(case: Case, parsed: Module, schedule: Schedule) -> Outcome:
    M, N, K = (case.sizes[n] for n in "MNK")
    x, w, y = _random(M, K), _random(N, K), torch.zeros(M, N).bfloat16()
    args = [bits(x), bits(w), Uninitialised(bits(y)), M, N, K]
    grid = (-(-M // 64), -(-N // 64))
    report = _launch(case, parsed, "tile_gemm", grid, 128, args, schedule)
    return Outcome(report, y, x.double() @ w.double().T)


def _hopper(case: Case, parsed: Module, schedule: Schedule) -> Outcome:
    M, N, K = (case.sizes[n] for n in "MNK")
    x, w, y = _random(M, K), _random(N, K), torch.zeros(M, N).bfloat16()
    maps = [
        TensorMap(bits(x), "bf16", (M, K), (64, 64), 128),
        TensorMap(bits(w), "bf16", (N, K), (32, 64), 128),
        TensorMap(bits(y), "bf16", (M, N), (64, 64), 128),
    ]
    grid = (-(-M // 128) * 2, -(-N // 64))
    report = _launch(
        case,
        parsed,
        "hopper_gemm",
        grid,
        256,
        [*maps, K],
        schedule,
        cluster=2,
        shared=3 * 2 * 64 * 64 * 2 + 48,
    )
    return Outcome(report, y, x.double() @ w.double().T)


def _blocks(case: Case, parsed: Module, schedule: Schedule) -> Outcome:
    return _BLOCK_KERNELS[case.options.get("kernel", "")](case, parsed, schedule)


def _sum(case: Case, parsed: Module, schedule: Schedule) -> Outcome:
    x = torch.randint(-8, 8, (case.sizes["N"],)).float()
    out = torch.zeros(1)
    report = run(parsed, "sum", 3, 256, [bits(x), bits(out), len(x)], schedule=schedule)
    return Outcome(report, out, x.sum(0, keepdim=True))


def _histogram(case: Case, parsed: Module, schedule: Schedule) -> Outcome:
    x = torch.randint(0, 200, (case.sizes["N"],), dtype=torch.int32)
    out = torch.zeros(64, dtype=torch.int32)
    report = run(parsed, "histogram", 2, 128, [bits(x), bits(out), len(x)], schedule=schedule)
    return Outcome(report, out, torch.bincount(x % 64, minlength=64))


def _relay(case: Case, parsed: Module, schedule: Schedule) -> Outcome:
    tiles = case.sizes["tiles"]
    x = torch.randint(-99, 99, (tiles * 64,)).float()
    middle, out = torch.zeros_like(x), torch.zeros_like(x)
    flags = np.zeros(tiles, np.uint32)
    args = [bits(x), Uninitialised(bits(middle)), Uninitialised(bits(out)), flags, tiles]
    report = run(
        parsed, "relay", 4, 64, args, schedule=schedule, resident=case.options.get("resident", 64)
    )
    return Outcome(report, out, 2 * (x.roll(64) + 1))


def _handover(case: Case, parsed: Module, schedule: Schedule) -> Outcome:
    rounds = case.sizes["rounds"]
    x = torch.randint(-99, 99, (rounds, 32), dtype=torch.int32)
    out = torch.zeros_like(x)
    args = [bits(x), Uninitialised(bits(out)), rounds]
    report = run(parsed, "handover", 1, 64, args, schedule=schedule)
    return Outcome(report, out, 3 * x.flip(1))


def _scramble(case: Case, parsed: Module, schedule: Schedule) -> Outcome:
    n = case.sizes["N"]
    x = torch.randint(-1000, 1000, (n,), dtype=torch.int32)
    out = torch.zeros(n, dtype=torch.int64)
    report = run(
        parsed,
        "scramble",
        -(-n // 64),
        64,
        [bits(x), Uninitialised(bits(out)), n],
        schedule=schedule,
    )
    return Outcome(report, out, torch.tensor([_scrambled(v) for v in x.tolist()]))


def _scrambled(x: int) -> int:
    """The loop of `scramble` in blocks.cu with C's rules for division."""

    def quotient(a: int, b: int) -> int:
        return abs(a) // b * (1 if a >= 0 else -1)

    total, steps = 0, x & 15
    for j in range(steps + 1):
        v = x * ((x + j) & 15)
        word = v & 0xFFFFFFFF
        results = (
            total + v,
            total - v,
            total ^ v,
            total + quotient(v, 3),
            total + v - 5 * quotient(v, 5),
            total + v * v,
            total + word.bit_count(),
            total + 32 - word.bit_length(),
        )
        total = results[v & 7]
    return quotient(total, steps + 1)


_BLOCK_KERNELS = {
    "sum": _sum,
    "histogram": _histogram,
    "relay": _relay,
    "handover": _handover,
    "scramble": _scramble,
}
_RUNNERS = {
    "lora": _lora,
    "descriptor": _descriptor,
    "specialised": _specialised,
    "gradient": _gradient,
    "softmax": _softmax,
    "dropout": _dropout,
    "tile": _tile,
    "hopper": _hopper,
    "blocks": _blocks,
}


def matrix_cases() -> list[Case]:
    ragged = {"M": 72, "N": 80, "K": 112}  # Triton was promised multiples of 16 for N and K
    cases = [
        Case(f"lora_{kind}_{c}", ragged)
        for kind, cs in (
            ("bf16", (80, 86, 89, 90, 100, 120)),
            ("fp16", (80, 90, 100)),
            ("fp32", (80, 90, 100)),
        )
        for c in cs
    ]
    cases += [Case(f"descriptor_bf16_{c}", ragged) for c in (80, 90, 100, 120)]
    # Triton 3.8 on sm_90: both consumer partitions store the same 64 x 64 tile (same values); on
    # sm_100 the last commits may arrive at mbarriers that were invalidated meanwhile.
    known = {90: frozenset({"global-race"}), 100: frozenset({"invalidated"}), 120: frozenset()}
    cases += [
        Case(f"specialised_bf16_{c}", {"M": 136, "N": 72, "K": 160}, known=kinds)
        for c, kinds in known.items()
    ]
    cases += [Case("tile_gemm", {"M": 72, "N": 88, "K": k}) for k in (32, 40, 104, 136)]
    cases += [Case("hopper_gemm", {"M": 136, "N": 72, "K": k}) for k in (64, 200, 264)]
    return cases


def other_cases() -> list[Case]:
    return [
        Case("gradient_bf16_80", {"M": 150, "K": 80}, 1e-5),
        Case("gradient_bf16_90", {"M": 150, "K": 80}, 1e-5),
        Case("softmax_bf16_90", {"M": 3, "N": 300}),
        Case("softmax_bf16_100", {"M": 3, "N": 300}),
        Case("dropout_fp32_80", {"N": 1000}, 1e-6),
        Case("blocks", {"N": 1500}, 0.0, {"kernel": "sum"}),
        Case("blocks", {"N": 700}, 0.0, {"kernel": "histogram"}),
        Case("blocks", {"tiles": 6}, 0.0, {"kernel": "relay"}),
        Case("blocks", {"rounds": 3}, 0.0, {"kernel": "handover"}),
        Case("blocks", {"N": 150}, 0.0, {"kernel": "scramble"}),
    ]


__all__ = ["Case", "Outcome", "matrix_cases", "other_cases", "philox_uniform"]
