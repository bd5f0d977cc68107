"""ColwiseLoRA and RowwiseLoRA: styles for torch.distributed.tensor.parallel.parallelize_module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from lora_fused.distributed.rules import LAYOUTS, Layout
from lora_fused.linear import FusedLoRALinear


class _LoRAStyle(ParallelStyle):
    layout: Layout
    default_input: Placement
    default_output: Placement

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layout = input_layouts or self.default_input
        self.output_layout = output_layouts or self.default_output
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        placement_of = _placements_of(module, self.layout)

        def distribute(name: str, submodule: nn.Module, mesh: DeviceMesh) -> None:
            for key, param in submodule.named_parameters(recurse=False):
                full_name = f"{name}.{key}" if name else key
                value = distribute_tensor(
                    param, mesh, [placement_of(full_name)], src_data_rank=self.src_data_rank
                )
                submodule.register_parameter(key, nn.Parameter(value, param.requires_grad))

        # NOTE: torch's annotation forgets that output_fn returns the output.
        output_fn: Any = self._output
        return distribute_module(module, device_mesh, distribute, self._input, output_fn)

    def _input(self, module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> Any:
        x, *rest = inputs
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [self.input_layout], run_check=False)
        return (x, *rest)

    def _output(self, module: nn.Module, y: Any, mesh: DeviceMesh) -> Tensor:
        y = y.redistribute(placements=[self.output_layout])
        return y.to_local() if self.use_local_output else y

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_layouts={self.input_layout}, "
            f"output_layouts={self.output_layout}, use_local_output={self.use_local_output})"
        )


class ColwiseLoRA(_LoRAStyle):
    """Split out_features: weight, lora_B and bias by rows, lora_A replicated.

    For FusedLoRALinear, and for PEFT's lora.Linear (accelerated or not). Pair it with RowwiseLoRA,
    as torch's ColwiseParallel with RowwiseParallel; the arguments are theirs.

    Args:
        input_layouts: placement of a plain input, Replicate() by default. Shard(1) for sequence
            parallelism: the input is gathered.
        output_layouts: placement of the output, Shard(-1) by default.
        use_local_output: return this rank's plain tensor, not the DTensor.
    """

    layout = LAYOUTS["column"]
    default_input = Replicate()
    default_output = Shard(-1)


class RowwiseLoRA(_LoRAStyle):
    """Split in_features: weight and lora_A by columns, lora_B and bias replicated.

    See ColwiseLoRA. One all-reduce per call, that of y (a reduce-scatter for a split output): the
    rank-R activations are never summed.

    Args:
        input_layouts: placement of a plain input, Shard(-1) by default.
        output_layouts: placement of the output, Replicate() by default. Shard(1) for sequence
            parallelism.
        use_local_output: return this rank's plain tensor, not the DTensor.
    """

    layout = LAYOUTS["row"]
    default_input = Shard(-1)
    default_output = Replicate()


def _placements_of(module: nn.Module, layout: Layout) -> Callable[[str], Placement]:
    """Name of a parameter → its placement; a refusal of modules that are not LoRA layers."""
    name_of: Callable[[str], str]
    if isinstance(module, FusedLoRALinear):
        if module.merged:
            raise RuntimeError(f"{layout_name(layout)}: the layer is merged; unmerge() it first.")
        transposed, name_of = module.fan_in_fan_out, str
    elif hasattr(module, "base_layer") and hasattr(module, "lora_A"):
        transposed, name_of = type(module.base_layer).__name__ == "Conv1D", _peft_name
    else:
        raise TypeError(
            f"{layout_name(layout)}: the module is a {type(module).__name__}, expected a "
            "FusedLoRALinear or a lora.Linear of PEFT."
        )

    def placement_of(name: str) -> Placement:
        field = name_of(name)
        placement: Placement = getattr(layout, field)
        if field == "bias" and placement.is_partial():
            return Replicate()
        if field == "weight" and transposed and isinstance(placement, Shard):
            return Shard(1 - placement.dim)
        return placement

    return placement_of


def layout_name(layout: Layout) -> str:
    return "ColwiseLoRA" if layout is LAYOUTS["column"] else "RowwiseLoRA"


def _peft_name(name: str) -> str:
    """base_layer.weight, base_layer.bias, lora_A.<adapter>.weight, lora_B.<adapter>.weight."""
    head, *_, last = name.split(".")
    if head == "base_layer":
        return last
    if head in ("lora_A", "lora_B") and last == "weight":
        return head
    raise TypeError(f"ColwiseLoRA, RowwiseLoRA: PEFT's parameter {name} cannot be split.")
