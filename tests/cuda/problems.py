"""Problems for the CUDA kernels, and the rule their results are held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fused.backends.cuda_candidates import decode_tiles, reduce_tiles, shrink_tiles
from lora_fused.config import Config, Mask, Problem, Route
from lora_fused.reference import dropout_threshold, keep_mask
from lora_fused.testing import assert_close_to_ref

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
IDS = ["bf16", "fp16", "fp32"]


@dataclass
class Data:
    """Random operands of one layer, rounded to a dtype."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor
    dy: Tensor

    def all(self) -> tuple[Tensor, ...]:
        return self.x, self.weight, self.lora_A, self.lora_B, self.bias, self.dy


def data(M: int, K: int, N: int, R: int, dtype: torch.dtype) -> Data:
    generator = torch.Generator().manual_seed(M * 7 + K * 5 + N * 3 + R)

    def normal(*shape: int, divide_by: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) / divide_by**0.5).to(dtype)

    return Data(
        x=normal(M, K),
        weight=normal(N, K, divide_by=K),
        lora_A=normal(R, K, divide_by=K),
        lora_B=normal(N, R, divide_by=R),
        bias=normal(N),
        dy=normal(M, N),
    )


def route(
    M: int,
    K: int,
    N: int,
    R: int,
    dtype: torch.dtype,
    splits: int = 1,
    strategy: str = "decode",
    weight_layout: str = "row",
) -> Route:
    """A route whose every part is a CUDA kernel with so many splits."""
    problem = Problem(M, K, N, R, dtype, device_type="cuda", weight_layout=weight_layout)
    config = Config(
        "cuda", forward=strategy, dx=strategy,
        forward_tiles=decode_tiles(splits), dx_tiles=decode_tiles(splits),
        shrink_tiles=shrink_tiles(R, dtype, splits), reduce_tiles=reduce_tiles(R, dtype, splits),
    )  # fmt: skip
    return Route(problem, config, dtype, False, frozenset(), (M, K), (M, N), (dtype,) * 4)


def mask_of(p: float, seed: int | Tensor = 1234567890123) -> Mask:
    return Mask(seed, dropout_threshold(p))


def dropped(x: Tensor, mask: Mask | None) -> Tensor:
    if mask is None:
        return x
    return x * keep_mask(mask.seed, *x.shape, mask.threshold / 65536)


def assert_product(name: str, got: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """got = scale · left right, with the error of torch's own product in the operands' dtype."""
    truth = scale * (left.double() @ right.double())
    baseline = (scale * (left @ right).float()).to(got.dtype)
    assert_close_to_ref(name, got, truth, baseline)


def strided(t: Tensor, how: str) -> Tensor:
    """The same values in another memory layout."""
    rows, columns = t.shape
    if how == "row":
        return t.clone()
    if how == "column":
        return t.t().contiguous().t()
    if how == "padded":
        out = torch.zeros(rows, columns + 3, dtype=t.dtype)[:, :columns]
    elif how == "offset":
        out = torch.zeros(rows * columns + 1, dtype=t.dtype)[1:].view(rows, columns)
    else:
        out = torch.zeros(2 * rows, 3 * columns, dtype=t.dtype)[::2, ::3]
    return out.copy_(t)
