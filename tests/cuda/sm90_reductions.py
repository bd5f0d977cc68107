"""What a dx launch of the sm_90a matmul is told about the gradients that it sums up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tests.ptx_emulator import TensorMap, Uninitialised
from tests.ptx_emulator.testing import bits

if TYPE_CHECKING:
    from .sm90_launch import Launch

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BLANK = bytes(128)


class Reductions:
    """da [R, K] of x and ds, db [N, R] of dy and s, as fill_reductions in csrc/cuda/sm90 has them.

    da has the dtype of the operands and db fp32, so that both are written."""

    def __init__(self, launch: Launch) -> None:
        self.case, self.launch = launch.case, launch
        self.got: dict[str, Tensor] = {}
        self.z: list[Tensor | None] = [None, None]
        self.t: list[Tensor | None] = [None, None]
        self.outputs: list[Tensor] = []
        case = self.case
        self.wanted = [name in case.gradients and case.parts > 0 for name in "ab"]
        if not any(self.wanted):
            self.parts = self.steps = 0
            return
        ((columns, depth, rank),), M = case.sizes, case.M
        blocks = -(-M // 128)
        self.steps = -(-blocks // case.parts)
        self.parts = -(-blocks // self.steps)
        self.z = [launch.random(M, columns), launch.x[0]]
        self.t = [launch.s[0], launch.random(M, rank)]
        da = torch.zeros(rank, columns, dtype=launch.dtype)
        db = torch.zeros(depth, rank, dtype=torch.float32)
        self.outputs = [da.t(), db]
        self.got = {n: t for n, t, w in zip(("da", "db"), (da, db), self.wanted, strict=True) if w}
        self.make_truth()

    def make_truth(self) -> None:
        launch = self.launch
        for into, dtype in ((launch.truth, torch.float64), (launch.baseline, launch.dtype)):
            ds = into["s0"] if "s0" in into else self.t[0]
            pairs = {"da": (ds, self.z[0]), "db": (self.z[1], self.t[1])}
            for name in self.got:
                left, right = pairs[name]
                into[name] = left.to(dtype).T @ right.to(dtype)

    @property
    def columns(self) -> list[int]:
        """Of each gradient; 0 where it is not wanted."""
        shapes = zip(self.outputs, self.wanted, strict=False)
        return [out.shape[0] if wanted else 0 for out, wanted in shapes] or [0, 0]

    @property
    def words(self) -> int:
        """Counters: one for every 16 columns."""
        return sum(-(-columns // 16) for columns in self.columns)

    def maps(self) -> list[TensorMap | bytes]:
        tensors = [*zip(self.z, self.wanted, strict=True), *zip(self.t, self.wanted, strict=True)]
        return [
            self.launch.map(t, (128, 64)) if t is not None and w else _BLANK for t, w in tensors
        ]

    def fields(self) -> list:
        """Both reductions, and the partial sums."""
        fields, word = [], 0
        for i, columns in enumerate(self.columns):
            if columns == 0:
                fields += [np.uint64(0)] * 3 + [np.int32(0)] * 6
                continue
            out = self.outputs[i]
            fields += [bits(out if out.is_contiguous() else out.t())]
            fields += [np.int64(stride) for stride in out.stride()]
            tiles = -(-columns // (128 * self.case.cluster))
            numbers = (_DTYPE_CODES[out.dtype], 0, columns, tiles, word, 0)
            fields += [np.int32(number) for number in numbers]
            word += -(-columns // 16)
        rank = self.case.sizes[0][2]
        sums = np.zeros(max(1, word * self.parts * -(-rank // 8) * 128), np.float32)
        return [*fields, Uninitialised(sums)]

    def numbers(self, main_tiles: int) -> tuple[int, ...]:
        """reduce_parts, steps, early, every, tiles, rank."""
        width = 128 * self.case.cluster
        tiles = self.parts * sum(-(-columns // width) for columns in self.columns)
        early = tiles // 2
        every = (early + main_tiles) // max(1, early)
        return (self.parts, self.steps, early, every, tiles, self.case.sizes[0][2])
