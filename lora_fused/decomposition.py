"""The operators in torch's own operations, for inductor, where these make faster compiled code.

A compiled graph calls an operator through torch's dispatcher and Python, which takes longer than
our kernels win on a small layer; and where the choice is torch's formulation anyway, inductor makes
better code of it than a call. So the operators are recorded as ever (a policy, a counter of FLOPs,
an exported program sees them), and inductor asks here whether to replace them in its own graph.

Measured with torch 2.13 on an AMD EPYC (Zen 4), 1 thread, r = 8 and 16: time of compiled code with
the operator relative to torch's operations, forward / forward + backward, square layers:

    fp32   width    64         256        512        768        1024       2048
    M = 1       1.56/1.50  1.60/1.48  1.25/1.44  1.13/1.27  1.02/1.17  0.71/0.84
    M = 16      1.53/1.51  1.29/1.48  1.01/1.12  0.96/1.02  0.70/0.96
    M = 128     1.34/1.37  1.11/1.05  1.04/1.05  0.93/0.97  0.86/0.90
    M = 512                           1.01/0.96
    bf16   M = 1: 1.53/1.60 (width 64), 0.81/1.00 (128), 0.78/0.96 (256), 0.52 to 0.73 above;
           M = 4: 1.41/1.44 (32), 0.79/1.02 (64); M = 16 and 128: 0.59 to 0.96. Beyond 4096
           multiply-adds torch calls oneDNN, whose set-up the kernels do without.
"""

from __future__ import annotations

import importlib
import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lora_fused.backends.torch_ops import flatten
from lora_fused.config import Problem
from lora_fused.devices import gpu_of
from lora_fused.dispatch import choose, resolve_backend

_SMALL_FP32 = 512 * 512
_SMALL_FP32_ONE_TOKEN = 1024 * 1024
_PLAIN_BF16 = 4096
"""Up to this many weights, or multiply-adds: see the measurements above."""

_registered: list[bool] = []


def register_with_inductor() -> None:
    """Add the decompositions of the two operators to inductor's table, if inductor is in use.

    Called whenever an operator is traced, first by dynamo: inductor reads its table after that.
    Where inductor has no such table the operators stay in the graph.
    """
    if _registered or "torch._inductor" not in sys.modules:
        return
    _registered.append(True)
    with _disable_current_modes():  # the import is not part of what is traced
        inductor: Any = importlib.import_module("torch._inductor.decomposition")
    table = getattr(inductor, "decompositions", None)
    if not isinstance(table, dict):
        return
    operators = torch.ops.lora_fused
    table[operators.lora_linear.default] = _forward
    table[operators.lora_linear_backward.default] = _backward
    clear = getattr(getattr(inductor, "fast_random_decomps", None), "cache_clear", None)
    if clear is not None:
        clear()  # a copy of the table, made when something was compiled before


def is_better_in_torch(
    x: Tensor, weight: Tensor, lora_A: Tensor | None, seed: Tensor | None, backend: str
) -> bool:
    """Whether a compiled graph shall hold torch's operations instead of the operator.

    Answered from what holds for every run of the graph: an M that may vary is not looked at, and
    no answer makes torch compile again.
    """
    if seed is not None:
        return False
    (N, K), M = weight.shape, math.prod(x.shape[:-1])
    fixed = isinstance(M, int)
    problem = Problem(
        M=M if fixed else 1,
        K=K, N=N,
        R=0 if lora_A is None else lora_A.shape[0],
        dtype=x.dtype,
        device_type=x.device.type,
        threads=torch.get_num_threads(),
        device=gpu_of(x),
    )  # fmt: skip
    config = choose(problem, backend)
    if config.backend != "cpu" or resolve_backend(backend) != "auto":
        return config.backend == "torch"
    if config.forward == config.dx == "library":
        return fixed
    if x.dtype == torch.float32:
        return K * N <= _SMALL_FP32 or (fixed and M == 1 and K * N <= _SMALL_FP32_ONE_TOKEN)
    return fixed and x.dtype == torch.bfloat16 and M * K * N <= _PLAIN_BF16


def _forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
) -> Any:
    """y and s. The scale of s comes last, so that nobody computes it who does not need s."""
    if not is_better_in_torch(x, weight, lora_A, seed, backend):
        return torch.ops.lora_fused.lora_linear_kernel.default(
            x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, backend
        )
    rows, dtype, leading = flatten(x), x.dtype, x.shape[:-1]
    w = weight.to(dtype).t()
    y = torch.mm(rows, w) if bias is None else torch.addmm(bias.to(dtype), rows, w)
    if lora_A is None or lora_B is None:
        return y.view(*leading, y.shape[1]), x.new_empty(*leading, 0)
    s = torch.mm(rows, lora_A.to(dtype).t())
    y = torch.addmm(y, s, lora_B.to(dtype).t(), alpha=scaling)
    return y.view(*leading, y.shape[1]), (s * scaling).view(*leading, s.shape[1])


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    s: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
    needs: list[bool],
) -> Any:
    """The gradients that are needed, empty tensors for the others."""
    if not is_better_in_torch(x, weight, lora_A, seed, backend):
        return torch.ops.lora_fused.lora_linear_backward_kernel.default(
            dy, x, weight, lora_A, lora_B, bias, s, seed, scaling, dropout_p, backend, needs
        )
    rows, dy_rows, dtype = flatten(x), flatten(dy), dy.dtype
    dx, dweight, da, db, dbias = (dy.new_empty(0) for _ in needs)
    need_x, need_weight, need_a, need_b, need_bias = needs
    if need_x:
        dx = torch.mm(dy_rows, weight.to(dtype))
    if lora_A is not None and lora_B is not None:
        ds = torch.mm(dy_rows, lora_B.to(dtype)) * scaling
        if need_x:
            dx = torch.addmm(dx, ds, lora_A.to(dtype))
        if need_a:
            da = torch.mm(ds.t(), rows).to(lora_A.dtype)
        if need_b:
            db = torch.mm(dy_rows.t(), flatten(s)).to(lora_B.dtype)
    if need_x:
        dx = dx.view(x.shape)
    if need_weight:
        dweight = torch.mm(dy_rows.t(), rows).to(weight.dtype)
    if need_bias and bias is not None:
        dbias = dy_rows.sum(0, dtype=bias.dtype)
    return dx, dweight, da, db, dbias
