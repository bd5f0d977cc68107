"""One launch of the sm_90a matmul in the emulator: inputs, truth, and what the launcher passes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lora_fused.reference import effective_scaling, keep_mask
from tests.ptx_emulator import Schedule, Struct, TensorMap, run
from tests.ptx_emulator.testing import bits

from .sm90 import DTYPES, Case, Outcome, kernel_module, shared_bytes
from .sm90_reductions import Reductions

MEMBERS = 3
WORDS = 2  # of the workspace, in front of the flags
THREADS, REGISTERS = 384, 168
NOBODY = 2**31 - 1
SCALING = 0.75


class Launch:
    def __init__(self, case: Case) -> None:
        self.case, self.dtype = case, DTYPES[case.dtype]
        self.generator = torch.Generator().manual_seed(0)
        self.storages: dict[int, np.ndarray] = {}
        sizes, M = case.sizes, case.M
        ranks = [r for *_, r in sizes]
        self.joint = case.forward and not case.separate
        self.starts = np.cumsum([0, *(-(-r // 8) * 8 for r in ranks)]).tolist()
        self.total = self.starts[-1] if len(sizes) > 1 else ranks[0]
        same = self.joint or len(sizes) == 1
        self.scales = [
            effective_scaling(SCALING + (0 if same else i), case.p) for i in range(len(sizes))
        ]
        self.mask_columns = sizes[0][1 if case.forward else 0]

        self.x = [self.random(M, d) for _, d, _ in (sizes[:1] if case.forward else sizes)]
        self.w = [self.random(*self.stored(n, d), scale=d**-0.5) for n, d, _ in sizes]
        self.b = [self.random(*self.stored(n, r), scale=r**-0.5) for n, _, r in sizes]
        self.bias = [self.random(1, n)[0] if case.bias else None for n, *_ in sizes]
        self.seeds = [torch.tensor([2**40 + 12345 + 77 * i]) for i in range(len(sizes))]
        self.make_a()
        self.s_storage = self.zeros(M, self.total)
        starts = zip(self.starts, ranks, strict=False)
        self.s = [self.s_storage[:, start : start + r] for start, r in starts]
        self.y = [self.zeros(M, n) for n, *_ in (sizes if case.forward else sizes[:1])]
        self.make_truth()
        self.reductions = Reductions(self)

    def stored(self, outer: int, inner: int) -> tuple[int, int]:
        """The shape of [outer, contraction] operands in memory."""
        return (outer, inner) if self.case.forward else (inner, outer)

    def zeros(self, rows: int, columns: int) -> Tensor:
        """Rows begin at multiples of 16 bytes; what is behind them is NaN and must not matter."""
        storage = torch.full((rows, -(-columns // 8) * 8), float("nan"), dtype=self.dtype)
        whole = storage.view(-1)
        self.storages[whole.untyped_storage().data_ptr()] = bits(whole)
        return storage[:, :columns].zero_()

    def random(self, rows: int, columns: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(rows, columns, generator=self.generator) * scale
        return self.zeros(rows, columns).copy_(values)

    def make_a(self) -> None:
        """One adapter for all members of a joint forward group, else one for each."""
        sizes = self.case.sizes
        if not self.joint:
            self.a = [self.random(*self.stored(r, d), scale=d**-0.5) for _, d, r in sizes]
            self.a_of = self.a
            return
        self.a = [self.random(self.total, sizes[0][1], scale=sizes[0][1] ** -0.5)]
        self.a_of = [
            self.a[0][start : start + r] for start, (*_, r) in zip(self.starts, sizes, strict=False)
        ]

    def make_truth(self) -> None:
        case = self.case
        self.truth: dict[str, Tensor] = {}
        self.baseline: dict[str, Tensor] = {}
        for into, dtype in ((self.truth, torch.float64), (self.baseline, self.dtype)):
            parts = []
            for i in range(len(case.sizes)):
                x, w, a, b = (
                    t.to(dtype)
                    for t in (self.x[i % len(self.x)], self.w[i], self.a_of[i], self.b[i])
                )
                turned = (w.T, a.T, b.T) if case.forward else (w, a, b)
                keep = self.keep(i).to(dtype)
                s = self.scales[i] * ((x * keep if case.forward else x) @ turned[1])
                low = s @ turned[2]
                y = x @ turned[0] + (low if case.forward else keep * low)
                bias = self.bias[i]
                parts.append(y if bias is None else y + bias.to(dtype))
                into[f"s{i}"] = s
            into |= {f"y{i}": y for i, y in enumerate(parts if case.forward else [sum(parts)])}
        if case.split:
            for i, s in enumerate(self.s):
                s.copy_(self.truth.pop(f"s{i}"))

    def keep(self, i: int) -> Tensor:
        if not self.case.p:
            return torch.ones(())
        return keep_mask(int(self.seeds[i]), self.case.M, self.mask_columns, self.case.p)

    # ---- what the launcher passes ----------------------------------------------------------------

    def map(self, tensor: Tensor, box: tuple[int, int]) -> TensorMap:
        storage = self.storages[tensor.untyped_storage().data_ptr()]
        strides = (2 * tensor.stride(0), 2)
        start = 2 * tensor.storage_offset()
        return _At(start, storage, self.case.dtype, tensor.shape, box, 128, strides)

    def maps(self) -> list:
        """x, w, a, s, b, y, s_out of every member; boxes as csrc/cuda/sm90/arguments.h says."""
        block, tall, store = (64, 64), (128, 64), (16, 64)
        outputs = [self.s_storage] if self.joint else self.s
        groups = [(self.x, tall), (self.w, block), (self.a, block), (self.s, tall), (self.b, block)]
        groups += [(self.y, store), (outputs, store)]
        blank = bytes(128)
        return [
            self.map(tensors[i], box) if i < len(tensors) else blank
            for tensors, box in groups
            for i in range(MEMBERS)
        ] + self.reductions.maps()

    def members(self) -> list:
        case, fields, first_tile = self.case, [], 0
        for i in range(MEMBERS):
            if i >= len(case.sizes):
                fields += [bytes(40), *[np.uint32(0)] * 4, np.int32(NOBODY), np.int32(0)]
                continue
            n, depth, rank = case.sizes[i]
            seed = bits(self.seeds[i]) if case.p else np.uint64(0)
            threshold = np.uint32(round(case.p * 65536))
            fields += [seed, np.uint64(0), np.int64(self.mask_columns), threshold, np.uint32(0)]
            bias = self.bias[i]
            fields += [
                np.uint64(0) if bias is None else self.storages[bias.untyped_storage().data_ptr()]
            ]
            fields += [np.uint32(self.total if self.joint else rank), np.uint32(rank)]
            fields += [
                np.int32(-(-depth // 64)),
                np.int32(n),
                np.int32(first_tile),
                np.float32(self.scales[i]),
            ]
            first_tile += -(-n // case.block_n) if case.forward else 0
        return fields

    def arguments(self) -> Struct:
        case = self.case
        most = self.total if self.joint else max(r for *_, r in case.sizes)
        jobs = 0 if case.split else 1 if self.joint else len(case.sizes)
        row_tiles = -(-case.M // (128 * case.cluster))
        outputs = case.sizes if case.forward else case.sizes[:1]
        column_tiles = sum(-(-n // case.block_n) for n, *_ in outputs)
        self.error = torch.zeros(1, dtype=torch.int32)
        counters = WORDS + row_tiles * case.cluster
        words = counters + self.reductions.words
        self.workspace = torch.zeros(words, dtype=torch.int32)
        self.words = bits(self.workspace)
        numbers = (
            case.M,
            len(case.sizes),
            jobs,
            -(-most // (64 * case.blocks)),
            case.blocks,
            row_tiles,
            column_tiles,
            case.group,
            *self.reductions.numbers(row_tiles * column_tiles),
            counters,
        )
        return Struct(
            *self.maps(),
            *self.members(),
            *self.reductions.fields(),
            self.words,
            bits(self.error),
            *map(np.int32, numbers),
        )

    def run(
        self,
        schedule: Schedule,
        text: str | None,
        launches: int,
        dependent: bool = False,
        **options,
    ) -> Outcome:
        """dependent: the kernel before may still be running, on everything that this one reads."""
        case = self.case
        module = kernel_module(case.kernel, text)
        arguments = self.arguments()
        if dependent:
            options["after"] = [*self.storages.values(), self.words]
        for _ in range(launches):
            made = [] if case.split else [self.s_storage]
            for output in [*self.y, *made, *self.reductions.got.values()]:
                output.fill_(float("nan"))
            report = run(
                module, case.kernel, case.clusters * case.cluster, THREADS, [arguments],
                cluster=case.cluster, shared=shared_bytes(case.block_n), resident=case.resident,
                schedule=schedule, registers=REGISTERS, **options,
            )  # fmt: skip
            if not report.ok:
                break
        got = {f"y{i}": y for i, y in enumerate(self.y)}
        got |= {} if case.split else {f"s{i}": s for i, s in enumerate(self.s)}
        got |= self.reductions.got
        return Outcome(report, got, self.truth, self.baseline, self.workspace)


class _At(TensorMap):
    """A map whose matrix begins `offset` bytes into its buffer."""

    def __init__(self, offset: int, *arguments) -> None:
        super().__init__(*arguments)
        self.offset = offset

    def encode(self, address: int) -> bytes:
        return super().encode(address + self.offset)
