"""The frozen layer, which is the unit, and LoRA as plain torch computes it."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.providers.provider import Call
from benchmarks.tensors import CaseTensors


def frozen_linear(t: CaseTensors) -> nn.Linear:
    n, k = t.w.shape
    linear = nn.Linear(k, n, bias=t.bias is not None, device="meta")
    linear.weight = nn.Parameter(t.w, requires_grad=False)
    if t.bias is not None:
        linear.bias = nn.Parameter(t.bias, requires_grad=False)
    return linear


def frozen(t: CaseTensors, dropout: float) -> Call:
    return frozen_linear(t)


def naive(t: CaseTensors, dropout: float) -> Call:
    """The formula as it is written, elementwise passes over [M, N] included."""

    def call(x: Tensor) -> Tensor:
        rank = F.dropout(x, dropout) @ t.a.to(x.dtype).t() @ t.b.to(x.dtype).t()
        return F.linear(x, t.w, t.bias) + t.scaling * rank

    return call


def smart(t: CaseTensors, dropout: float) -> Call:
    """The best that plain torch offers: the last product accumulates into the base output."""

    def call(x: Tensor) -> Tensor:
        s = F.linear(F.dropout(x, dropout), t.a.to(x.dtype))
        return F.linear(x, t.w, t.bias).addmm_(s, t.b.to(x.dtype).t(), alpha=t.scaling)

    return call


def merged(t: CaseTensors, dropout: float) -> Call:
    """W + scaling · B A in one weight, added in fp32 and rounded once: no LoRA at run time."""
    with torch.no_grad():
        delta = t.scaling * (t.b.float() @ t.a.float())
        stored = (t.w.float() + delta).to(t.w.dtype)
    weight = stored.t().contiguous().t() if t.fan_in_fan_out else stored
    return frozen_linear(replace(t, w=weight))
