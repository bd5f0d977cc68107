"""Adding an adapter into its base weight, and knowing later whether anybody wrote the sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_fused.functional import is_distributed
from lora_fused.reference import philox_4x32

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ELEMENTS_PER_CHUNK = 1 << 20


class Merged(NamedTuple):
    """What unmerge needs: the original Parameter, and what was merged into its stand-in."""

    base: nn.Parameter
    delta_A: Tensor
    delta_B: Tensor
    scaling: float
    fingerprint: int


@torch.no_grad()
def add_delta(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, fan_in_fan_out: bool
) -> Tensor:
    """weight + scaling · lora_B lora_A (transposed if fan_in_fan_out), in fp32, rounded once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        delta = lora_B.to(wide) @ lora_A.to(wide)
        return torch.add(weight.to(wide), delta.t() if fan_in_fan_out else delta, alpha=scaling).to(
            weight.dtype
        )


@torch.no_grad()
def fingerprint(weight: Tensor) -> int:
    """A 64-bit linear hash of the values and their places: others collide by chance only.

    Σ_ij p_i q_j w_ij mod 2⁶⁴ over the bits w_ij of the elements of a row, or of its 8-byte words
    where it has no others, with odd pseudo-random p and q. 0 on the meta device. Of a DTensor this
    rank's part is hashed: it tells whether that was written.
    """
    if is_distributed(weight):
        weight = weight.to_local()  # type: ignore[attr-defined]
    if weight.is_meta:
        return 0
    rows, cols = weight.shape
    row_bytes = cols * weight.element_size()
    kind = torch.int64 if row_bytes % 8 == 0 else _BITS[weight.element_size()]
    row_factors, col_factors = (
        _odd_factors(key, n, weight.device)
        for key, n in ((1, rows), (2, row_bytes // kind.itemsize))
    )
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    step = max(1, _ELEMENTS_PER_CHUNK // max(cols, 1))
    for first in range(0, rows, step):
        chunk = weight[first : first + step].contiguous()
        if chunk.storage_offset() * chunk.element_size() % kind.itemsize:
            chunk = chunk.clone()
        bits = chunk.view(kind).to(torch.int64)
        total += ((bits * col_factors).sum(1) * row_factors[first : first + step]).sum()
    return int(total.item())


def _odd_factors(key: int, count: int, device: torch.device) -> Tensor:
    low, high, _, _ = philox_4x32(key, torch.arange(count, dtype=torch.int64, device=device))
    return low | (high << 32) | 1
