"""Rounding between floating-point formats, all IEEE modes, from float64 or float32 values."""

from __future__ import annotations

import numpy as np

# name: (mantissa bits, smallest normal exponent, largest exponent, has infinity, bits)
_FORMATS = {
    "f32": (23, -126, 127),
    "tf32": (10, -126, 127),
    "bf16": (7, -126, 127),
    "f16": (10, -14, 15),
}


def round_to(value: np.ndarray, kind: str, rounding: str) -> np.ndarray:
    """float64 values rounded to the values of a format, overflow by the rounding's rule."""
    mantissa, least, greatest = _FORMATS[kind]
    value = np.asarray(value, np.float64)
    finite = np.isfinite(value) & (value != 0)
    _, exponent = np.frexp(np.where(finite, value, 1.0))
    step = np.ldexp(1.0, np.maximum(exponent - 1, least) - mantissa)
    scaled = np.where(finite, value, 0.0) / step
    rounders = {
        "rn": np.rint,
        "rz": np.trunc,
        "rm": np.floor,
        "rp": np.ceil,
        "rna": lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x),
    }
    result = rounders[rounding](scaled) * step
    largest = np.ldexp(2.0 - 2.0**-mantissa, greatest)
    over = finite & (np.abs(result) > largest)
    stays = {
        "rn": False,
        "rna": False,
        "rz": True,
        "rm": value > 0,
        "rp": value < 0,
    }[rounding]
    limit = np.where(stays, np.copysign(largest, value), np.copysign(np.inf, value))
    result = np.where(over, limit, np.copysign(result, value))
    return np.where(finite, result, value)


def round_f64_to_f32(value: np.ndarray, rounding: str) -> np.ndarray:
    if rounding == "rn":
        return value.astype(np.float32)
    return round_to(value, "f32", rounding).astype(np.float32)


def bf16_bits(value: np.ndarray) -> np.ndarray:
    """float32 or float64 values to bf16 bits, nearest even; NaN becomes 0x7fff."""
    value = np.asarray(value)
    if value.dtype == np.float64:
        value = round_to(value, "bf16", "rn").astype(np.float32)
    bits = value.view(np.uint32)
    rounded = (bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(
        16
    )
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded.astype(np.uint16))


def f16_bits(value: np.ndarray) -> np.ndarray:
    bits = np.asarray(value).astype(np.float16).view(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), bits)


def to_float(bits: np.ndarray, kind: str) -> np.ndarray:
    """Register values of a PTX type as numpy floats; packed types get a last axis of two."""
    if kind in ("f32", "f64"):
        return bits
    if kind == "f16":
        return bits.astype(np.float32)
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    halves = np.ascontiguousarray(bits)[..., None]
    if kind == "f32x2":
        return halves.view(np.float32)
    halves = halves.view(np.uint16)
    if kind == "f16x2":
        return halves.view(np.float16).astype(np.float32)
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_float(value: np.ndarray, kind: str) -> np.ndarray:
    """The inverse of `to_float`, rounding to nearest even."""
    if kind in ("f32", "f64"):
        return value
    if kind == "f16":
        return f16_bits(value).view(np.float16)
    if kind == "bf16":
        return bf16_bits(value)
    if kind == "f32x2":
        return np.ascontiguousarray(value.astype(np.float32)).view(np.uint64)[..., 0]
    bits = f16_bits(value) if kind == "f16x2" else bf16_bits(value)
    return np.ascontiguousarray(bits).view(np.uint32)[..., 0]
