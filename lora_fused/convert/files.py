"""Reading and writing the tensors of a checkpoint: safetensors, or torch's own format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

Source = Mapping[str, Tensor] | str | os.PathLike[str] | nn.Module


def read_tensors(source: Source) -> dict[str, Tensor]:
    """The tensors of a file (.safetensors, or of torch.save), of a mapping, or of a module.

    Of a module only the adapters' parameters, which are known by their names.

    Raises TypeError for anything else, FileNotFoundError if there is no such file.
    """
    if isinstance(source, nn.Module):
        words = ("lora_", "adapter", "magnitude")
        named = source.named_parameters()
        return {n: p.detach() for n, p in named if any(word in n for word in words)}
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensors, Mapping):
        raise TypeError(f"{path} holds a {type(tensors).__name__}, expected a state dict.")
    return dict(tensors)


def write_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a state dict as safetensors (by the suffix .safetensors) or by torch.save."""
    if Path(path).suffix != ".safetensors":
        torch.save(dict(tensors), path)
        return
    from safetensors.torch import save_file

    # NOTE: safetensors refuses tensors that share memory, as the parts of a split layer do.
    own = {name: tensor.detach().clone(memory_format=torch.contiguous_format)
           for name, tensor in tensors.items()}  # fmt: skip
    save_file(own, path, metadata={"format": "pt"})


def pairs(
    tensors: Mapping[str, Tensor], suffix_A: str, suffix_B: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Module name → (A, B), and the tensors that are neither.

    Raises ValueError where one of a pair is missing.
    """
    found, others = {}, {}
    for key, tensor in tensors.items():
        if key.endswith(suffix_A):
            name = key.removesuffix(suffix_A)
            if name + suffix_B not in tensors:
                raise ValueError(f"the checkpoint has {key}, but no {name + suffix_B}.")
            found[name] = (tensor, tensors[name + suffix_B])
        elif not key.endswith(suffix_B):
            others[key] = tensor
        elif key.removesuffix(suffix_B) + suffix_A not in tensors:
            raise ValueError(f"the checkpoint has {key}, but no {key.removesuffix(suffix_B)}"
                             f"{suffix_A}.")  # fmt: skip
    return found, others
