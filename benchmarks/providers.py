"""The contenders: one small adapter each, all on the same values.

A provider that is not installed stays in the list and says so. `build` returns a `Built`, whose
`forward` runs without autograd and whose `forward_backward` computes dx and, for LoRA, da and db.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tensors import CaseTensors
from lora_fused import FusedLoRALinear
from lora_fused.backends import cpu


@dataclass(frozen=True)
class Built:
    """One provider's layer on one case's tensors. `adapters` is empty for the frozen layer."""

    call: Callable[[Tensor], Tensor]
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
    layer: Callable[[CaseTensors, float], Callable[[Tensor], Tensor]]
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


def _frozen_linear(t: CaseTensors) -> nn.Linear:
    n, k = t.w.shape
    linear = nn.Linear(k, n, bias=t.bias is not None, device="meta")
    linear.weight = nn.Parameter(t.w, requires_grad=False)
    if t.bias is not None:
        linear.bias = nn.Parameter(t.bias, requires_grad=False)
    return linear


def _frozen(t: CaseTensors, dropout: float) -> Callable[[Tensor], Tensor]:
    return _frozen_linear(t)


def _naive(t: CaseTensors, dropout: float) -> Callable[[Tensor], Tensor]:
    """The formula as it is written, elementwise passes over [M, N] included."""

    def call(x: Tensor) -> Tensor:
        rank = F.dropout(x, dropout) @ t.a.to(x.dtype).t() @ t.b.to(x.dtype).t()
        return F.linear(x, t.w, t.bias) + t.scaling * rank

    return call


def _smart(t: CaseTensors, dropout: float) -> Callable[[Tensor], Tensor]:
    """The best that plain torch offers: the last product accumulates into the base output."""

    def call(x: Tensor) -> Tensor:
        s = F.linear(F.dropout(x, dropout), t.a.to(x.dtype))
        return F.linear(x, t.w, t.bias).addmm_(s, t.b.to(x.dtype).t(), alpha=t.scaling)

    return call


def _peft(t: CaseTensors, dropout: float) -> Callable[[Tensor], Tensor]:
    from peft import LoraConfig, inject_adapter_in_model

    rank = t.a.shape[0]
    config = LoraConfig(
        r=rank,
        lora_alpha=int(t.scaling * rank),
        lora_dropout=dropout,
        target_modules=["layer"],
        fan_in_fan_out=t.fan_in_fan_out,
    )
    model = inject_adapter_in_model(config, nn.ModuleDict({"layer": _peft_base(t)}))
    layer = model["layer"]  # type: ignore[index]
    layer.lora_A["default"].weight = t.a
    layer.lora_B["default"].weight = t.b
    return layer.train()


def _peft_base(t: CaseTensors) -> nn.Module:
    if not t.fan_in_fan_out:
        return _frozen_linear(t)
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(t.w.shape[0], t.w.shape[1])
    conv.weight = nn.Parameter(t.stored_weight, requires_grad=False)
    if t.bias is None:
        raise ValueError("transformers' Conv1D always has a bias")
    conv.bias = nn.Parameter(t.bias, requires_grad=False)
    return conv


def _loralib(t: CaseTensors, dropout: float) -> Callable[[Tensor], Tensor]:
    import loralib  # type: ignore[import-untyped]

    return _filled(loralib.Linear, t, dropout)


def _ours(t: CaseTensors, dropout: float) -> Callable[[Tensor], Tensor]:
    return _filled(FusedLoRALinear, t, dropout)


def _ours_prepacked(t: CaseTensors, dropout: float) -> Callable[[Tensor], Tensor]:
    layer = _filled(FusedLoRALinear, t, dropout)
    layer.prepack()
    return layer


def _filled(cls: Callable[..., Any], t: CaseTensors, dropout: float) -> Any:
    """A loralib.Linear or FusedLoRALinear (one constructor, same parameters) on these tensors."""
    (n, k), rank = t.w.shape, t.a.shape[0]
    layer = cls(
        k,
        n,
        r=rank,
        lora_alpha=int(t.scaling * rank),
        lora_dropout=dropout,
        fan_in_fan_out=t.fan_in_fan_out,
        merge_weights=False,
        bias=t.bias is not None,
        device="meta",
    )
    layer.weight = nn.Parameter(t.stored_weight, requires_grad=False)
    if t.bias is not None:
        layer.bias = nn.Parameter(t.bias, requires_grad=False)
    layer.lora_A, layer.lora_B = t.a, t.b
    return layer


FROZEN, NAIVE, SMART, PEFT = "frozen", "naive", "smart", "peft"
LORALIB, OURS, PREPACKED = "loralib", "ours", "ours-prepacked"
PROVIDERS = (
    Provider(FROZEN, "frozen nn.Linear", _frozen, lora=False),
    Provider(NAIVE, "naive torch", _naive),
    Provider(SMART, "smart torch", _smart),
    Provider(PEFT, "PEFT", _peft, needs="peft"),
    Provider(LORALIB, "loralib", _loralib, needs="loralib"),
    Provider(OURS, "lora_fused", _ours, ours=True),
    Provider(PREPACKED, "lora_fused prepacked", _ours_prepacked, ours=True, native=True),
)
