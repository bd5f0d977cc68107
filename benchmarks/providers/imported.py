"""Peers that patch libraries at import must not change what the other providers run."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# What the other providers stand on: module, class or function, attribute.
_WATCHED = (
    ("torch.nn.functional", "linear"),
    ("torch.nn.functional", "dropout"),
    ("torch", "compile"),
    ("torch", "Tensor.addmm_"),
    ("torch", "Tensor.matmul"),
    ("torch.nn", "Linear.forward"),
    ("torch.nn", "Dropout.forward"),
    ("torch.nn", "Module.__call__"),
    ("peft.tuners.lora.layer", "Linear.forward"),
    ("peft.tuners.lora.layer", "LoraLayer._cast_input_dtype"),
    ("transformers.pytorch_utils", "Conv1D.forward"),
    ("loralib", "Linear.forward"),
)


@contextmanager
def leaving_others_alone(peer: str) -> Iterator[None]:
    """Raises RuntimeError if what runs inside replaces a function that other providers call."""
    before = _functions()
    yield
    after = _functions()
    changed = [name for name, function in before.items() if after[name] is not function]
    if changed:
        raise RuntimeError(
            f"importing {peer} replaced {', '.join(changed)}: measure it in a run of its own"
        )


def _functions() -> dict[str, Any]:
    found = {}
    for module_name, path in _WATCHED:
        try:
            value: Any = importlib.import_module(module_name)
        except ImportError:
            continue
        for attribute in path.split("."):
            value = getattr(value, attribute)
        found[f"{module_name}.{path}"] = value
    return found
