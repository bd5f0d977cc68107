"""Kohya's files: `lora_unet_<name with _ for .>.lora_down.weight`, `.lora_up.weight`, `.alpha`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lora_fused.convert.adapter import Adapter, LayerAdapter
from lora_fused.convert.files import Source, read_tensors

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


def from_kohya(
    source: Source, names: Iterable[str] | nn.Module, prefix: str = "lora_unet"
) -> Adapter:
    """The layers of one prefix ("lora_unet", "lora_te", "lora_te1", …) of a Kohya file.

    names: the module names of the model that the prefix stands for, or the model: dots and
    underscores became the same in the file. A layer without `.alpha` has alpha = r, as Kohya reads
    it. Tensors keep their shape ([r, in, 1, 1] of a 1×1 convolution).

    Raises ValueError for a layer that no name fits, or that two names fit.
    """
    tensors = read_tensors(source)
    by_flat = _by_flat_name(names)
    layers = {}
    for key, down in tensors.items():
        if not (key.startswith(f"{prefix}_") and key.endswith(DOWN)):
            continue
        stem = key.removesuffix(DOWN)
        flat = stem.removeprefix(f"{prefix}_")
        if flat not in by_flat:
            raise ValueError(f"from_kohya: the file has {stem}, but no module has such a name.")
        if stem + UP not in tensors:
            raise ValueError(f"the checkpoint has {key}, but no {stem + UP}.")
        alpha = tensors.get(stem + ALPHA)
        value = float(down.shape[0]) if alpha is None else float(alpha)
        layers[by_flat[flat]] = LayerAdapter(down, tensors[stem + UP], value)
    return Adapter(layers)


def to_kohya(adapter: Adapter, prefix: str = "lora_unet") -> dict[str, Tensor]:
    """The tensors of a Kohya file for one prefix; merge the dictionaries of several prefixes.

    alpha is written in the dtype of the weights, as Kohya does, or in float32 if it does not fit
    that; rsLoRA as alpha · √r. Raises ValueError for what Kohya's files cannot express.
    """
    tensors = {}
    for name, layer in adapter.layers.items():
        layer.refuse(name, "a Kohya file", "lora_bias", "magnitude", "embedding")
        stem = f"{prefix}_{name.replace('.', '_')}"
        tensors[stem + DOWN], tensors[stem + UP] = layer.lora_A, layer.lora_B
        alpha = torch.tensor(layer.plain_alpha, dtype=layer.lora_A.dtype)
        if float(alpha) != layer.plain_alpha:
            alpha = torch.tensor(layer.plain_alpha, dtype=torch.float32)
        tensors[stem + ALPHA] = alpha
    return tensors


def _by_flat_name(names: Iterable[str] | nn.Module) -> dict[str, str]:
    if isinstance(names, nn.Module):
        names = [name for name, module in names.named_modules() if not list(module.children())]
    by_flat: dict[str, str] = {}
    for name in names:
        if by_flat.setdefault(flat := name.replace(".", "_"), name) != name:
            raise ValueError(f"from_kohya: {name} and {by_flat[flat]} are both {flat} in the file.")
    return by_flat
