"""PEFT's LoRA layers, computed by lora_fused: accelerate(model), restore(model).

    model = get_peft_model(base, LoraConfig(...))      # or base.add_adapter(...), load_adapter(...)
    lora_fused.integrations.peft.accelerate(model)     # prints what is fused and what is not
    ...                                                # train, save, merge as before
    print(lora_fused.integrations.peft.explain(model)) # the same later, with counted calls

Only the class of each peft.tuners.lora.layer.Linear changes, to a subclass with another forward.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import Linear, LoraLayer, dispatch_default
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_fused.dispatch import resolve_backend
from lora_fused.integrations import grouping
from lora_fused.integrations.acceleration import Acceleration
from lora_fused.integrations.guards import NO_ADAPTER, Options
from lora_fused.integrations.peft_guards import why_stock_layer
from lora_fused.integrations.peft_layer import FusedLinear
from lora_fused.integrations.report import LayerStatus, Report

__all__ = ["FusedLinear", "Report", "accelerate", "accelerated", "explain", "register", "restore"]

_OLDEST = (0, 15)

if tuple(int(part) for part in peft.__version__.split(".")[:2]) < _OLDEST:
    raise ImportError(
        f"lora_fused.integrations.peft works with peft 0.15 or newer, found {peft.__version__}."
    )


def accelerate(
    model: nn.Module,
    *,
    backend: str = "auto",
    match_torch_rng: bool = False,
    cast_adapters: bool = True,
    group: str = "auto",
    verbose: bool = True,
) -> Report:
    """Compute the LoRA linear layers of a PEFT model by lora_fused, in place.

    Works on what get_peft_model, PeftModel.from_pretrained, model.add_adapter and
    model.load_adapter made; call it again after an adapter was added to new modules. Parameters,
    names, hooks, state dicts, merging and saved files stay what they are. Double backward
    (create_graph=True) is the one thing that fused layers refuse; use restore for it.

    Args:
        backend: "auto", "cpu" or "torch"; see lora_linear.
        match_torch_rng: draw dropout masks as PEFT does, from the same random stream, so that a
            run can be compared with stock PEFT. Slower: the masks are stored.
        cast_adapters: adapters of another dtype than the base weight (PEFT keeps them in fp32 by
            default) are read in the dtype of the input, as under autocast; their gradients come
            back in their own dtype. False leaves such layers to PEFT, which casts the input up.
        group: "auto" computes siblings that receive the very same input (q/k/v, gate/up) as one
            group where that was measured not to be slower, "always" wherever it is safe, "never"
            not at all. Which layers these are is learnt in the first pass; see
            lora_fused.integrations.grouping. The layers of a group are one node of the autograd
            graph: a backward through one of them alone frees what all of them saved.
        verbose: print the report to stderr.

    Returns a Report. Raises ValueError for an unknown backend or group.
    """
    resolve_backend(backend)
    grouping.check(group)
    options = Options(backend, match_torch_rng, cast_adapters)
    for module in model.modules():
        if type(module) is Linear and _why_not_swappable(module) is None:
            _swap(module, options)
        elif isinstance(module, FusedLinear):
            module._lora_fused.options = options
    grouping.attach_all(model, group)
    report = explain(model)
    for module in model.modules():
        if isinstance(module, FusedLinear):
            module._lora_fused.announced.update(report.not_fused.values())
    if verbose:
        print(report, file=sys.stderr)
    return report


def restore(model: nn.Module) -> None:
    """Give every accelerated layer of a model its own class back. Nothing else had changed.

    Raises RuntimeError for a layer that fully_shard was called on since.
    """
    for module in model.modules():
        grouping.detach(module)
        if isinstance(module, FusedLinear):
            _swap_back(module)


@contextmanager
def accelerated(model: nn.Module, **options: Any) -> Iterator[Report]:
    """accelerate(model, **options) for the duration of a `with` block.

    Layers that were accelerated before stay so, with the options they had.
    """
    before = {m: m._lora_fused.options for m in model.modules() if isinstance(m, FusedLinear)}
    groups = {m: grouping.siblings_of(m) for m in model.modules()}
    try:
        yield accelerate(model, **options)
    finally:
        for module in model.modules():
            grouping.put_back(module, groups.get(module))
            if module in before and isinstance(module, FusedLinear):
                module._lora_fused.options = before[module]
            elif isinstance(module, FusedLinear):
                _swap_back(module)


def register(config: peft.LoraConfig, **options: Any) -> peft.LoraConfig:
    """Make PEFT create accelerated layers for this config, by its custom-module hook.

    For code that builds the model itself from a config, such as a trainer. Pass the config also to
    PeftModel.from_pretrained(config=...): PEFT does not save the registration. Options are those of
    accelerate, without verbose and group: siblings are grouped by accelerate only. Only exact
    nn.Linear and Conv1D are taken, so that quantised layers keep their own classes. Returns the
    config.
    """
    resolve_backend(options.get("backend", "auto"))
    chosen = Options(**options)

    def create(target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module | None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if type(base) is not nn.Linear and type(base) is not Conv1D:
            return None
        # Older versions of PEFT do not pass the config on.
        layer = dispatch_default(target, adapter_name, kwargs.pop("config", config), **kwargs)
        if type(layer) is Linear and _why_not_swappable(layer) is None:
            _swap(layer, chosen)
        return layer

    factories: Any = {nn.Linear: create, Conv1D: create}
    config._register_custom_module(factories)
    return config


def explain(model: nn.Module) -> Report:
    """What is fused in a model now and what is not, with the calls counted so far."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    layers = tuple(_status(name, module) for name, module in found)
    notes = _notes([m for _, m in found if isinstance(m, FusedLinear)])
    return Report(layers, notes, grouping.statuses(model))


def _swap(layer: Any, options: Options) -> None:
    layer.__class__ = FusedLinear
    layer._lora_fused = Acceleration(options)


def _swap_back(layer: Any) -> None:
    # NOTE: fully_shard puts a subclass of its own in the place of the class.
    kind = type(layer).__name__
    if kind != FusedLinear.__name__:
        raise RuntimeError(
            f"restore: the layer is a {kind}, expected a FusedLinear: restore before fully_shard."
        )
    layer.__class__ = Linear
    del layer._lora_fused


def _status(name: str, module: Any) -> LayerStatus:
    kind = ".".join([*type(module).__module__.split(".")[:-1][-1:], type(module).__name__])
    if not isinstance(module, FusedLinear):
        why = _why_not_swappable(module) or "accelerate(model) has not been called"
        return LayerStatus(name, kind, why)
    state = module._lora_fused
    active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    reason = why_stock_layer(module, active, state.options) if active else NO_ADAPTER
    return LayerStatus(name, "lora.Linear", reason, state.fused, state.stock.copy())


def _why_not_swappable(module: Any) -> str | None:
    """Why a layer cannot be accelerated, whatever its adapters are."""
    if not isinstance(module, LoraLayer):
        return "not a LoRA layer"
    if type(module).__name__ == f"FSDP{Linear.__name__}":
        return "fully_shard has been called on it: call accelerate before"
    if type(module) is not Linear:
        return "not exactly lora.Linear"
    if "forward" in module.__dict__:
        return "its forward is patched on the instance"
    if Linear.forward.__module__ != Linear.__module__:
        return f"lora.Linear.forward is patched by {Linear.forward.__module__}"
    return None


def _notes(layers: list[Any]) -> tuple[str, ...]:
    cast: dict[tuple[torch.dtype, torch.dtype], int] = {}
    for layer in layers:
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                pair = (layer.lora_A[adapter].weight.dtype, layer.base_layer.weight.dtype)
                cast[pair] = cast.get(pair, 0) + (pair[0] != pair[1])
    return tuple(
        f"{count} adapters in {adapter} are read in the dtype of the input, as under autocast "
        f"(cast_adapters=False leaves them to PEFT)"
        for (adapter, _), count in cast.items()
        if count
    )
