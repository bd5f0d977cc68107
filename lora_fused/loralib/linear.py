"""The linear layers of loralib on FusedLoRALinear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_fused.linear import FusedLoRALinear


class LoRALayer:
    """The common base of all layers here. merged: whether the weight holds base plus adapter."""

    r: int
    merged: Any
    merge_weights: bool


class Linear(FusedLoRALinear, LoRALayer):
    """loralib.Linear, computed by lora_linear. Merged by eval(), un-merged by train()."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            in_features, out_features, r, lora_alpha, lora_dropout,
            fan_in_fan_out=fan_in_fan_out, merge_weights=merge_weights, **kwargs,
        )  # fmt: skip


class MergedLinear(Linear):
    """loralib.MergedLinear: one linear layer of len(enable_lora) slices, some with an adapter.

    lora_A [r · enabled, in] and lora_B [out / slices · enabled, r], stacked as in loralib. Computed
    as one LoRA layer whose lora_B is block-diagonal: x is read once, and one dropout mask serves
    all slices. With no slice enabled it is a plain linear layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        if len(enable_lora) == 0 or out_features % len(enable_lora) != 0:
            raise ValueError(
                f"MergedLinear: enable_lora has {len(enable_lora)} slices, "
                f"expected a divisor of out_features, {out_features}."
            )
        self._enabled = tuple(bool(enabled) for enabled in enable_lora)
        super().__init__(
            in_features, out_features, r if any(enable_lora) else 0, lora_alpha, lora_dropout,
            fan_in_fan_out, merge_weights, **kwargs,
        )  # fmt: skip

    @property
    def enable_lora(self) -> list[bool]:
        """Which slices have an adapter."""
        return list(self._enabled)

    def _add_adapter(self) -> None:
        if self.r == 0:
            return
        self.weight.requires_grad_(False)
        empty, enabled = self.weight.new_empty, sum(self._enabled)
        self.lora_A = nn.Parameter(empty(self.r * enabled, self.in_features))
        slice_size = self.out_features // len(self._enabled)
        self.lora_B = nn.Parameter(empty(slice_size * enabled, self.r))
        self.reset_lora_parameters()

    def adapter(self) -> tuple[Tensor, Tensor]:
        """lora_A, and lora_B as the block-diagonal [out, r · enabled] that it stands for."""
        blocks = iter(self.lora_B.chunk(sum(self._enabled)))
        nothing = self.lora_B.new_empty(self.out_features // len(self._enabled), 0)
        rows = [next(blocks) if enabled else nothing for enabled in self._enabled]
        return self.lora_A, torch.block_diag(*rows)
