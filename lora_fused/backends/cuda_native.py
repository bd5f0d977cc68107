"""How the CUDA backend talks to lora_fused._C.cuda: places, numbers instead of tensors, workspaces.

Pointers and streams go over as integers, matrices as (data, row stride, column stride). Nothing
here synchronises with the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_fused.backends.cpu import native as native_module
from lora_fused.config import Mask
from lora_fused.devices import tf32_is_allowed

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TF32 = 3
"""How a kernel multiplies, where fp32 may be rounded to TF32; else the code of the dtype."""

_HEADER_WORDS = 4  # before the tickets: the word in which a kernel says why it trapped
_FIRST_WORDS = 4096

MatrixTuple = tuple[int, int, int]
WorkspaceTuple = tuple[int, int, int]
_Words = dict[tuple[int, int], tuple[int, Tensor]]  # by device and stream: capture and words
_words: _Words = {}
_captured: _Words = {}


class Place(NamedTuple):
    """Where a kernel runs: a device, its number, and torch's current stream on it."""

    device: torch.device
    number: int
    stream: int


def native() -> Any:
    """The native CUDA entry points, or None where they were not built."""
    return getattr(native_module(), "cuda", None)


def place_of(t: Tensor) -> Place:
    """The place of a CUDA tensor."""
    number = t.device.index
    return Place(t.device, number, torch._C._cuda_getCurrentRawStream(number))


def math_of(dtype: torch.dtype) -> int:
    """The code of a compute dtype; fp32 as torch's matrix multiplications are set."""
    return TF32 if dtype == torch.float32 and tf32_is_allowed() else DTYPE_CODES[dtype]


def matrix(t: Tensor) -> MatrixTuple:
    """A 2-D tensor."""
    return t.data_ptr(), t.stride(0), t.stride(1)


def transposed(t: Tensor) -> MatrixTuple:
    """A 2-D tensor seen as its transpose."""
    return t.data_ptr(), t.stride(1), t.stride(0)


def output(m: MatrixTuple, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """A matrix that a kernel writes in a dtype."""
    return *m, DTYPE_CODES[dtype]


def mask_words(mask: Mask | None) -> tuple[int, int, int]:
    """Pointer to the seed on the device or 0, the seed where it is a number, the threshold."""
    if mask is None:
        return 0, 0, 0
    if isinstance(mask.seed, Tensor) and mask.seed.device.type != "cpu":
        return mask.seed.data_ptr(), 0, mask.threshold
    return 0, int(mask.seed) & 0xFFFFFFFFFFFFFFFF, mask.threshold


def output_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel writes a result that is wanted in this one."""
    return dtype if dtype in DTYPE_CODES else torch.float32


def workspace(place: Place, partials: int, tickets: int) -> tuple[WorkspaceTuple, object]:
    """Pointers to `partials` floats, `tickets` zeroed words and the error word; and their owners,
    which the caller keeps until the launch is queued.

    Partial sums come fresh from torch's allocator, ordered by the stream. Kernels leave the words
    as they found them, so that one set serves every launch of a stream, and every replay of a
    graph has the set that was made while it was captured: graphs that run side by side share none.
    """
    if partials == tickets == 0:
        return (0, 0, 0), None
    sums = torch.empty(partials, dtype=torch.float32, device=place.device) if partials else None
    words = _zeroed_words(place, _HEADER_WORDS + tickets)
    start = words.data_ptr()
    pointers = (0 if sums is None else sums.data_ptr(), start + 4 * _HEADER_WORDS, start)
    return pointers, (sums, words)


def _zeroed_words(place: Place, count: int) -> Tensor:
    capture = native().capture_id(place.stream)
    key = (place.number, place.stream)
    known = _words.get(key) if capture == 0 else _captured.get(key)
    if known is not None and known[0] == capture and len(known[1]) >= count:
        return known[1]
    size = max(count, _FIRST_WORDS)
    words = torch.zeros(size, dtype=torch.int32, device=place.device)
    (_captured if capture else _words)[key] = (capture, words)
    return words
