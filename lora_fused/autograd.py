"""Forward and backward of one LoRA linear layer, on top of any backend's four operations."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from lora_fused.backends import BACKENDS, cpu_layer
from lora_fused.backends.torch_ops import flatten
from lora_fused.config import FUSED_STRATEGIES, Call, Route
from lora_fused.reference import Gradients


class Saved(NamedTuple):
    """The tensors that backward reads; None where no requested gradient uses it."""

    x: Tensor | None
    s: Tensor | None
    weight: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None


class LoRALinearFunction(torch.autograd.Function):
    """y = x Wᵀ + s Bᵀ + bias with s = scale · (mask ⊙ x) Aᵀ, for x [..., K] and y [..., N].

    Backward, from dy (only what needs_input_grad asks for is computed):

        ds = scale · dy B
        dx = dy W + mask ⊙ (ds A)
        dA = dsᵀ (mask ⊙ x)
        dB = dyᵀ s
        dW = dyᵀ x,   dbias = Σ_m dy

    Saved: x, s and the parameters themselves, each only if a requested gradient uses it. The mask
    is regenerated from its seed. A parameter of another dtype than x is cast in both passes, so
    that no cast copy lives in between; its gradient comes back in its own dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        bias: Tensor | None,
        call: Call,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.call = call
        wants_s = "lora_B" in call.route.needs
        y, s = lora_forward(call, x, weight, lora_A, lora_B, bias, wants_s)
        ctx.save_for_backward(*what_to_save(call.route.needs, x, s, weight, lora_A, lora_B))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if dy is None:
            return (None,) * 6
        return (*lora_backward(ctx.call, dy, Saved(*ctx.saved_tensors)), None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise NotImplementedError(
            "lora_linear has no forward-mode derivative; torch.func.jvp is supported."
        )


def refuse_double_backward() -> None:
    """Raise under create_graph=True (only then is gradient mode on here): it would be ignored."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "lora_linear has no double backward (create_graph=True); "
            "nested torch.func.grad is supported."
        )


def what_to_save(
    needs: frozenset[str],
    x: Tensor,
    s: Tensor | None,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
) -> Saved:
    """Only the tensors that a requested gradient will read."""
    dx, da = "x" in needs, "lora_A" in needs
    return Saved(
        x if da or "weight" in needs else None,
        s if "lora_B" in needs else None,
        weight if dx else None,
        lora_A if dx else None,
        lora_B if dx or da else None,
    )


def lora_forward(
    call: Call,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    wants_s: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """y [..., N] and s [M, R] of x [..., K], which has the compute dtype.

    s is None for rank 0, and may be where it is not wanted.
    """
    route = call.route
    if route.cast:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        lora_A, lora_B = _cast_adapters(route, lora_A, lora_B, x.dtype)
    if route.forward_layer is not None and call.keep is None:
        return cpu_layer.forward(call, x, weight, lora_A, lora_B, bias, wants_s)
    if torch._C._is_any_autocast_enabled():
        # Every operand has its final dtype; autocast must not cast again.
        with torch.autocast(route.problem.device_type, enabled=False):
            return _forward(call, x, weight, lora_A, lora_B, bias)
    return _forward(call, x, weight, lora_A, lora_B, bias)


def _forward(
    call: Call,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """lora_forward by the backend's operations, on operands of the compute dtype."""
    route = call.route
    config = route.config
    ops, s = BACKENDS[config.backend], None
    if config.forward in FUSED_STRATEGIES:
        y, s = ops.shrink_matmul(
            route, "forward", x, weight, lora_A, lora_B, call.scale, bias, call.mask
        )
        return y, s
    if route.problem.R > 0:
        s = ops.shrink(route, kept(x, call.keep), lora_A, call.scale, call.mask)
    y = ops.matmul(route, "forward", x, weight, s, lora_B, bias, packed=call.packed)
    return y, s


def lora_backward(call: Call, dy: Tensor, saved: Saved) -> Gradients:
    """The gradients that the route needs, the others None."""
    route = call.route
    if torch._C._is_any_autocast_enabled():
        with torch.autocast(route.problem.device_type, enabled=False):
            return lora_backward(call, dy, saved)
    needs, x, config = route.needs, saved.x, route.config
    weight_dtype, a_dtype, _, bias_dtype = route.param_dtypes
    if route.cast:
        weight = None if saved.weight is None else saved.weight.to(dy.dtype)
        adapters = _cast_adapters(route, saved.lora_A, saved.lora_B, dy.dtype)
        saved = Saved(x, saved.s, weight, *adapters)
    dx = dweight = da = dbias = None
    if route.backward_layer is not None and call.keep is None:
        dx, da, db = cpu_layer.backward(call, dy, *saved)
    elif config.reduce_tiles is not None or config.dx in FUSED_STRATEGIES:
        dx, da, db = _fewer_launches(call, dy, saved)
    else:
        ds, db = shrink_gradients(call, dy, saved.s, saved.lora_B)
        if "x" in needs:
            dx = input_gradient(call, dy, ds, saved)
        if "lora_A" in needs:
            if ds is None:
                da = dy.new_zeros(0, route.problem.K, dtype=a_dtype)
            elif x is not None:
                ops = BACKENDS[config.backend]
                da = ops.reduce(route, ds, kept(x, call.keep), call.mask, a_dtype)
    if "weight" in needs and x is not None:
        dweight = weight_gradient(dy, x, weight_dtype)
    if "bias" in needs:
        dbias = flatten(dy).sum(0, dtype=bias_dtype)
    return Gradients(dx, dweight, da, db, dbias)


def _cast_adapters(
    route: Route, lora_A: Tensor | None, lora_B: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The adapters in the compute dtype, unless the kernels take them as they are."""
    if route.wide_adapters:
        return lora_A, lora_B
    return (
        None if lora_A is None else lora_A.to(dtype),
        None if lora_B is None else lora_B.to(dtype),
    )


def _fewer_launches(
    call: Call, dy: Tensor, saved: Saved
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, da and db by a backend that makes ds with dx, or da with db, in one launch."""
    route, needs = call.route, call.route.needs
    ops, config = BACKENDS[route.config.backend], route.config
    x, s, weight, lora_A, lora_B = saved
    dx = ds = da = db = None
    if config.tiles("backward") is not None:
        _, a_dtype, b_dtype, _ = route.param_dtypes
        dx, da, db = ops.shrink_matmul_reduce(
            route, dy, weight, lora_A, lora_B, call.scale, x, s, a_dtype, b_dtype
        )
        return dx, da, db
    if "x" in needs and config.dx in FUSED_STRATEGIES:
        dx, ds = ops.shrink_matmul(
            route, "dx", dy, weight, lora_B, lora_A, call.scale, None, call.mask
        )
    elif "x" in needs or "lora_A" in needs:
        ds, _ = ops.shrink_reduce(route, dy, lora_B, call.scale, None, True, None)
    if "x" in needs and dx is None:
        dx = input_gradient(call, dy, ds, saved)
    if config.reduce_tiles is not None:
        return dx, *_reduce_pair(call, ds, dy, saved)
    _, a_dtype, b_dtype, _ = route.param_dtypes
    if "lora_B" in needs:
        _, db = ops.shrink_reduce(route, dy, None, call.scale, s, False, b_dtype)
    if "lora_A" in needs and ds is not None and x is not None:
        da = ops.reduce(route, ds, kept(x, call.keep), call.mask, a_dtype)
    return dx, da, db


def _reduce_pair(
    call: Call, ds: Tensor | None, dy: Tensor, saved: Saved
) -> tuple[Tensor | None, Tensor | None]:
    """da [R, K] and db [N, R] by one launch, each if the route needs it."""
    route, x = call.route, saved.x
    a_dtype = route.param_dtypes[1] if "lora_A" in route.needs else None
    b_dtype = route.param_dtypes[2] if "lora_B" in route.needs else None
    if a_dtype is None and b_dtype is None:
        return None, None
    if x is not None:
        x = kept(x, call.keep)
    ops = BACKENDS[route.config.backend]
    da, db = ops.reduce_pair(route, ds, x, call.mask, a_dtype, dy, saved.s, b_dtype)
    return da, db


def kept(x: Tensor, keep: Tensor | None) -> Tensor:
    """x with a given dropout mask applied; backends know only masks that they regenerate."""
    return x if keep is None else x * keep.view(x.shape)


def input_gradient(call: Call, dy: Tensor, ds: Tensor | None, saved: Saved) -> Tensor:
    """dx = dy W + mask ⊙ (ds A). On a GPU the GEMM comes last, see torch_ops."""
    route, weight, lora_A = call.route, saved.weight, saved.lora_A
    matmul = BACKENDS[route.config.backend].matmul
    if call.keep is None or ds is None or lora_A is None:
        return matmul(route, "dx", dy, weight, ds, lora_A, mask=call.mask, packed=call.packed)
    if route.problem.device is not None:
        through_adapter = torch.mm(ds, lora_A).mul_(call.keep).view(route.x_shape)
        return matmul(route, "dx", dy, weight, None, None, out=through_adapter)
    dx: Tensor = matmul(route, "dx", dy, weight, None, None, packed=call.packed)
    flatten(dx).add_(torch.mm(ds, lora_A).mul_(call.keep))
    return dx


def shrink_gradients(
    call: Call, dy: Tensor, s: Tensor | None, lora_B: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """ds [M, R] if dx or da will read it, and db [N, R] if lora_B wants its gradient.

    Rank 0 has no ds, and an empty db.
    """
    route = call.route
    needs, R = route.needs, route.problem.R
    db_dtype = route.param_dtypes[2] if "lora_B" in needs else None
    if R == 0:
        return None, None if db_dtype is None else dy.new_zeros(dy.shape[-1], 0, dtype=db_dtype)
    need_ds = "x" in needs or "lora_A" in needs
    if not need_ds and db_dtype is None:
        return None, None
    ops = BACKENDS[route.config.backend]
    ds, db = ops.shrink_reduce(route, dy, lora_B, call.scale, s, need_ds, db_dtype)
    return ds, db


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """dW [N, K] = dyᵀ x by the library."""
    return torch.mm(flatten(dy).t(), flatten(x)).to(dtype)
