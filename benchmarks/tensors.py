"""The tensors of a case: made once; providers share x and dy and copy the parameters."""

import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.shapes import Case
from lora_fused.testing import make_case

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class CaseTensors:
    """x [M, K], w [N, K] (a transposed view where stored as [K, N]), a [R, K], b [N, R].

    x requires grad, as an inner layer's input does; a and b are the trainable parameters.
    """

    x: Tensor
    w: Tensor
    bias: Tensor | None
    a: nn.Parameter
    b: nn.Parameter
    dy: Tensor
    scaling: float
    fan_in_fan_out: bool

    @property
    def stored_weight(self) -> Tensor:
        return self.w.t() if self.fan_in_fan_out else self.w

    def copy(self) -> "CaseTensors":
        """The same values elsewhere in memory, x and dy too."""
        x, dy = self.x.detach().clone().requires_grad_(), self.dy.clone()
        return replace(self.copy_of_parameters(), x=x, dy=dy)

    @property
    def streamed_bytes(self) -> int:
        """Of what a call reads once: the weight, x and dy."""
        return sum(t.numel() * t.element_size() for t in (self.w, self.x, self.dy))

    def copy_of_parameters(self) -> "CaseTensors":
        """The same values elsewhere in memory, x and dy shared: the next layer of a model."""
        stored = self.stored_weight.clone()
        return replace(
            self,
            w=stored.t() if self.fan_in_fan_out else stored,
            bias=None if self.bias is None else self.bias.clone(),
            a=nn.Parameter(self.a.detach().clone()),
            b=nn.Parameter(self.b.detach().clone()),
        )


def make_tensors(
    case: Case, adapter_dtype: torch.dtype | None = None, device: str = "cpu"
) -> CaseTensors:
    """The project's test data: x Wᵀ and the rank-R term are both of order one, B is not zero."""
    layer = case.layer
    made = make_case(
        case.M,
        layer.K,
        layer.N,
        case.R,
        TORCH_DTYPES[case.dtype],
        adapter_dtype=adapter_dtype,
        bias=layer.bias,
        scaling=2.0,
        fan_in_fan_out=layer.fan_in_fan_out,
        device=device,
        seed=zlib.crc32(case.label.encode()),
    )
    return CaseTensors(
        x=made.x.requires_grad_(),
        w=made.weight,
        bias=made.bias,
        a=nn.Parameter(made.lora_A),
        b=nn.Parameter(made.lora_B),
        dy=made.dy,
        scaling=made.scaling,
        fan_in_fan_out=layer.fan_in_fan_out,
    )
