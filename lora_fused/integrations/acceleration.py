"""Acceleration: what an accelerated layer of another library remembers."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field

import torch

from lora_fused.integrations.guards import NOTHING_TO_FUSE, Options


@dataclass
class Acceleration:
    """What an accelerated layer carries besides its library's own attributes.

    stock counts the calls left to the library by reason; announced holds the reasons the user was
    told. library is its name, as people write it.
    """

    options: Options = field(default_factory=Options)
    fused: int = 0
    stock: Counter[str] = field(default_factory=Counter)
    announced: set[str] = field(default_factory=set)
    library: str = "PEFT"

    def count_stock(self, reason: str) -> None:
        """Count a call left to the library; warn at the first of a reason that nobody announced."""
        if torch.compiler.is_compiling():
            return
        self.stock[reason] += 1
        if reason not in NOTHING_TO_FUSE and reason not in self.announced:
            self.announced.add(reason)
            warnings.warn(
                f"lora_fused: a {self.library} layer runs on {self.library}'s own forward: "
                f"{reason}. lora_fused.integrations.{self.library.lower()}.explain(model) lists "
                "all such layers.",
                stacklevel=4,
            )

    def count_fused(self) -> None:
        if not torch.compiler.is_compiling():
            self.fused += 1
