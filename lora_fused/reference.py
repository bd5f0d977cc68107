"""The maths of a LoRA linear layer in plain torch: the definition that backends are tested against.

Shapes: tokens M, in_features K, out_features N, rank R.

    x [M, K]   weight [N, K]   lora_A [R, K]   lora_B [N, R]   bias [N]   keep [M, K] bool

    s  = scale · (keep ⊙ x) Aᵀ             [M, R]
    y  = x Wᵀ + s Bᵀ + bias                [M, N]

    ds = scale · dy B                      [M, R]
    dx = dy W + keep ⊙ (ds A)              [M, K]
    dA = dsᵀ (keep ⊙ x)                    [R, K]
    dB = dyᵀ s                             [N, R]
    dW = dyᵀ x      dbias = Σ_m dy

`scale` is `effective_scaling(scaling, p)`: the division by 1 − p of dropout is part of it.
Called in float64 these functions are the truth; called in bf16, fp16 or fp32 they are the baseline
whose error a backend may exceed by a factor of two at most (see `lora_fused.testing`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_PHILOX_ROUNDS = 7
_COUNTERS_PER_CHUNK = {"cpu": 1 << 15}
_COUNTERS_PER_CHUNK_ELSEWHERE = 1 << 24


class Gradients(NamedTuple):
    """Gradients of one layer; None where none was asked for."""

    dx: Tensor | None
    dweight: Tensor | None
    da: Tensor | None
    db: Tensor | None
    dbias: Tensor | None


def lora_linear_ref(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward pass. Returns y [..., N] and s [..., R]. Differentiable by autograd and torch.func.

    With dropout, `scaling` is `effective_scaling(scaling, p)` and `keep` is `keep_mask(...)`.
    """
    dropped = x if keep is None else x * keep.view(x.shape)
    s = scaling * (dropped @ lora_A.mT)
    y = x @ weight.mT + s @ lora_B.mT
    return (y if bias is None else y + bias), s


def lora_linear_backward_ref(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    keep: Tensor | None = None,
) -> Gradients:
    """Backward pass on 2-D tensors, written out. All five gradients, in the dtype of the inputs."""
    dropped = x if keep is None else x * keep
    s = scaling * (dropped @ lora_A.mT)
    ds = scaling * (dy @ lora_B)
    through_adapter = ds @ lora_A
    if keep is not None:
        through_adapter = through_adapter * keep
    return Gradients(
        dx=dy @ weight + through_adapter,
        dweight=dy.mT @ x,
        da=ds.mT @ dropped,
        db=dy.mT @ s,
        dbias=dy.sum(0),
    )


def dropout_threshold(p: float) -> int:
    """The 16-bit threshold of a dropout probability: an element is kept iff its bits are >= it."""
    return round(p * 65536)


def effective_scaling(scaling: float, p: float) -> float:
    """scaling / (1 − p_eff), where p_eff = threshold / 65536 is the probability really applied.

    0 when everything is dropped.
    """
    threshold = dropout_threshold(p)
    return 0.0 if threshold == 65536 else scaling / (1.0 - threshold / 65536)


def keep_mask(
    seed: int | Tensor,
    rows: int,
    cols: int,
    p: float,
    row_offset: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The dropout mask: bool [rows, cols], True where the element is kept.

    Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is
    the 64-bit `seed`; the counter of the eight elements (row, 8j … 8j+7) is row · ceil(cols / 8) +
    j; each element takes 16 of the 128 bits. The mask depends on nothing else: every backend makes
    the same bits, whatever its tiling. `row_offset` gives the rows from there on, so that a slice
    of a huge mask costs no more than the slice. `seed` may be an int64 tensor with one element,
    which stays on its device.
    """
    if isinstance(seed, Tensor) and device is None:
        device = seed.device
    threshold = dropout_threshold(p)
    if threshold == 0 or rows == 0 or cols == 0:
        return torch.ones(rows, cols, dtype=torch.bool, device=device)
    blocks = -(-cols // 8)
    device_type = torch.device(device or "cpu").type
    chunk = _COUNTERS_PER_CHUNK.get(device_type, _COUNTERS_PER_CHUNK_ELSEWHERE)
    rows_per_chunk = max(1, chunk // blocks)
    parts = []
    for first in range(0, rows, rows_per_chunk):
        count = min(rows_per_chunk, rows - first)
        start = (row_offset + first) * blocks
        index = torch.arange(start, start + count * blocks, dtype=torch.int64, device=device)
        bits = _uint16_of_counters(seed, index)
        parts.append((bits >= threshold).view(count, blocks * 8)[:, :cols])
    return torch.cat(parts)


def _uint16_of_counters(seed: int | Tensor, index: Tensor) -> Tensor:
    """Eight 16-bit numbers (as int64) per 64-bit counter: [n] -> [n, 8]."""
    words = torch.stack(philox_4x32(seed, index), dim=-1)  # [n, 4]
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(-2)  # [n, 8]


def philox_4x32(
    seed: int | Tensor, index: Tensor, rounds: int = _PHILOX_ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit output words (held in int64) of the counters (index lo, index hi, 0, 0)."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1 = index & _WORD, (index >> 32) & _WORD
    c2 = c3 = torch.zeros_like(index)
    for round_number in range(rounds):
        if round_number > 0:
            k0, k1 = (k0 + _PHILOX_W0) & _WORD, (k1 + _PHILOX_W1) & _WORD
        # The product wraps in int64 with the right 64 bits, so >> 32 and a mask give the top.
        product0, product1 = c0 * _PHILOX_M0, c2 * _PHILOX_M1
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
    return c0, c1, c2, c3
