"""Fundamental types of PTX as numpy types ("Fundamental Types" in the ISA)."""

from __future__ import annotations

import numpy as np

from .instruction import type_bytes

RAW = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
}

_NUMPY = {
    **{f"{kind}{8 * size}": raw for size, raw in RAW.items() for kind in "bu"},
    **{f"s{8 * size}": np.dtype(f"i{size}") for size in RAW},
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "bf16": RAW[2],
    "tf32": RAW[4],
    "f16x2": RAW[4],
    "bf16x2": RAW[4],
    "f32x2": RAW[8],
    "pred": np.dtype(bool),
}


def numpy_type(name: str) -> np.dtype:
    """The numpy type that holds a PTX type; bf16 and packed types stay raw bits."""
    return _NUMPY[name]


def is_type(name: str) -> bool:
    return name in _NUMPY


def is_signed(name: str) -> bool:
    return name[0] == "s"


__all__ = ["RAW", "is_signed", "is_type", "numpy_type", "type_bytes"]
