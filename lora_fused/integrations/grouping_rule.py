"""When is a group of sibling layers no slower than its members alone? The measurements behind it.

Time of the group relative to the members one by one, medians of alternating pairs, r = 16, native
kernels, torch 2.13, 1 thread, AMD EPYC VM; bf16 / fp32, forward and forward + backward:

    K      members' N          M = 512: F      F + B          M = 2048: F     F + B
    2048   2048, 512, 512      0.99 / 1.00     0.98 / 0.98    0.98 / 0.99     0.97 / 0.94
    3584   3584, 512, 512      1.00 / 0.99     0.99 / 1.00    0.99 / –        0.93 / –
    768    768, 768, 768       1.01 / 1.01     0.96 / 0.99    1.00 / 0.99     0.97 / 0.99
    2048   2048, 2048, 2048    0.98 / 0.99     1.00 / 0.99    0.99 / 0.99     1.00 / 0.94
    1024   1024, 256, 256      1.01 / 1.01     0.99 / 0.98    1.00 / 0.90     0.96 / 0.90
    2048   8192, 8192          1.01 / 1.00     1.02 / 0.99

With fewer tokens the group loses: 1.00-1.10 at 128, up to 1.5 at 1, where Python decides. Dropout
draws a mask per member, so that little is left to share: 1.00-1.02. Other devices have not been
measured; there a group launches fewer kernels and reads x less often, and does nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_fused.group import LoRAWeights

FEWEST_TOKENS = 512
FEWEST_TOKENS_FORWARD = 2048
"""Without gradients, where less is shared."""
_TOO_FEW = {
    fewest: f"fewer than {fewest} tokens: a group was not measured faster"
    for fewest in (FEWEST_TOKENS, FEWEST_TOKENS_FORWARD)
}


def why_too_few_tokens(x: Tensor) -> str | None:
    """Why any group on this input would be slower than its members; asked first, it is cheap."""
    fewest = FEWEST_TOKENS if torch.is_grad_enabled() else FEWEST_TOKENS_FORWARD
    return _TOO_FEW[fewest] if x.numel() < fewest * x.shape[-1] else None


def why_it_does_not_pay(x: Tensor, members: Sequence[LoRAWeights]) -> str | None:
    """Why these members are better computed alone; None if the group was not measured slower."""
    mean_width = sum(member.weight.shape[0] for member in members) / len(members)
    if x.device.type == "cpu" and mean_width > x.shape[-1]:
        return "layers wider than their input: a group was not measured faster on CPUs"
    return None
