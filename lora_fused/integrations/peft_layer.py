"""FusedLinear: peft's lora.Linear with another forward, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor

from lora_fused.dispatch import route_for
from lora_fused.explain import LayerReport, gpu_lines, needs_of, of_this_rank
from lora_fused.group import LoRAWeights
from lora_fused.integrations.acceleration import Acceleration
from lora_fused.integrations.group_window import Member, call_in_group, facts_of
from lora_fused.integrations.peft_call import (
    adapters_of_call,
    fused_call,
    mixed_batch_call,
    operands,
    why_stock,
)
from lora_fused.integrations.peft_guards import child, drops
from lora_fused.linear import parameter


class FusedLinear(Linear):
    """peft.tuners.lora.layer.Linear computed by lora_linear where that is the same function.

    Made by lora_fused.integrations.peft.accelerate or register, never by hand. Parameters, names,
    hooks, merging and saving are those of PEFT's class. A call that is not plain LoRA on plain
    tensors goes to PEFT's forward and is counted with its reason.
    """

    _lora_fused: Acceleration

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state = self._lora_fused
        adapters = adapters_of_call(self, x, args, kwargs)
        reason = why_stock(self, x, args, kwargs, adapters, state.options)
        if reason is not None:
            state.count_stock(reason)
            return super().forward(x, *args, **kwargs)
        state.count_fused()
        if kwargs and kwargs.get("adapter_names") is not None:
            return mixed_batch_call(self, x, kwargs["adapter_names"], state.options)
        y = None if torch.compiler.is_compiling() else call_in_group(self, x)
        return fused_call(self, x, adapters, state.options) if y is None else y

    def as_member(self, x: Tensor) -> Member | str:
        """This layer, called on x, as a member of a group; why not, in words."""
        layer: Any = self
        adapters = adapters_of_call(self, x, (), {})
        reason = why_stock(self, x, (), {}, adapters, self._lora_fused.options)
        if reason is not None:
            return reason
        if any(drops(self, name) for name in adapters):
            return "each layer draws its own dropout mask"
        weight, lora_A, lora_B, bias, scaling = operands(layer, adapters)
        parts = [self.base_layer, *(child(self, part, name) for name in adapters
                                    for part in ("lora_A", "lora_B"))]  # fmt: skip
        tensors = [parameter(part, name) for part in parts for name in ("weight", "bias")]
        return Member(
            LoRAWeights(weight, lora_A, lora_B, scaling, bias),
            self._lora_fused.options.backend,
            tuple(adapters),
            facts_of(tensors, *(float(layer.scaling[name]) for name in adapters)),
        )

    def explain_call(self, name: str, x: Tensor) -> LayerReport:
        """What lora_fused.explain reports of this layer."""
        adapters = adapters_of_call(self, x, (), {})
        reason = why_stock(self, x, (), {}, adapters, self._lora_fused.options)
        if reason is not None:
            return LayerReport(name, "lora.Linear", None, None, (reason,), "PEFT's own forward")
        layer: Any = self
        weight, lora_A, lora_B, bias, _ = operands(layer, adapters)
        needs = needs_of({"weight": weight, "lora_A": lora_A, "lora_B": lora_B, "bias": bias})
        dropout = any(drops(layer, adapter) for adapter in adapters)
        backend = self._lora_fused.options.backend
        parts = of_this_rank(x, weight, lora_A, lora_B, bias)
        route = route_for(*parts, dropout, backend, needs=needs)
        why = route.config.notes + gpu_lines(route.problem, route.config, x.device, backend)
        return LayerReport(name, "lora.Linear", route.problem, route.config, why)
