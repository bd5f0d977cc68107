"""A parent with three sibling layers whose calls a test can script, for the tests of grouping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lora_fused.integrations.peft import accelerate, explain


def in_order(parent: Any, x: Tensor) -> list[Tensor]:
    return [parent.q(x), parent.k(x), parent.v(x)]


class Attention(nn.Module):
    """Three layers on one input; script says how they are called."""

    script: Callable[[Any, Tensor], list[Tensor]] = staticmethod(in_order)

    def __init__(self, width: int, narrow: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, narrow)
        self.v = nn.Linear(width, narrow)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.script(self, x)


class Model(nn.Module):
    def __init__(self, width: int, narrow: int) -> None:
        super().__init__()
        self.parent = Attention(width, narrow)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.parent(x)


def attention(width: int = 12, narrow: int = 8, **changes: Any) -> Any:
    """A PEFT model around one Attention."""
    settings = {"r": 3, "target_modules": ["q", "k", "v"], "init_lora_weights": False, **changes}
    return get_peft_model(Model(width, narrow), LoraConfig(**settings))


def parts_of(model: Any) -> Any:
    """An object with the parent and its layers q, k and v."""
    parent = model.base_model.model.parent

    class Parts:
        q, k, v = parent.q, parent.k, parent.v

    Parts.parent = parent  # type: ignore[attr-defined]
    return Parts


def learnt(model: Any) -> None:
    """Accelerate a model and let it observe one pass."""
    accelerate(model, verbose=False, group="always")
    model(torch.randn(2, parts_of(model).q.in_features))
    (status,) = explain(model).groups
    assert status.groups == (("q", "k", "v"),) and status.calls == 0
