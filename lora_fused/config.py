"""What is asked (`Problem`), what was chosen (`Config`), and what follows for a call (`Route`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_fused.reference import keep_mask

GRADIENT_NAMES = ("x", "weight", "lora_A", "lora_B", "bias")


@dataclass(frozen=True, slots=True)
class Problem:
    """One LoRA linear call: y [M, N] = x [M, K] · weight [N, K]ᵀ + rank-R update.

    dtype is the compute dtype, adapter_dtype the one in which lora_A is stored. needs names the
    inputs whose gradient will be asked for. weight_layout is "row" (unit stride along
    in_features, as nn.Linear stores it), "column" (fan_in_fan_out) or "strided". plain is False
    when a tensor is not an ordinary strided torch.Tensor in memory that native code may read.
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

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        parts = [f"M={self.M} K={self.K} N={self.N} R={self.R} {dtype} on {self.device_type}"]
        if self.adapter_dtype not in (None, self.dtype):
            parts.append(f"adapters {str(self.adapter_dtype).removeprefix('torch.')}")
        parts += [word for word in ("dropout", "prepacked") if getattr(self, word)]
        if self.weight_layout != "row":
            parts.append(f"weight by {self.weight_layout}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Config:
    """How a Problem is computed.

    forward and dx name the strategy of each direction: "own" (native GEMM, the rank folded into
    its contraction), "packed" (the same on a packed weight), "hybrid" (the vendor's GEMM, native
    kernels for the rank-R parts) or "library" (torch's operations only). notes says in words why
    it is not something faster.
    """

    backend: str
    forward: str = "library"
    dx: str = "library"
    isa: str = ""
    threads: int = 1
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        where = f"{self.backend} ({self.isa}, {threads})" if self.isa else self.backend
        return f"{where}: forward {self.forward}, dx {self.dx}"


@dataclass(frozen=True, slots=True)
class Route:
    """Everything about a call that its tensors' metadata decides: checked once, then looked up.

    cast says that a parameter has another dtype than the compute dtype. param_dtypes are those of
    weight, lora_A, lora_B and bias, in which their gradients come back.
    """

    problem: Problem
    config: Config
    compute: torch.dtype
    cast: bool
    needs: frozenset[str]
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    param_dtypes: tuple[torch.dtype | None, ...]


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
