"""What a provider is, and what it builds from the tensors of a case."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.tensors import CaseTensors
from lora_fused.backends import cpu

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Built:
    """One provider's layer on one case's tensors. `adapters` is empty for the frozen layer."""

    call: Call
    x: Tensor
    dy: Tensor
    adapters: tuple[Tensor, ...]

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.call(self.x)

    def forward_backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.call(self.x), (self.x, *self.adapters), self.dy)


@dataclass(frozen=True)
class Provider:
    """`needs`: the package it takes. `native`: it takes lora_fused's native kernels.

    `ours`: its dropout mask can be replayed, and so be checked.
    """

    name: str
    label: str
    layer: Callable[[CaseTensors, float], Call]
    needs: str | None = None
    lora: bool = True
    ours: bool = False
    native: bool = False

    def missing(self, device: str = "cpu") -> str | None:
        """Why the provider cannot run, or None."""
        if self.native and device != "cpu":
            return "it is for CPUs"
        if self.needs and find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        if self.native and not cpu.isa():
            return "lora_fused's native kernels are not built or cannot run on this CPU"
        return None

    def build(self, t: CaseTensors, dropout: float) -> Built:
        """The layer on parameters of its own: a shared weight would be in the cache for all but
        those that keep a form of their own, such as the packed one."""
        own = t.copy_of_parameters()
        return Built(self.layer(own, dropout), t.x, t.dy, (own.a, own.b) if self.lora else ())
