"""Peers that patch libraries at import must not change what the other providers run."""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# What the other providers stand on: a module, and a function or method in it.
_WATCHED = (
    ("torch", "compile"),
    ("torch", "Tensor.addmm_"),
    ("torch", "Tensor.matmul"),
    ("torch.nn", "Dropout.forward"),
    ("torch.nn", "Linear.forward"),
    ("torch.nn", "Module.__call__"),
    ("torch.nn.functional", "dropout"),
    ("torch.nn.functional", "linear"),
    ("peft.tuners.lora.layer", "Linear.forward"),
    ("peft.tuners.lora.layer", "LoraLayer._cast_input_dtype"),
    ("transformers.pytorch_utils", "Conv1D.forward"),
    ("loralib", "Linear.forward"),
)


@contextmanager
def leaving_others_alone(peer: str) -> Iterator[None]:
    """Functions that other providers call are put back, with a warning, if the import inside
    replaced them. What our adapters call of a peer is its own; the numerics check judges it."""
    before = [(module, path, _get(module, path)) for module, path in _WATCHED]
    yield
    for module, path, function in before:
        if function is not None and _get(module, path) is not function:
            owner, _, attribute = path.rpartition(".")
            setattr(_get(module, owner), attribute, function)
            warnings.warn(f"importing {peer} replaced {module}.{path}: put back", stacklevel=3)


def _get(module: str, path: str) -> Any:
    """The function, or the class that holds it; None where the module is not installed."""
    try:
        value: Any = importlib.import_module(module)
    except ImportError:
        return None
    for attribute in filter(None, path.split(".")):
        value = getattr(value, attribute)
    return value
