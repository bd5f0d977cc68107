"""What a call costs apart from its arithmetic: Python, dispatch and autograd, in microseconds.

The layer is so small that its products take next to no time. On a GPU the clock is the wall's over
many calls, which the host limits here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.numerics import Checker
from benchmarks.providers import FROZEN, LORALIB, NAIVE, OURS, PEFT, SMART, Provider
from benchmarks.shapes import PASSES, Case, Layer
from benchmarks.suites.item import Item, Makers, Request, Suite
from benchmarks.suites.layers import present, ready_of, shape_of
from benchmarks.tensors import CaseTensors, make_tensors
from lora_fused import lora_linear

CONTENDERS = (FROZEN, NAIVE, SMART, PEFT, LORALIB, OURS)
_TINY = Layer("tiny", "layer", 32, 32)


def items(request: Request) -> Iterator[Item]:
    for dtype in request.dtypes if request.full else request.dtypes[:2]:
        for M in (1, 8) if request.full else (1,):
            case = Case(_TINY, dtype, M, 4)
            yield Item(
                name=_TINY.key,
                shape=shape_of(case),
                dtype=dtype,
                passes=PASSES,
                base=FROZEN,
                contenders=partial(_makers, case, request.device),
            )


def _makers(case: Case, device: str) -> Makers:
    tensors = make_tensors(case, device=device)
    checker = Checker(case, tensors)
    providers = [*present(CONTENDERS, device), *(p for p in OUR_OWN if p.missing(device) is None)]
    return {p.name: partial(ready_of, p, tensors, checker, PASSES) for p in providers}


def _function(t: CaseTensors, dropout: float) -> Callable[[Tensor], Tensor]:
    return lambda x: lora_linear(x, t.w, t.a, t.b, t.scaling, t.bias)


def _operator(t: CaseTensors, dropout: float) -> Callable[[Tensor], Tensor]:
    """The operator that torch.compile records, called directly."""
    operator = torch.ops.lora_fused.lora_linear

    def call(x: Tensor) -> Tensor:
        y: Tensor = operator(x, t.w, t.a, t.b, t.bias, None, t.scaling, 0.0, "auto")[0]
        return y

    return call


def _accelerated(t: CaseTensors, dropout: float) -> Callable[[Tensor], Tensor]:
    """PEFT's layer after accelerate()."""
    from lora_fused.integrations.peft import accelerate

    (peft,) = present([PEFT], t.x.device.type)
    layer = peft.layer(t, dropout)
    assert isinstance(layer, nn.Module)
    accelerate(layer, verbose=False)
    return layer


OUR_OWN = (
    Provider("ours-function", "lora_linear", _function, ours=True),
    Provider("ours-operator", "torch.ops.lora_fused.lora_linear", _operator, ours=True),
    Provider("ours-peft", "PEFT, accelerated", _accelerated, needs="peft", ours=True),
)
"""The ways into the library other than the module."""

SUITE = Suite("overhead", "Microseconds of Python per call, on a tiny layer", 20, items, eager=True)
