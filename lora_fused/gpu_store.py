"""What was learned about a GPU, on disk: one small JSON file per answer, named after its key.

The files lie in a directory for this device, its capability, this torch, this triton and this
lora_fused, under LORA_FUSED_CACHE_DIR (default: the user's cache directory). Files are replaced as
a whole, so that processes that write at the same time cannot lose each other's answers. A file that
is damaged, or holds the answer to another question, is ignored, with one warning per process.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
import warnings
from hashlib import blake2s
from pathlib import Path
from typing import Any

import torch

from lora_fused import autotune
from lora_fused.devices import Device

_MAX_NAME = 120
_warned: set[Path] = set()
_lessons = itertools.count()
_last_lesson = next(_lessons)


def directory(device: Device) -> Path:
    """Where the answers for this device and these versions live."""
    from lora_fused import __version__

    versions = f"torch{torch.__version__}-triton{_triton_version()}-lora_fused{__version__}"
    return autotune.cache_root() / autotune.file_name(
        f"{device.name}-{device.kind}{device.capability}-{versions}"
    )


@functools.cache
def _triton_version() -> str:
    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def path_of(device: Device, kind: str, key: str) -> Path:
    """The file of one answer. Long keys end in a digest of what was cut off."""
    name = autotune.file_name(f"{kind}-{key}")
    if len(name) > _MAX_NAME:
        name = f"{name[:_MAX_NAME]}-{blake2s(key.encode(), digest_size=6).hexdigest()}"
    return directory(device) / f"{name}.json"


def recall(device: Device, kind: str, key: str) -> dict[str, Any] | None:
    """The answer stored for a key of a kind ("timing", "check"), or None."""
    path = path_of(device, kind, key)
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(answer, dict) and answer.get("key") == key:
            return answer
        problem = "it belongs to something else"
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problem = str(error)
    if path.parent not in _warned:
        _warned.add(path.parent)
        warnings.warn(f"lora_fused: ignoring {path}: {problem}", stacklevel=2)
    return None


def remember(device: Device, kind: str, key: str, answer: dict[str, Any]) -> None:
    """Store the answer; a disk that cannot be written costs a warning, not the call."""
    global _last_lesson
    text = json.dumps({"key": key, **answer}, indent=1, sort_keys=True)
    autotune.write_text(path_of(device, kind, key), text)
    _last_lesson = next(_lessons)


def lessons() -> int:
    """A number that changes whenever this process has stored an answer."""
    return _last_lesson


def answers(device: Device, kind: str) -> list[dict[str, Any]]:
    """Every readable answer of a kind, in the order of their file names."""
    found = []
    for path in sorted(directory(device).glob(f"{kind}-*.json")):
        try:
            answer = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(answer, dict) and "key" in answer:
            found.append(answer)
    return found
