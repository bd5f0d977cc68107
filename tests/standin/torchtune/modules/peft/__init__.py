"""LoRALinear with the parameters, names, flags and arithmetic that torchtune 0.6 documents.

torchtune 0.6.1, its last release, needs a torchao that PEFT refuses, so the two cannot be installed
together; `make test-torchtune` runs the same tests on the real one.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F


class LoRALinear(nn.Module):
    """y = x Wᵀ + bias + alpha / rank · lora_b(lora_a(dropout(x)))."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        use_bias: bool = False,
        quantize_base: bool = False,
    ) -> None:
        super().__init__()
        self.in_dim, self.out_dim, self.rank, self.alpha = in_dim, out_dim, rank, alpha
        self.use_bias, self._quantize_base = use_bias, quantize_base
        self.disabled = self.merged = False
        linear = nn.Linear(in_dim, out_dim, bias=use_bias)
        self.register_parameter("weight", linear.weight)
        self.register_parameter("bias", linear.bias)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.lora_a = nn.Linear(in_dim, rank, bias=False)
        self.lora_b = nn.Linear(rank, out_dim, bias=False)
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b.weight)

    def adapter_params(self) -> list[str]:
        return ["lora_a.weight", "lora_b.weight"]

    def forward(self, x: Tensor) -> Tensor:
        base = F.linear(x, self.weight, self.bias)
        if self.disabled:
            return base
        return base + self.alpha / self.rank * self.lora_b(self.lora_a(self.dropout(x)))


class DoRALinear(LoRALinear):
    """A layer that must be left alone; only its class matters here."""
