"""What a call asks for, as a Problem, from the metadata of its tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lora_fused import checks
from lora_fused.backends import cpu
from lora_fused.backends.cpu import PackedWeight
from lora_fused.config import GRADIENT_NAMES, Problem
from lora_fused.devices import gpu_of, tf32_is_allowed


def facts_of(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
) -> Any:
    """What checks and choices depend on, to look up at every call: by native code where it can."""
    module = cpu.native()
    known = None if module is None else module.facts(x, weight, lora_A, lora_B, bias)
    if known is not None:
        return known
    return weight.stride(), *(_facts(t) for t in (x, weight, lora_A, lora_B, bias))


def _facts(t: Tensor | None) -> Any:
    if t is None:
        return None
    return t.shape, t.dtype, t.device, t.layout, t.requires_grad, t.is_neg(), type(t)


def gpu_facts(x: Tensor, *params: Tensor | None) -> tuple[bool, bool]:
    """Whether all rows are aligned, and whether float32 may be TF32."""
    tf32 = x.dtype == torch.float32 and tf32_is_allowed()
    return are_aligned(x, *params), tf32


def are_aligned(*tensors: Tensor | None) -> bool:
    """Whether every row begins at a multiple of 16 bytes, as wide loads and TMA want it."""
    for t in tensors:
        if t is not None and not _is_plain(t):
            return False
        if t is not None and t.numel() > 0:
            strides = [stride for stride in t.stride() if stride != 1]
            if any((stride * t.element_size()) % 16 for stride in strides) or t.data_ptr() % 16:
                return False
    return True


def problem_of(
    x: Tensor,
    params: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    dropout: bool,
    packed: PackedWeight | None,
    needs: frozenset[str] | None,
    cast_weight: bool,
    on_gpu: tuple[bool, bool, bool] | None,
) -> Problem:
    """Check the call and say what it asks for.

    on_gpu: gpu_facts, and whether the caller drew the dropout mask; None elsewhere.
    """
    weight, lora_A, _, bias = params
    compute = x.dtype if cast_weight else checks.compute_dtype(x)
    checks.check_call(x, *params, compute, cast_weight or checks.autocast_is_on(x))
    if needs is None:
        tensors = zip(GRADIENT_NAMES, (x, *params), strict=True)
        wanting = (name for name, t in tensors if t is not None and t.requires_grad)
        needs = frozenset(wanting if torch.is_grad_enabled() else ())
    (N, K), stride = weight.shape, weight.stride()
    aligned, tf32, given_mask = (True, False, False) if on_gpu is None else on_gpu
    return Problem(
        M=math.prod(x.shape[:-1]),
        K=K,
        N=N,
        R=0 if lora_A is None else lora_A.shape[0],
        dtype=compute,
        device_type=x.device.type,
        adapter_dtype=None if lora_A is None else lora_A.dtype,
        has_bias=bias is not None,
        dropout=dropout,
        needs=needs,
        prepacked=packed is not None and packed.dtype == compute,
        weight_layout="row" if stride[1] == 1 else "column" if stride[0] == 1 else "strided",
        plain=all(t is None or _is_plain(t) for t in (x, *params)),
        threads=torch.get_num_threads(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        device=gpu_of(x),
        aligned=aligned,
        tf32=tf32,
        given_mask=given_mask,
    )


def _is_plain(t: Tensor) -> bool:
    """An ordinary tensor: data pointer and strides say all there is to know about its values."""
    return type(t) in (Tensor, torch.nn.Parameter) and not t.is_neg()
