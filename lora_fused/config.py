"""What is asked (`Problem`), what was chosen (`Config`), and what follows for a call (`Route`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_fused.devices import Device
from lora_fused.reference import keep_mask

GRADIENT_NAMES = ("x", "weight", "lora_A", "lora_B", "bias")

FUSED_STRATEGIES = frozenset({"s_first", "one_pass", "decode"})
"""The strategies of one launch, which compute s (or ds) and y (or dx) together."""

GROUP_ALIGNMENT = 16
"""The columns of each member in the stacked s of a group begin at a multiple of this."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One LoRA linear call: y [M, N] = x [M, K] · weight [N, K]ᵀ + rank-R update.

    dtype is the compute dtype, adapter_dtype the one in which lora_A is stored. needs names the
    inputs whose gradient will be asked for. weight_layout is "row" (unit stride along
    in_features, as nn.Linear stores it), "column" (fan_in_fan_out) or "strided". plain is False
    when a tensor is not an ordinary strided torch.Tensor in memory that native code may read.

    On GPUs also: device describes the device; aligned says that every row of x, weight, lora_A and
    lora_B begins at a multiple of 16 bytes (what comes later, as dy, each backend looks at itself);
    given_mask that the caller drew the dropout mask; tf32 that torch lets float32 GEMMs round their
    inputs to TF32. group lists N and R of each member of a group
    on one x; N is then their sum and R the width of the stacked s (see `group_columns`).
    """

    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype
    device_type: str = "cpu"
    adapter_dtype: torch.dtype | None = None
    has_bias: bool = False
    dropout: bool = False
    needs: frozenset[str] = frozenset()
    prepacked: bool = False
    weight_layout: str = "row"
    plain: bool = True
    threads: int = 1
    deterministic: bool = False
    device: Device | None = None
    aligned: bool = True
    given_mask: bool = False
    tf32: bool = False
    group: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        where = self.device_type if self.device is None else self.device.name
        parts = [f"M={self.M} K={self.K} N={self.N} R={self.R} {dtype} on {where}"]
        if self.group:
            parts.append(f"a group of {len(self.group)}")
        if self.adapter_dtype not in (None, self.dtype):
            parts.append(f"adapters {str(self.adapter_dtype).removeprefix('torch.')}")
        parts += [word for word in ("dropout", "prepacked") if getattr(self, word)]
        if self.weight_layout != "row":
            parts.append(f"weight by {self.weight_layout}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of one GPU launch; a zero means that the kernel does not use it.

    splits: parts of the contraction that are summed at the end (reduce, shrink, decode).
    descriptors: tensor descriptors (TMA). persistent: a fixed number of blocks walks the tiles.
    shrink_group: how many consecutive S tiles one ticket of the s_first schedule hands out.
    reduce_parts: parts of the tokens in which a dx launch sums up da and db too; 0: it does not.
    """

    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    block_r: int = 0
    num_warps: int = 0
    num_stages: int = 0
    splits: int = 1
    descriptors: bool = False
    persistent: bool = False
    shrink_group: int = 1
    reduce_parts: int = 0

    def __str__(self) -> str:
        blocks = [size for size in (self.block_m, self.block_n, self.block_k) if size]
        parts = ["x".join(str(size) for size in blocks)] if blocks else []
        parts += [f"r{self.block_r}"] if self.block_r else []
        parts += [f"{self.num_warps} warps"] if self.num_warps else []
        parts += [f"{self.num_stages} stages"] if self.num_stages else []
        parts += [f"{self.splits} splits"] if self.splits > 1 else []
        parts += [f"{self.shrink_group} S tiles a ticket"] if self.shrink_group > 1 else []
        parts += [f"da and db in {self.reduce_parts} parts"] if self.reduce_parts else []
        parts += [word for word in ("descriptors", "persistent") if getattr(self, word)]
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One legal way of running an operation on a GPU.

    strategy: "split" or one of FUSED_STRATEGIES for the operations "forward", "dx" and "backward"
    (dx, da and db by one launch); "shrink" and "reduce" for those. shared_bytes: of one block.
    registers: of one thread; measured from the compiled kernel where that was possible, else an
    estimate.
    """

    strategy: str
    tiles: Tiles
    shared_bytes: int = 0
    registers: int = 0


@dataclass(frozen=True, slots=True)
class Config:
    """How a Problem is computed.

    forward and dx name the strategy of each direction. On the CPU: "own" (native GEMM, the rank
    folded into its contraction), "packed" (the same on a packed weight), "hybrid" (the vendor's
    GEMM, native kernels for the rank-R parts) or "library" (torch's operations only). On GPUs:
    "library" (the vendor's GEMM), "split" (s by a launch of its own, then a GEMM whose contraction
    runs R steps longer) or one of FUSED_STRATEGIES. The tiles belong to the backend's launches;
    where they are None the part is torch's. notes says in words why it is not something faster.
    predicted_us and measured_us: forward and dx together, by the model and by timing.
    """

    backend: str
    forward: str = "library"
    dx: str = "library"
    isa: str = ""
    threads: int = 1
    notes: tuple[str, ...] = ()
    forward_tiles: Tiles | None = None
    dx_tiles: Tiles | None = None
    shrink_tiles: Tiles | None = None
    reduce_tiles: Tiles | None = None
    predicted_us: float | None = None
    measured_us: float | None = None

    def tiles(self, operation: str) -> Tiles | None:
        """The tiles of "forward", "dx", "shrink", "reduce" or "backward"."""
        if operation == "backward":
            makes_all = self.dx_tiles is not None and self.dx_tiles.reduce_parts > 0
            return self.dx_tiles if makes_all else None
        found: Tiles | None = getattr(self, f"{operation}_tiles")
        return found

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        where = f"{self.backend} ({self.isa}, {threads})" if self.isa else self.backend
        parts = []
        for direction, strategy in (("forward", self.forward), ("dx", self.dx)):
            tiles = self.tiles(direction)
            parts.append(f"{direction} {strategy}{f' ({tiles})' if tiles else ''}")
        return f"{where}: {', '.join(parts)}"


@dataclass(frozen=True, slots=True)
class Route:
    """Everything about a call that its tensors' metadata decides: checked once, then looked up.

    cast says that a parameter has another dtype than the compute dtype; wide_adapters that the
    backend's fused kernels take fp32 adapters as they are. param_dtypes are those of weight,
    lora_A, lora_B and bias, in which their gradients come back. forward_layer and backward_layer:
    the native layer that runs a whole direction in one call (see backends.cpu_layer), or None.
    """

    problem: Problem
    config: Config
    compute: torch.dtype
    cast: bool
    needs: frozenset[str]
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    param_dtypes: tuple[torch.dtype | None, ...]
    wide_adapters: bool = False
    forward_layer: Any = field(default=None, compare=False, repr=False)
    backward_layer: Any = field(default=None, compare=False, repr=False)


class Mask(NamedTuple):
    """A dropout mask that is never stored: these two regenerate it (see reference.keep_mask)."""

    seed: int | Tensor
    threshold: int

    def keep(self, rows: int, cols: int, device: torch.device) -> Tensor:
        """The mask itself, bool [rows, cols]."""
        return keep_mask(self.seed, rows, cols, self.threshold / 65536, device=device)


class Call(NamedTuple):
    """What one call carries from forward to backward besides tensors.

    scale is reference.effective_scaling of the scaling; packed a packed form of weight or None.
    keep [M, K], bool, is a dropout mask that the caller drew, instead of one to regenerate.
    """

    route: Route
    scale: float
    mask: Mask | None = None
    packed: object = None
    keep: Tensor | None = None


class Member(NamedTuple):
    """One member of a group as backends get it: weight [N, K], lora_A [R, K], lora_B [N, R].

    The tensors have the compute dtype, bias may be None. scale and mask are this member's own.
    needs names the gradients that its caller wants; da_dtype and db_dtype are their dtypes.
    """

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scale: float
    mask: Mask | None
    needs: frozenset[str]
    da_dtype: torch.dtype
    db_dtype: torch.dtype


def group_columns(ranks: Sequence[int]) -> tuple[list[int], int]:
    """The first column of each member in the stacked s [M, R_total] of a group, and R_total.

    Members follow each other in order, each padded with zero columns to a multiple of
    GROUP_ALIGNMENT.
    """
    offsets, total = [], 0
    for rank in ranks:
        offsets.append(total)
        total += -(-rank // GROUP_ALIGNMENT) * GROUP_ALIGNMENT
    return offsets, total
