"""The operators registered with torch, for torch.compile, torch.export and dispatch modes.

    lora_fused::lora_linear           (x, weight, lora_A, lora_B, bias, seed, …) -> (y, s)
    lora_fused::lora_linear_backward  (dy, x, weight, lora_A, lora_B, s, seed, …) -> (dx, dweight,
    da, db, dbias)
    lora_fused::…_kernel              the same two without autograd, in inductor's graphs only

Eager calls do not pass here: the operator boundary costs more than a small layer. For the same
reason the operators are registered with torch's dispatcher directly: the wrappers of
torch.library.custom_op take as long again as the kernels on a small layer. One Python function is
called per operator, that of the autograd key, which goes on to the kernel unless somebody watches.
What inductor makes of the operators is decided in decomposition.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as disable_dynamo
from torch.utils.flop_counter import register_flop_formula

from lora_fused.autograd import Saved, lora_backward, lora_forward, refuse_double_backward
from lora_fused.backends.torch_ops import flatten
from lora_fused.checks import check_call, compute_dtype
from lora_fused.config import GRADIENT_NAMES, Call, Mask, Route
from lora_fused.decomposition import register_with_inductor
from lora_fused.dispatch import route_for
from lora_fused.functional import make_mask
from lora_fused.reference import effective_scaling

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? lora_A, Tensor? lora_B, Tensor? bias, Tensor? seed, "
    "float scaling, float dropout_p, str backend) -> (Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor dy, Tensor x, Tensor weight, Tensor? lora_A, Tensor? lora_B, Tensor? bias, Tensor s, "
    "Tensor? seed, float scaling, float dropout_p, str backend, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


_LIBRARY = torch.library.Library("lora_fused::".removesuffix("::"), "FRAGMENT")
# flexible_layout: kernels take any strides, so a compiler has nothing to copy for them.
_TAGS = torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout
for _suffix in ("", "_kernel"):
    _LIBRARY.define(f"lora_linear{_suffix}{_SCHEMA}", tags=_TAGS)
    _LIBRARY.define(f"lora_linear_backward{_suffix}{_BACKWARD_SCHEMA}", tags=_TAGS)
LORA_LINEAR = torch.ops.lora_fused.lora_linear.default
LORA_LINEAR_BACKWARD = torch.ops.lora_fused.lora_linear_backward.default


def _lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y [..., N] and s [..., R]; x has the compute dtype. A seed means dropout."""
    scale, mask = _scale_and_mask(scaling, dropout_p, seed)
    route = route_for(
        x, weight, lora_A, lora_B, bias, mask is not None, backend,
        needs=frozenset(), cast_weight=True,
    )  # fmt: skip
    y, s = lora_forward(Call(route, scale, mask), x, weight, lora_A, lora_B, bias)
    if s is None:
        return y, x.new_empty(*x.shape[:-1], 0)
    return y, s if x.dim() == 2 else s.view(*x.shape[:-1], s.shape[1])


def _lora_linear_fake(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_call(x, weight, lora_A, lora_B, bias, x.dtype, cast_weight=True)
    rank = 0 if lora_A is None else lora_A.shape[0]
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(*x.shape[:-1], rank)


def _lora_linear_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five gradients, in the order of config.GRADIENT_NAMES; empty where not needed."""
    scale, mask = _scale_and_mask(scaling, dropout_p, seed)
    wanted = frozenset(name for name, need in zip(GRADIENT_NAMES, needs, strict=True) if need)
    route = route_for(
        x, weight, lora_A, lora_B, bias, mask is not None, backend,
        needs=wanted, cast_weight=True,
    )  # fmt: skip
    _check_gradient(dy, s, route)
    rank_s = flatten(s).contiguous() if s.shape[-1] > 0 else None
    gradients = lora_backward(
        Call(route, scale, mask), dy, Saved(x, rank_s, weight, lora_A, lora_B)
    )
    dx, dweight, da, db, dbias = (dy.new_empty(0) if g is None else g for g in gradients)
    return dx, dweight, da, db, dbias


def _lora_linear_backward_fake(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dweight, da, db, dbias = (
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if need and t is not None
        else dy.new_empty(0)
        for need, t in zip(needs, (x, weight, lora_A, lora_B, bias), strict=True)
    )
    return dx, dweight, da, db, dbias


class _Recorded(torch.autograd.Function):
    """The operator as autograd sees it: its backward is the other operator."""

    @staticmethod
    def forward(ctx: Any, keys: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, weight, lora_A, lora_B, bias, seed, *ctx.options = inputs
        y, s = _below_autograd(LORA_LINEAR, _lora_linear, keys, inputs)
        ctx.mark_non_differentiable(s)
        ctx.save_for_backward(x, weight, lora_A, lora_B, bias, s, seed)
        return y, s

    @staticmethod
    def backward(ctx: Any, dy: Tensor, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        x, weight, lora_A, lora_B, bias, s, seed = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[1:6])
        gradients = LORA_LINEAR_BACKWARD(
            dy, x, weight, lora_A, lora_B, bias, s, seed, *ctx.options, needs
        )
        wanted = (g if need else None for g, need in zip(gradients, needs, strict=True))
        return (None, *wanted, None, None, None, None)


def _lora_linear_autograd(keys: Any, *inputs: Any) -> Any:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:5]):
        return _Recorded.apply(keys, *inputs)
    return _below_autograd(LORA_LINEAR, _lora_linear, keys, inputs)


def _lora_linear_backward_autograd(keys: Any, *inputs: Any) -> Any:
    if any(t is not None and t.requires_grad for t in inputs[:7]):
        refuse_double_backward()
    return _below_autograd(LORA_LINEAR_BACKWARD, _lora_linear_backward, keys, inputs)


def _below_autograd(
    operator: torch._ops.OpOverload, kernel: Callable[..., Any], keys: Any, inputs: Any
) -> Any:
    """Call the kernel itself, or the dispatcher where a mode or a kind of tensor comes before."""
    rest = keys & torch._C._after_ADInplaceOrView_keyset
    if rest.highestPriorityTypeId() in _DEVICE_KEYS:
        return kernel(*inputs)
    register_with_inductor()
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *inputs)


_DEVICE_KEYS = frozenset(getattr(torch._C.DispatchKey, name) for name in ("CPU", "CUDA", "XPU"))


def _register(name: str, kernel: Any, fake: Any, autograd: Any) -> None:
    """Dynamo must not look into what the dispatcher calls between two graphs."""
    _LIBRARY.impl(name, disable_dynamo(kernel), "CompositeExplicitAutograd")
    _LIBRARY.impl(name, disable_dynamo(autograd), "Autograd", with_keyset=True)
    _LIBRARY.impl(f"{name}_kernel", kernel, "CompositeExplicitAutograd")
    for full_name in (name, f"{name}_kernel"):
        torch.library.register_fake(f"lora_fused::{full_name}", fake, lib=_LIBRARY)


_register("lora_linear", _lora_linear, _lora_linear_fake, _lora_linear_autograd)
_register(
    "lora_linear_backward",
    _lora_linear_backward, _lora_linear_backward_fake, _lora_linear_backward_autograd,
)  # fmt: skip


def _check_gradient(dy: Tensor, s: Tensor, route: Route) -> None:
    """dy and s must be what the forward of this route made, for they are read by pointer."""
    s_shape = (*route.x_shape[:-1], route.problem.R)
    for name, tensor, shape in (("dy", dy, route.y_shape), ("s", s, s_shape)):
        if tensor.shape != shape:
            raise ValueError(
                f"lora_linear_backward: {name} has shape {list(tensor.shape)}, "
                f"expected {list(shape)}."
            )
        if tensor.dtype != route.compute or tensor.device.type != route.problem.device_type:
            raise TypeError(
                f"lora_linear_backward: {name} is {tensor.dtype} on {tensor.device}, "
                f"expected {route.compute}, on the device of x."
            )


def _scale_and_mask(
    scaling: float, dropout_p: float, seed: Tensor | None
) -> tuple[float, Mask | None]:
    if seed is None:
        return scaling, None
    return effective_scaling(scaling, dropout_p), make_mask(seed, dropout_p)


def _register_autocast(device_type: str) -> None:
    """Under autocast x is cast to the dtype that the user chose, not to a registered one."""
    key = f"Autocast{torch._C._dispatch_key_for_device(device_type)}"
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(_: Any, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        x = x.to(compute_dtype(x))
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return LORA_LINEAR(x, *args)

    _LIBRARY.impl("lora_linear", kernel, key, with_keyset=True)


for _device_type in ("cpu", "cuda", "xpu"):
    _register_autocast(_device_type)


@register_flop_formula([torch.ops.lora_fused.lora_linear, torch.ops.lora_fused.lora_linear_kernel])
def _lora_linear_flops(
    x_shape: Any, weight_shape: Any, a_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Useful work: 2 M N K for the weight, 2 M R (K + N) for the adapters."""
    (N, K), R = weight_shape, 0 if a_shape is None else a_shape[0]
    M = math.prod(x_shape[:-1])
    return int(2 * M * (N * K + R * (K + N)))


@register_flop_formula(
    [torch.ops.lora_fused.lora_linear_backward, torch.ops.lora_fused.lora_linear_backward_kernel]
)
def _lora_linear_backward_flops(
    dy_shape: Any, x_shape: Any, weight_shape: Any, a_shape: Any, b_shape: Any, bias_shape: Any,
    s_shape: Any, seed_shape: Any, scaling: float, dropout_p: float, backend: str,
    needs: list[bool], out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    """Useful work: per token N K for dx and for dW, R N for ds and for dB, R K for ds A and dA."""
    (N, K), R, M = weight_shape, 0 if a_shape is None else a_shape[0], math.prod(x_shape[:-1])
    dx, dweight, da, db, _ = needs
    per_token = (dx + dweight) * N * K + R * ((dx or da) * N + db * N + dx * K + da * K)
    return int(2 * M * per_token)
