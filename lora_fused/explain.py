"""explain(model, x): which backend and strategy each LoRA layer gets, and why not a faster one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_fused import packed
from lora_fused.config import Config, Problem
from lora_fused.dispatch import (
    choose,
    gpu_backends_for,
    reasons_against,
    resolve_backend,
    route_for,
)
from lora_fused.functional import is_distributed
from lora_fused.linear import FusedLoRALinear
from lora_fused.reference import dropout_threshold

_ASSUMED_TOKENS = 512


@dataclass(frozen=True)
class LayerReport:
    """What one layer does with one input."""

    name: str
    layer: str
    problem: Problem | None
    config: Config | None
    why: tuple[str, ...]
    runs_on: str = "torch: F.linear"

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.layer}"]
        if self.problem is not None:
            lines.append(f"    for      {self.problem}")
        lines.append(f"    runs on  {self.config or self.runs_on}")
        lines += [f"    {'why' if i == 0 else '':8} {reason}" for i, reason in enumerate(self.why)]
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """One report per LoRA layer; print it to read it."""

    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        if not self.layers:
            return "no FusedLoRALinear in this module"
        return "\n".join(str(layer) for layer in self.layers)


def explain(model: nn.Module, x: Any = None) -> Explanation:
    """Report what each FusedLoRALinear in `model` will do, without computing any of it.

    On a GPU: also what each part of it takes by the model and, if timed, in truth, and why each
    faster way was refused. (The first report for a size checks and times kernels, as the first call
    would.)

    Also for the layers of other libraries that lora_fused.integrations accelerated.

    With x the model is run on it once (model(x), model(*x) for a tuple or model(**x) for a
    mapping), without gradients and with the random state restored, to learn the shapes that reach
    each layer; for a single layer only the shape of x is read. Without x, 512 tokens are assumed.
    Returns an Explanation; str() of it is the report. Raises what the model raises.
    """
    inputs: dict[nn.Module, Tensor] = {}
    if _is_ours(model):
        inputs[model] = x if isinstance(x, Tensor) else _assumed_input(model)
    elif x is not None:
        inputs = _inputs_reaching_layers(model, x)
    reports = []
    for name, layer in _lora_layers(model):
        if layer in inputs or x is None:
            given = inputs.get(layer)
            reports.append(_report(name, layer, _assumed_input(layer) if given is None else given))
        else:
            reports.append(LayerReport(name, repr(layer), None, None, ("it was not called",)))
    return Explanation(tuple(reports))


def _is_ours(module: nn.Module) -> bool:
    """Our own layer, or one of another library that says itself what it does."""
    return isinstance(module, FusedLoRALinear) or hasattr(module, "explain_call")


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if _is_ours(module):
            yield name or type(module).__name__, module


def _assumed_input(layer: Any) -> Tensor:
    weight = layer.weight
    return torch.empty(_ASSUMED_TOKENS, layer.in_features, dtype=weight.dtype, device=weight.device)


def _inputs_reaching_layers(model: nn.Module, x: Any) -> dict[nn.Module, Tensor]:
    inputs: dict[nn.Module, Tensor] = {}

    def remember(layer: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.setdefault(layer, args[0])

    handles = [layer.register_forward_pre_hook(remember) for _, layer in _lora_layers(model)]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            if isinstance(x, Mapping):
                model(**x)
            elif isinstance(x, tuple):
                model(*x)
            else:
                model(x)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _report(name: str, layer: Any, x: Tensor) -> LayerReport:
    if not isinstance(layer, FusedLoRALinear):
        report: LayerReport = layer.explain_call(name, x)
        return report
    weight, pack = packed.read(layer.weight)
    if layer.fan_in_fan_out:
        weight = weight.t()
    plain = layer.r == 0 or layer.merged
    if plain and pack is None:
        reason = "the adapter is merged" if layer.merged else "r = 0: there is no adapter"
        return LayerReport(name, repr(layer), None, None, (reason,))
    lora_A, lora_B = (None, None) if plain else layer.adapter()
    dropout = not plain and layer.training and dropout_threshold(layer.lora_dropout) > 0
    route = route_for(
        *of_this_rank(x, weight, lora_A, lora_B, layer.bias), dropout, layer.backend, pack,
        _needs(layer, plain),
    )  # fmt: skip
    why = _why(layer, route.problem, route.config)
    why += gpu_lines(route.problem, route.config, x.device, layer.backend)
    return LayerReport(name, repr(layer), route.problem, route.config, why)


def of_this_rank(
    x: Tensor, weight: Tensor, *rest: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The operands as this rank computes with them: its parts of DTensors, others as they are.

    An input of all in_features, where this rank has a slice of them, stands for its slice.
    """
    split = is_distributed(weight)
    operands: list[Any] = [x, weight, *rest]
    for i, t in enumerate(operands):
        if t is not None and is_distributed(t):
            operands[i] = t.to_local()
    x, weight, lora_A, lora_B, bias = operands
    if split and x.dim() > 0 and x.shape[-1] > weight.shape[1]:
        x = x.narrow(-1, 0, weight.shape[1])
    return x, weight, lora_A, lora_B, bias


def _needs(layer: FusedLoRALinear, plain: bool) -> frozenset[str]:
    names = ("weight", "bias") if plain else ("weight", "lora_A", "lora_B", "bias")
    return needs_of({name: getattr(layer, name) for name in names})


def needs_of(params: Mapping[str, Tensor | None]) -> frozenset[str]:
    """What training would ask for: the gradient of the input, and of what is trainable."""
    if not torch.is_grad_enabled():
        return frozenset()
    trainable = {name for name, p in params.items() if p is not None and p.requires_grad}
    return frozenset({"x"} | trainable)


def _why(layer: FusedLoRALinear, problem: Problem, config: Config) -> tuple[str, ...]:
    why = list(config.notes)
    on_cpu = problem.device is None
    if on_cpu and config.backend == "torch" and not reasons_against(problem)["cpu"]:
        why.append("the native CPU kernels could run it")
    if config.backend == "cpu":
        why += _why_not_packed(layer, problem, config)
    return tuple(why)


def gpu_lines(
    problem: Problem, config: Config, where: torch.device, backend: str
) -> tuple[str, ...]:
    """The times of what a GPU runs, and why not something faster; nothing on a CPU."""
    if problem.device is None:
        return ()
    from lora_fused import alternatives

    names = gpu_backends_for(problem, resolve_backend(backend))
    return tuple(alternatives.describe(problem, config, names, where))


def _why_not_packed(layer: FusedLoRALinear, problem: Problem, config: Config) -> list[str]:
    if "packed" in (config.forward, config.dx) or layer.weight.requires_grad:
        return []
    if layer.prepacked:
        return ["the packed weight is not read: at this size the plain one is faster"]
    packed_config = choose(replace(problem, prepacked=True), "cpu")
    faster = "packed" in (packed_config.forward, packed_config.dx)
    return ["prepack() would let the native GEMM read the weight faster"] if faster else []
