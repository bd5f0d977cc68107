"""torchtune's LoRALinear, computed by lora_fused: accelerate, restore and explain of a model.

    model = lora_llama3_8b(["q_proj", "v_proj"], lora_rank=16, lora_alpha=32, lora_dropout=0.05)
    lora_fused.integrations.torchtune.accelerate(model)   # prints what is fused and what is not

Only the class of each exact torchtune.modules.peft.LoRALinear changes: parameters, names, hooks,
adapter_params and checkpoints are torchtune's. DoRALinear, QATLoRALinear and quantised bases stay
with torchtune.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules.peft import LoRALinear

from lora_fused.dispatch import resolve_backend, route_for
from lora_fused.explain import LayerReport, needs_of
from lora_fused.functional import call_layer
from lora_fused.group import LoRAWeights
from lora_fused.integrations import grouping
from lora_fused.integrations.acceleration import Acceleration
from lora_fused.integrations.group_window import Member, call_in_group, facts_of
from lora_fused.integrations.guards import (
    DISABLED,
    Options,
    drops_now,
    has_global_hooks,
    torch_mask,
    type_name,
    why_no_torch_mask,
    why_not_bypassed,
    why_not_dropout,
    why_not_input,
    why_not_plain,
)
from lora_fused.integrations.report import LayerStatus, Report
from lora_fused.linear import parameter

__all__ = ["FusedLoRALinear", "accelerate", "explain", "restore"]


def accelerate(
    model: nn.Module,
    *,
    backend: str = "auto",
    match_torch_rng: bool = False,
    group: str = "auto",
    verbose: bool = True,
) -> Report:
    """Compute the LoRALinear layers of a torchtune model by lora_fused, in place.

    The arguments mean what they mean for lora_fused.integrations.peft.accelerate. Adapters are
    expected in the dtype of the base weight, as torchtune keeps them, or cast by autocast. Returns
    a Report. Raises ValueError for an unknown backend or group.
    """
    resolve_backend(backend)
    grouping.check(group)
    options = Options(backend, match_torch_rng)
    for module in model.modules():
        if type(module) is LoRALinear and "forward" not in module.__dict__:
            _swap(module, options)
        elif type(module) is FusedLoRALinear:
            module._lora_fused.options = options
    grouping.attach_all(model, group)
    report = explain(model)
    for module in model.modules():
        if type(module) is FusedLoRALinear:
            module._lora_fused.announced.update(report.not_fused.values())
    if verbose:
        print(report, file=sys.stderr)
    return report


def restore(model: nn.Module) -> None:
    """Give every accelerated layer of a model its own class back. Nothing else had changed."""
    for module in model.modules():
        grouping.detach(module)
        if type(module) is FusedLoRALinear:
            module.__class__ = LoRALinear
            del module._lora_fused


def explain(model: nn.Module) -> Report:
    """What is fused in a model now and what is not, with the calls counted so far."""
    layers = (
        _status(name, module)
        for name, module in model.named_modules()
        if callable(getattr(module, "adapter_params", None))
    )
    return Report(tuple(layers), groups=grouping.statuses(model), library="torchtune")


def _swap(layer: Any, options: Options) -> None:
    layer.__class__ = FusedLoRALinear
    layer._lora_fused = Acceleration(options, library="torchtune")


class FusedLoRALinear(LoRALinear):
    """torchtune's LoRALinear computed by lora_linear where that is the same function.

    Made by accelerate, never by hand. A call that is not plain LoRA on plain tensors goes to
    torchtune's forward and is counted with its reason.
    """

    _lora_fused: Acceleration

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out_dim] of x [..., in_dim]."""
        reason = _why_stock(self, x)
        if reason is not None:
            self._lora_fused.count_stock(reason)
            y: Tensor = super().forward(x)
            return y
        self._lora_fused.count_fused()
        grouped = None if torch.compiler.is_compiling() else call_in_group(self, x)
        return self._fused_call(x) if grouped is None else grouped

    def _fused_call(self, x: Tensor) -> Tensor:
        options, p, keep = self._lora_fused.options, 0.0, None
        weight, lora_a, lora_b, bias = _params(self)
        if drops_now(self.dropout):
            p = self.dropout.p
            if options.match_torch_rng:
                keep = torch_mask(x, p, x.dtype)
        scaling = float(self.alpha / self.rank)
        return call_layer(
            x, weight, lora_a, lora_b, bias, scaling, p, None, options.backend, keep=keep
        )

    @property
    def in_features(self) -> int:
        return int(self.in_dim)

    def as_member(self, x: Tensor) -> Member | str:
        """This layer, called on x, as a member of a group; why not, in words."""
        reason = _why_stock(self, x)
        if reason is not None:
            return reason
        if drops_now(self.dropout):
            return "each layer draws its own dropout mask"
        weight, lora_a, lora_b, bias = params = _params(self)
        scaling = float(self.alpha / self.rank)
        weights = LoRAWeights(weight, lora_a, lora_b, scaling, bias)
        return Member(weights, self._lora_fused.options.backend, (), facts_of(params, scaling))

    def explain_call(self, name: str, x: Tensor) -> LayerReport:
        """What lora_fused.explain reports of this layer."""
        reason = _why_stock(self, x)
        if reason is not None:
            own = "torchtune's own forward"
            return LayerReport(name, "torchtune.LoRALinear", None, None, (reason,), own)
        params = _params(self)
        needs = needs_of(dict(zip(("weight", "lora_A", "lora_B", "bias"), params, strict=True)))
        backend = self._lora_fused.options.backend
        route = route_for(x, *params, drops_now(self.dropout), backend, needs=needs)
        config = route.config
        return LayerReport(name, "torchtune.LoRALinear", route.problem, config, config.notes)


def _params(layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """weight, lora_A, lora_B and bias."""
    a, b = layer.lora_a, layer.lora_b
    return (
        parameter(layer, "weight"), parameter(a, "weight"), parameter(b, "weight"),
        parameter(layer, "bias"),
    )  # fmt: skip


def _why_stock(layer: Any, x: Any) -> str | None:
    """Why a call must go to torchtune's forward, in words; None if it may be fused."""
    if layer.disabled:
        return DISABLED
    reason = _why_stock_layer(layer)
    if reason is not None:
        return reason
    weight, lora_a, lora_b, _ = _params(layer)
    reason = why_not_input(x, weight, layer.in_dim)
    if reason is not None:
        return reason
    if lora_a.device != x.device or lora_b.device != x.device:
        return "the adapter is on another device than the input"
    autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)
    if not autocast and (lora_a.dtype != x.dtype or lora_b.dtype != x.dtype):
        return "the adapter has another dtype than the input"
    if layer._lora_fused.options.match_torch_rng and drops_now(layer.dropout):
        return why_no_torch_mask(x)
    return None


def _why_stock_layer(layer: Any) -> str | None:
    """Why a layer must be left to torchtune, whatever its input is."""
    if layer._quantize_base:
        return "the base weight is quantised"
    if has_global_hooks():
        return "global module hooks are registered"
    bias = parameter(layer, "bias")
    reason = why_not_plain(parameter(layer, "weight"), "the base weight") or (
        None if bias is None else why_not_plain(bias, "the base bias")
    )
    for name in ("lora_a", "lora_b"):
        module = getattr(layer, name)
        if type(module) is not nn.Linear:
            return f"{name} is a {type_name(module)}, not exactly nn.Linear"
        if parameter(module, "bias") is not None:
            return f"{name} has a bias"
        reason = reason or why_not_bypassed(module, name)
        reason = reason or why_not_plain(parameter(module, "weight"), name)
    return reason or why_not_dropout(layer.dropout)


def _status(name: str, module: Any) -> LayerStatus:
    kind = f"torchtune.{type(module).__name__}"
    if type(module) is FusedLoRALinear:
        state = module._lora_fused
        reason = DISABLED if module.disabled else _why_stock_layer(module)
        return LayerStatus(name, "torchtune.LoRALinear", reason, state.fused, state.stock.copy())
    if type(module) is not LoRALinear:
        return LayerStatus(name, kind, "not exactly LoRALinear")
    if "forward" in module.__dict__:
        return LayerStatus(name, kind, "its forward is patched on the instance")
    return LayerStatus(name, kind, "accelerate(model) has not been called")
