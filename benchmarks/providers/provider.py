"""What a provider is, and what it builds from the tensors of a case."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.tensors import CaseTensors
from lora_fused.backends import cpu

Call = Callable[[Tensor], Tensor]


class NotServed(Exception):
    """The provider is there, but cannot serve this case. The message says why, in one sentence."""


@dataclass(frozen=True)
class Built:
    """One provider's layer on one case's tensors. `adapters` is empty where none is trained."""

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
    """One contender. `layer` makes its call from a case's tensors and the dropout probability.

    needs: the package it takes. lacks: for a device, what else is missing there, or None.
    lora: it computes the LoRA branch at run time and trains it.
    merged: it computes the LoRA layer from one weight that holds the adapter; trains nothing.
    ours: its dropout mask can be replayed, and so be checked.
    native: it takes lora_fused's native CPU kernels.
    adapter_dtype: of lora_A and lora_B; None: that of the case.
    mixed: its adapters may have another dtype than x and the weight.
    compiled: its first call of a size compiles for it.
    """

    name: str
    label: str
    layer: Callable[[CaseTensors, float], Call]
    needs: str | None = None
    lora: bool = True
    ours: bool = False
    native: bool = False
    merged: bool = False
    adapter_dtype: torch.dtype | None = None
    mixed: bool = True
    compiled: bool = False
    lacks: Callable[[str], str | None] = lambda device: None

    def missing(self, device: str = "cpu") -> str | None:
        """Why the provider cannot run, or None."""
        if self.native and device != "cpu":
            return "it is for CPUs"
        if self.needs and find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        if self.native and not cpu.isa():
            return "lora_fused's native kernels are not built or cannot run on this CPU"
        return self.lacks(device)

    def build(self, t: CaseTensors, dropout: float) -> Built:
        """The layer on parameters of its own: a shared weight would be in the cache for all but
        those that keep a form of their own, such as the packed one."""
        own = t.copy_of_parameters()
        if self.adapter_dtype is not None:
            if t.x.dtype == self.adapter_dtype:
                raise NotServed(f"the whole case is {self.adapter_dtype}, see the provider without")
            a, b = (nn.Parameter(p.detach().to(self.adapter_dtype)) for p in (own.a, own.b))
            own = replace(own, a=a, b=b)
        return Built(self.layer(own, dropout), t.x, t.dy, (own.a, own.b) if self.lora else ())


def needs_cuda(device: str) -> str | None:
    """For `lacks`: a provider whose kernels are for CUDA alone."""
    return None if device == "cuda" else "its kernels need CUDA"
