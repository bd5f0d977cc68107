"""The checks on the arguments, in a fixed order: device, dtype, shape, layout. One sentence each.

A sentence says what was wrong, what was given and what was expected; tests hold them word for word.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: autocast's where it is on (it leaves float64 alone), else x's."""
    if x.dtype == torch.float64 or not autocast_is_on(x):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def autocast_is_on(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    device_type = x.device.type
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def check_call(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    compute: torch.dtype,
    cast_weight: bool = False,
) -> None:
    """Check what lora_linear was given, against x and weight.

    cast_weight: a weight of another dtype is welcome, as under autocast. Raises ValueError for a
    device, shape or layout, TypeError for a dtype.
    """
    others = (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B), ("bias", bias))
    for name, tensor in others:
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"lora_linear: {name} is on {tensor.device}, expected {x.device}, the device of x."
            )
    for name, tensor in (("x", x), *others):
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise TypeError(
                f"lora_linear: {name} has dtype {tensor.dtype}, expected a floating-point dtype."
            )
    wide = torch.float64 in (weight.dtype, compute)  # autocast leaves float64 alone
    if weight.dtype != compute and (wide or not cast_weight):
        origin = "the dtype of autocast" if cast_weight else "the dtype of x"
        raise TypeError(
            f"lora_linear: weight has dtype {weight.dtype}, expected {compute}, {origin}."
        )
    _check_shapes(x, weight, lora_A, lora_B, bias)
    for name, tensor in (("x", x), *others):
        if tensor is not None and tensor.layout != torch.strided:
            raise ValueError(
                f"lora_linear: {name} has layout {tensor.layout}, expected torch.strided."
            )


def _check_shapes(
    x: Tensor, weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, bias: Tensor | None
) -> None:
    if weight.dim() != 2:
        raise ValueError(
            f"lora_linear: weight has shape {list(weight.shape)}, "
            "expected [out_features, in_features]."
        )
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(
            f"lora_linear: x has shape {list(x.shape)}, expected [..., {K}], "
            "the in_features of weight."
        )
    if lora_A is not None and lora_B is not None:
        if lora_A.dim() != 2 or lora_A.shape[1] != K:
            raise ValueError(
                f"lora_linear: lora_A has shape {list(lora_A.shape)}, expected [r, {K}], "
                "rank by the in_features of weight."
            )
        if lora_B.dim() != 2 or lora_B.shape[0] != N or lora_B.shape[1] != lora_A.shape[0]:
            raise ValueError(
                f"lora_linear: lora_B has shape {list(lora_B.shape)}, "
                f"expected [{N}, {lora_A.shape[0]}], "
                "the out_features of weight by the rank of lora_A."
            )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != N):
        raise ValueError(
            f"lora_linear: bias has shape {list(bias.shape)}, expected [{N}], "
            "the out_features of weight."
        )


def check_dropout(dropout_p: float, seed: int | Tensor | None) -> None:
    """Raises ValueError for a value out of range, TypeError for a seed of another type."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"lora_linear: dropout_p is {dropout_p}, expected a number in [0, 1].")
    if seed is None:
        return
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"lora_linear: seed is a tensor of {seed.numel()} {seed.dtype}, "
                "expected one torch.int64."
            )
    elif not isinstance(seed, int):
        raise TypeError(
            f"lora_linear: seed is a {type(seed).__name__}, expected an int or an int64 tensor."
        )
    elif not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"lora_linear: seed is {seed}, expected 64 bits.")


def check_scaling(scaling: float) -> None:
    """Raises TypeError for a tensor: the scale is a constant, it gets no gradient."""
    if isinstance(scaling, Tensor):
        raise TypeError("lora_linear: scaling is a Tensor, expected a float.")
