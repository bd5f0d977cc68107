"""What every LoRA checkpoint says, without any library's names: Adapter and LayerAdapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LayerAdapter:
    """The adapter of one layer: its output gets scaling · (x lora_Aᵀ) lora_Bᵀ more.

    lora_A: [r, in] of a linear layer, [r, in, k, k] of a convolution, [r, entries] of an embedding.
    lora_B: [out, r] or [out, r, 1, 1]. alpha: lora_alpha; scaling is alpha / r, or alpha / √r with
    use_rslora. lora_bias: [out], scaled like the rest. magnitude: DoRA's, [out]. Both may be None.

    Raises ValueError if the two do not have one rank.
    """

    lora_A: Tensor
    lora_B: Tensor
    alpha: float
    use_rslora: bool = False
    lora_bias: Tensor | None = None
    magnitude: Tensor | None = None
    embedding: bool = False

    def __post_init__(self) -> None:
        a, b = self.lora_A.shape, self.lora_B.shape
        if len(a) < 2 or len(b) < 2 or a[0] != b[1]:
            raise ValueError(
                f"LayerAdapter: lora_A has shape {list(a)} and lora_B {list(b)}, "
                "expected [r, in] and [out, r]."
            )

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def scaling(self) -> float:
        if self.rank == 0:
            return 0.0
        return self.alpha / math.sqrt(self.rank) if self.use_rslora else self.alpha / self.rank

    @property
    def plain_alpha(self) -> float:
        """lora_alpha for a library that divides by r: the same number unless use_rslora."""
        return self.scaling * self.rank if self.use_rslora else self.alpha

    def refuse(self, name: str, library: str, *fields: str) -> None:
        """Raises ValueError for a field that another library cannot express."""
        for what in fields:
            value = getattr(self, what)
            if value is not None and value is not False:
                raise ValueError(f"{name}: the adapter has {what}, which {library} cannot express.")


@dataclass(frozen=True)
class Adapter:
    """The adapters of a model, by the names of its modules (of the base model, without prefixes).

    others holds the tensors of a checkpoint that belong to no LoRA layer (trained biases,
    modules_to_save), by their full names in the base model. peft_config is the adapter_config.json
    it came with, if it came from PEFT.
    """

    layers: dict[str, LayerAdapter]
    others: dict[str, Tensor] = field(default_factory=dict)
    peft_config: dict[str, Any] = field(default_factory=dict)

    def renamed(self, rename: Callable[[str], str]) -> Adapter:
        """The same with other module names. Raises ValueError where two would become one."""
        names = {name: rename(name) for name in (*self.layers, *self.others)}
        if len(set(names.values())) < len(names):
            raise ValueError("renamed: two layers would get one name.")
        layers = {names[name]: layer for name, layer in self.layers.items()}
        return replace(
            self, layers=layers, others={names[name]: t for name, t in self.others.items()}
        )

    def one(self, what: str, library: str) -> Any:
        """The rank, alpha, … that all layers have. Raises ValueError if they differ."""
        values: dict[Any, str] = {}
        for name, layer in self.layers.items():
            values.setdefault(getattr(layer, what), name)
        if len(values) > 1:
            several = ", ".join(f"{value} ({name})" for value, name in list(values.items())[:2])
            raise ValueError(
                f"{library} has one {what} for all layers; this adapter has {several}."
            )
        return next(iter(values), None)
