"""A whole direction of a layer in one native call (csrc/cpu/layer.h), where it is all native code.

The same operations as in lora_fused.backends.cpu, with the same results; what is saved is the way
into native code and back, several times the arithmetic of a small layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_fused.backends import cpu
from lora_fused.config import Call, Config, Problem

_IN_ONE_CALL = frozenset({"own", "packed"})


def layer_of(
    problem: Problem, config: Config, param_dtypes: tuple[torch.dtype | None, ...]
) -> tuple[Any, Any]:
    """The native layer for the forward pass and for the backward one; None where it has no use."""
    if problem.R == 0:
        return None, None
    adapter_dtypes = (dtype for dtype in param_dtypes[1:3] if dtype is not None)
    da_code, db_code = (cpu.DTYPE_CODES[cpu.native_dtype(dtype)] for dtype in adapter_dtypes)
    layer = cpu.native().Layer(
        config.isa, cpu.DTYPE_CODES[problem.dtype], problem.M, problem.N, problem.K, problem.R,
        da_code, db_code, config.threads,
    )  # fmt: skip
    return (
        layer if config.forward in _IN_ONE_CALL else None,
        layer if config.dx in _IN_ONE_CALL else None,
    )


def forward(
    call: Call,
    x: Tensor,
    w: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    wants_s: bool,
) -> tuple[Tensor, Tensor | None]:
    """y [..., N] and s [M, R], None unless it is wanted."""
    route, dtype = call.route, x.dtype
    if not x.is_contiguous():
        x = cpu.rows(x)[0]
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    seed, threshold = (0, 0) if call.mask is None else cpu.words(call.mask)
    s = torch.empty(route.problem.M, route.problem.R, dtype=dtype) if wants_s else None
    y = torch.empty(route.y_shape, dtype=dtype)
    panels = _panels(call, "forward", dtype)
    route.forward_layer.forward(x, w, a, b, bias, panels, call.scale, seed, threshold, s, y)
    return y, s


def backward(
    call: Call,
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    w: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx [..., K], da [R, K] and db [N, R] as far as the route needs them."""
    route, problem, needs, dtype = call.route, call.route.problem, call.route.needs, dy.dtype
    if not dy.is_contiguous():
        dy = cpu.rows(dy)[0]
    if x is not None and not x.is_contiguous():
        x = cpu.rows(x)[0]
    seed, threshold = (0, 0) if call.mask is None else cpu.words(call.mask)
    dx = da = db = None
    _, a_dtype, b_dtype, _ = route.param_dtypes
    if "x" in needs:
        dx = torch.empty(route.x_shape, dtype=dtype)
    if "lora_A" in needs and a_dtype is not None:
        da = torch.empty(problem.R, problem.K, dtype=cpu.native_dtype(a_dtype))
    if "lora_B" in needs and b_dtype is not None:
        db = torch.empty(problem.N, problem.R, dtype=cpu.native_dtype(b_dtype))
    panels = _panels(call, "dx", dtype)
    route.backward_layer.backward(
        dy, x, s, w, a, b, panels, call.scale, seed, threshold, dx, da, db
    )  # fmt: skip
    return dx, _as(da, a_dtype), _as(db, b_dtype)


def _panels(call: Call, direction: str, dtype: torch.dtype) -> int:
    """The address of the pack to read, or 0."""
    packed: Any = call.packed
    return 0 if packed is None else cpu.panels_of(call.route.config, direction, packed, dtype)


def _as(gradient: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """The gradient in the dtype of its parameter, if native code does not write that one."""
    return gradient if gradient is None or gradient.dtype == dtype else gradient.to(dtype)
