"""The sm_90a matmul in the emulator: problems, what the launcher would pass, and the truth.

A `Case` is one launch: `case.run(schedule)` returns the report, what the kernel wrote and what it
should have written. Inputs depend on the sizes only. Names are those of the forward pass in both
directions, as in csrc/cuda/sm90/matmul.cuh: dx has dy for x, lora_B for a and lora_A for b.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from lora_fused.reference import effective_scaling, keep_mask
from tests.ptx_emulator import TOGETHER, Report, Schedule, Struct, TensorMap, Uninitialised, parse
from tests.ptx_emulator.launch import run
from tests.ptx_emulator.testing import bits

from .compile import ptx

SOURCE = "csrc/cuda/sm90/matmul.cu"
ARCH = "sm_90a"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MEMBERS = 3
WORDS = 4  # of the workspace in front of the flags
SHARED = {256: 230592, 128: 230592 + 2 * 32}
THREADS = 384
NOBODY = 2**31 - 1
SCALING = 0.75


@dataclass(frozen=True)
class Case:
    """`sizes`: per member (columns of y, depth of the contraction, R); a plain layer has one.

    Members of a forward group share their depth (and x), those of a dx group their columns (and y).
    p: dropout; seeds live on the "device". split: s is given. wide: S tiles of BLOCK_N columns."""

    M: int
    sizes: tuple[tuple[int, int, int], ...]
    direction: str = "forward"
    dtype: str = "bf16"
    block_n: int = 256
    split: bool = False
    stacked: bool = True
    wide: bool = False
    bias: bool = False
    p: float = 0.0
    cluster: int = 2
    clusters: int = 2
    resident: int = 64
    seed: int = 0
    options: dict = field(default_factory=dict, hash=False, compare=False)

    @property
    def kernel(self) -> str:
        masked = "_masked" if self.p and self.direction == "dx" else ""
        return f"lora_matmul_sm90_{self.dtype}_{self.direction}{masked}_n{self.block_n}"

    @property
    def forward(self) -> bool:
        return self.direction == "forward"

    def but(self, **changes) -> Case:
        return replace(self, **changes)

    def __str__(self) -> str:
        sizes = "+".join("x".join(map(str, size)) for size in self.sizes)
        flags = [w for w in ("split", "wide", "bias") if getattr(self, w)]
        flags += [f"p{self.p}"] * bool(self.p) + ["separate"] * (not self.stacked)
        flags += [f"c{self.cluster}x{self.clusters}r{self.resident}"]
        return "-".join([self.kernel[17:], f"M{self.M}", sizes, *flags])

    def run(self, schedule: Schedule = TOGETHER, text: str | None = None, launches: int = 1):
        return Launch(self).run(schedule, text, launches)


@dataclass
class Outcome:
    report: Report
    y: list[Tensor]
    s: list[Tensor]
    truth_y: list[Tensor]
    truth_s: list[Tensor]
    workspace: Tensor

    @property
    def error(self) -> float:
        """Of y and s, as a part of the largest element."""
        pairs = zip(self.y + self.s, self.truth_y + self.truth_s, strict=True)
        return max(float((g.double() - t).abs().max() / t.abs().max()) for g, t in pairs)


class Launch:
    def __init__(self, case: Case) -> None:
        self.case = case
        self.dtype = DTYPES[case.dtype]
        generator = torch.Generator().manual_seed(case.seed)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            """Rows of a multiple of 8 elements; what is behind them must not matter."""
            stride = -(-shape[-1] // 8) * 8
            storage = torch.full((*shape[:-1], stride), float("nan"), dtype=self.dtype)
            values = torch.randn(*shape, generator=generator) * scale
            storage[..., : shape[-1]] = values.to(self.dtype)
            return storage[..., : shape[-1]]

        M, sizes = case.M, case.sizes
        depth0 = sizes[0][1]
        self.x = [random(M, d) for _, d, _ in (sizes[:1] if case.forward else sizes)]
        if case.forward:
            self.x *= len(sizes)
        stored = (lambda n, d: (n, d)) if case.forward else (lambda n, d: (d, n))
        self.w = [random(*stored(n, d), scale=d**-0.5) for n, d, _ in sizes]
        self.b = [random(*stored(n, r), scale=r**-0.5) for n, _, r in sizes]
        self.joint = case.forward and case.stacked
        self.starts = [0]
        for *_, r in sizes:
            self.starts.append(self.starts[-1] + -(-r // 8) * 8 * (len(sizes) > 1) + r * (len(sizes) == 1))
        total = self.starts[-1]
        if self.joint:
            a = random(total, depth0, scale=depth0**-0.5)
            for (_, _, r), start, end in zip(sizes, self.starts, self.starts[1:], strict=False):
                a[start + r : end] = 0
            self.a = [a]
            self.a_of = [a[start : start + r] for (_, _, r), start in zip(sizes, self.starts, strict=False)]
        else:
            self.a = [random(*stored(r, d), scale=d**-0.5) for _, d, r in sizes]
            self.a_of = self.a
        self.bias = [random(n) if case.bias else None for n, *_ in sizes]
        self.seeds = [torch.tensor([1234567890123 + 77 * i]) for i in range(len(sizes))]
        self.s_storage = torch.zeros(M, -(-total // 8) * 8, dtype=self.dtype)
        self.s = [
            self.s_storage[:, start : start + r] for (_, _, r), start in zip(sizes, self.starts, strict=False)
        ]
        outputs = [n for n, *_ in (sizes if case.forward else sizes[:1])]
        self.y_storage = [torch.zeros(M, -(-n // 8) * 8, dtype=self.dtype) for n in outputs]
        self.y = [y[:, :n] for y, n in zip(self.y_storage, outputs, strict=True)]
        self._truth()

    def _truth(self) -> None:
        case = self.case
        self.scale = effective_scaling(SCALING, case.p)
        columns = case.sizes[0][1 if case.forward else 0]
        keeps = [
            keep_mask(int(seed), case.M, columns, case.p).double() if case.p else 1.0
            for seed in self.seeds
        ]
        exact = [t.double() for t in self.x]
        turn = (lambda t: t.double()) if case.forward else (lambda t: t.double().T)
        self.truth_s, parts = [], []
        for x, w, a, b, keep, bias in zip(exact, self.w, self.a_of, self.b, keeps, self.bias, strict=True):
            s = self.scale * ((x * keep if case.forward else x) @ turn(a).T)
            self.truth_s.append(s)
            low = s.to(self.dtype).double() @ turn(b).T
            y = x @ turn(w).T + (low if case.forward else keep * low)
            parts.append(y if bias is None else y + bias.double())
        self.truth_y = parts if case.forward else [sum(parts)]
        if case.split:
            for s, truth in zip(self.s, self.truth_s, strict=True):
                s.copy_(truth)

    # ---- what the launcher passes ----------------------------------------------------------------

    def map(self, tensor: Tensor, box: tuple[int, int], output: bool = False) -> TensorMap:
        rows, columns = tensor.shape
        storage = self.storages[tensor.untyped_storage().data_ptr()]
        stride = tensor.stride(0) * 2 if rows > 1 else -(-columns // 8) * 16
        found = TensorMap(storage, self.case.dtype.replace("fp", "f"), (rows, columns), box, 128, (stride, 2))
        offset = tensor.storage_offset() * 2
        return found if not offset else _Shifted(found, offset)

    def arguments(self) -> Struct:
        case, sizes = self.case, self.case.sizes
        tensors = [*self.x, *self.w, *self.a, *self.b, self.s_storage, *self.y_storage]
        self.storages = {}
        for t in tensors:
            whole = t.as_strided((t.untyped_storage().nbytes() // 2,), (1,), 0)
            self.storages.setdefault(t.untyped_storage().data_ptr(), bits(whole))
        block, tall, store = (64, 64), (128, 64), (16, 64)
        stacked = [self.s_storage[:, : self.starts[-1]]] if self.joint else self.s
        groups = [
            [self.map(t, tall) for t in (self.x[:1] if case.forward else self.x)],
            [self.map(t, block) for t in self.w],
            [self.map(t, block) for t in self.a],
            [self.map(t, tall) for t in self.s],
            [self.map(t, block) for t in self.b],
            [self.map(t, store) for t in self.y],
            [self.map(t, store) for t in stacked],
        ]
        blank = bytes(128)
        maps = [m for group in groups for m in group + [blank] * (MEMBERS - len(group))]
        self.column_tiles, members = 0, []
        for i in range(MEMBERS):
            if i >= len(sizes):
                members += [bytes(32), np.uint64(0), *[np.uint32(0)] * 4, np.int32(NOBODY), np.int32(0)]
                continue
            n, depth, rank = sizes[i]
            mask_row = sizes[0][1 if case.forward else 0]
            seed = bits(self.seeds[i]) if case.p else np.uint64(0)
            members += [seed, np.uint64(0), np.int64(mask_row), np.uint32(round(case.p * 65536)), np.uint32(0)]
            bias = self.bias[i]
            members += [np.uint64(0) if bias is None else bits(bias)]
            members += [np.uint32(self.starts[-1] if self.joint else rank), np.uint32(rank)]
            members += [np.int32(-(-depth // 64)), np.int32(n), np.int32(self.column_tiles), np.int32(0)]
            if case.forward or i == 0:
                self.column_tiles += -(-n // case.block_n)
        blocks = case.block_n // 64 if case.wide else 1
        most = self.starts[-1] if self.joint else max(r for *_, r in sizes)
        passes = -(-most // (64 * blocks))
        jobs = 0 if case.split else 1 if self.joint else len(sizes)
        row_tiles = -(-case.M // (128 * case.cluster))
        self.workspace = torch.zeros(WORDS + row_tiles * case.cluster, dtype=torch.int32)
        numbers = [np.float32(self.scale), np.int32(case.M), np.int32(len(sizes)), np.int32(jobs)]
        numbers += [np.int32(passes), np.int32(blocks), np.int32(row_tiles), np.int32(self.column_tiles)]
        return Struct(*maps, *members, bits(self.workspace), *numbers)

    def run(self, schedule: Schedule, text: str | None, launches: int) -> Outcome:
        case = self.case
        module = parse(text if text is not None else ptx(SOURCE, ARCH))
        kernel = module.kernel(case.kernel)
        arguments = self.arguments()
        for _ in range(launches):
            for y in [*self.y_storage, *([] if case.split else [self.s_storage])]:
                y.fill_(float("nan"))
            report = run(
                module,
                kernel,
                case.clusters * case.cluster,
                THREADS,
                [arguments],
                cluster=case.cluster,
                shared=SHARED[case.block_n],
                resident=case.resident,
                schedule=schedule,
                registers=168,
                **case.options,
            )
            if not report.ok:
                break
        return Outcome(report, self.y, self.s, self.truth_y, self.truth_s, self.workspace)


class _Shifted(TensorMap):
    """A map whose matrix begins inside its buffer."""

    def __init__(self, base: TensorMap, offset: int) -> None:
        self.__dict__.update(base.__dict__)
        self.offset = offset

    def encode(self, address: int) -> bytes:
        return super().encode(address + self.offset)
