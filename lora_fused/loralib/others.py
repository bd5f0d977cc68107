"""The layers of loralib that are not linear: embeddings and convolutions, in plain torch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_fused.loralib.linear import LoRALayer
from lora_fused.merged import fingerprint


class _Backup(NamedTuple):
    """The weight before a merge, what was added to it, and what the sum looked like."""

    weight: Tensor
    delta: Tensor
    fingerprint: int


class _MergedInPlace(LoRALayer):
    """Merging for the layers that are not linear: into the weight itself, with a backup."""

    _backup: _Backup | None = None

    def _weight(self) -> Tensor:
        raise NotImplementedError

    def _delta(self) -> Tensor:
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether the weight holds the sum of base and adapter."""
        return self._backup is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter into the weight. Nothing if it is merged already or r = 0."""
        if self.merged or self.r == 0:
            return
        weight, delta = self._weight(), self._delta()
        original = weight.detach().clone()
        weight.add_(delta)
        self._backup = _Backup(original, delta, fingerprint(weight.flatten(1)))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original values back; if somebody wrote the weight, subtract the adapter."""
        backup, self._backup = self._backup, None
        if backup is None:
            return
        weight = self._weight()
        if fingerprint(weight.flatten(1)) == backup.fingerprint:
            weight.copy_(backup.weight)
        else:
            weight.sub_(backup.delta.to(weight))

    def _merge_by_mode(self, training: bool) -> None:
        if self.merge_weights:
            if training:
                self.unmerge()
            else:
                self.merge()


class Embedding(nn.Embedding, _MergedInPlace):
    """loralib.Embedding: lora_A [r, num_embeddings] starts at zero, lora_B [dim, r] normal."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, **kwargs)
        self.r, self.lora_alpha, self.merge_weights = r, lora_alpha, merge_weights
        if r > 0:
            self.scaling = lora_alpha / r
            self.lora_A = nn.Parameter(self.weight.new_zeros(r, num_embeddings))
            self.lora_B = nn.Parameter(nn.init.normal_(self.weight.new_empty(embedding_dim, r)))
            self.weight.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Initialise everything, the adapter as loralib does."""
        super().reset_parameters()
        if hasattr(self, "lora_A"):
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)

    def train(self, mode: bool = True) -> Embedding:
        super().train(mode)
        self._merge_by_mode(mode)
        return self

    def _weight(self) -> Tensor:
        return self.weight

    def _delta(self) -> Tensor:
        return (self.lora_B @ self.lora_A).t() * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        if self.r == 0 or self.merged:
            return result
        options = (self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        after_A = F.embedding(x, self.lora_A.t(), self.padding_idx, *options)
        return torch.add(result, after_A @ self.lora_B.t(), alpha=self.scaling)


class ConvLoRA(nn.Module, _MergedInPlace):
    """loralib.ConvLoRA: a convolution `conv` plus scaling · (lora_B lora_A) as its kernel's change.

    lora_A [r · k, in · k] and lora_B [out / groups · k^(d−1), r · k] for a kernel of size k in d
    dimensions. As in loralib, lora_dropout is accepted and has no effect.
    """

    def __init__(
        self,
        conv_module: type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d],
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if not isinstance(kernel_size, int):
            raise TypeError(f"ConvLoRA: kernel_size is {kernel_size!r}, expected an int.")
        self.conv = conv_module(in_channels, out_channels, kernel_size, **kwargs)
        self.r, self.lora_alpha, self.merge_weights = r, lora_alpha, merge_weights
        if r > 0:
            weight, k = self.conv.weight, kernel_size
            self.scaling = lora_alpha / r
            rows = out_channels // self.conv.groups * k ** (weight.dim() - 3)
            self.lora_A = nn.Parameter(weight.new_empty(r * k, in_channels * k))
            self.lora_B = nn.Parameter(weight.new_zeros(rows, r * k))
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            weight.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Initialise everything, the adapter as loralib does."""
        self.conv.reset_parameters()
        if self.r > 0:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def train(self, mode: bool = True) -> ConvLoRA:
        super().train(mode)
        self._merge_by_mode(mode)
        return self

    def _weight(self) -> Tensor:
        return self.conv.weight

    def _delta(self) -> Tensor:
        return (self.lora_B @ self.lora_A).view(self.conv.weight.shape) * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        if self.r == 0 or self.merged:
            return self.conv(x)
        conv: Any = self.conv
        return conv._conv_forward(x, conv.weight + self._delta(), conv.bias)


class Conv1d(ConvLoRA):
    """loralib.Conv1d."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv1d, *args, **kwargs)


class Conv2d(ConvLoRA):
    """loralib.Conv2d."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv2d, *args, **kwargs)


class Conv3d(ConvLoRA):
    """loralib.Conv3d."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv3d, *args, **kwargs)
