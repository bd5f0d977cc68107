"""One layer for several (qkv_proj, gate_up_proj) and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_fused.convert.adapter import Adapter, LayerAdapter


def split_layers(adapter: Adapter, name: str, parts: Mapping[str, int]) -> Adapter:
    """Every layer called `name` as one layer per part, which has so many of its output rows.

    split_layers(adapter, "gate_up_proj", {"gate_proj": 11008, "up_proj": 11008})

    All parts get the joined lora_A and their rows of lora_B, unless lora_B is block-diagonal: then
    each part gets its own block, which undoes join_layers bit for bit. Raises ValueError if the
    parts do not add up to the layer.
    """
    layers: dict[str, LayerAdapter] = {}
    for full, layer in adapter.layers.items():
        stem, last = _stem(full)
        if last != name:
            layers[full] = layer
            continue
        pieces = split_rows(layer, list(parts.values()), full)
        layers.update(zip((stem + part for part in parts), pieces, strict=True))
    return replace(adapter, layers=layers)


def join_layers(adapter: Adapter, parts: Sequence[str], name: str) -> Adapter:
    """The layers called like `parts` beside each other as one layer `name`, rows in that order.

    With one lora_A for all of them the rank stays; otherwise the ranks add up and lora_B becomes
    block-diagonal. Raises ValueError where a part is missing or the scalings differ.
    """
    layers: dict[str, LayerAdapter] = {}
    for full, layer in adapter.layers.items():
        stem, last = _stem(full)
        if last not in parts:
            layers[full] = layer
        elif last == parts[0] or stem + name not in layers:
            missing = [part for part in parts if stem + part not in adapter.layers]
            if missing:
                raise ValueError(f"{stem}{name}: there is no adapter for {', '.join(missing)}.")
            pieces = [adapter.layers[stem + part] for part in parts]
            layers[stem + name] = join_rows(pieces, stem + name)
    return replace(adapter, layers=layers)


def split_rows(layer: LayerAdapter, sizes: Sequence[int], name: str = "") -> list[LayerAdapter]:
    """The parts of a linear layer that make sizes[i] of its output rows; see split_layers."""
    if layer.lora_B.dim() != 2 or layer.embedding:
        raise ValueError(f"{name}: only linear layers can be split.")
    if sum(sizes) != layer.lora_B.shape[0]:
        raise ValueError(
            f"{name}: the parts have {' + '.join(map(str, sizes))} rows, "
            f"expected {layer.lora_B.shape[0]}, the rows of lora_B."
        )
    rows = layer.lora_B.split(list(sizes))
    columns = _own_columns(rows)
    biases: Sequence[Tensor | None] = [None] * len(sizes)
    if layer.lora_bias is not None:
        biases = layer.lora_bias.split(list(sizes))
    if layer.magnitude is not None:
        raise ValueError(f"{name}: a layer with DoRA's magnitude cannot be split or joined.")
    parts = []
    for b, own, bias in zip(rows, columns, biases, strict=True):
        part = replace(layer, lora_B=b, lora_bias=bias)
        if own is not None:
            alpha = layer.alpha if layer.use_rslora else layer.alpha * len(own) / layer.rank
            if layer.use_rslora:
                alpha = layer.scaling * len(own) ** 0.5
            part = replace(part, lora_A=layer.lora_A[own], lora_B=b[:, own], alpha=alpha)
        parts.append(part)
    return parts


def join_rows(layers: Sequence[LayerAdapter], name: str = "") -> LayerAdapter:
    """Linear layers of one input as one layer; see join_layers."""
    first = layers[0]
    for layer in layers:
        layer.refuse(name, "a joined layer", "magnitude", "embedding")
        if layer.lora_B.dim() != 2:
            raise ValueError(f"{name}: only linear layers can be joined.")
    scalings = [layer.scaling for layer in layers]
    if max(scalings) - min(scalings) > 1e-12 * abs(max(scalings)):
        raise ValueError(f"{name}: the parts have scalings {scalings}, expected one for all.")
    b = [layer.lora_B for layer in layers]
    bias = _joined_bias(layers)
    if all(torch.equal(layer.lora_A, first.lora_A) for layer in layers):
        return replace(first, lora_B=torch.cat(b), lora_bias=bias)
    a = torch.cat([layer.lora_A for layer in layers])
    alpha = first.alpha * len(a) / first.rank
    if first.use_rslora:
        alpha = first.scaling * len(a) ** 0.5
    return replace(first, lora_A=a, lora_B=torch.block_diag(*b), alpha=alpha, lora_bias=bias)


def _joined_bias(layers: Sequence[LayerAdapter]) -> Tensor | None:
    if all(layer.lora_bias is None for layer in layers):
        return None
    return torch.cat([
        layer.lora_B.new_zeros(layer.lora_B.shape[0]) if layer.lora_bias is None
        else layer.lora_bias for layer in layers
    ])  # fmt: skip


def _own_columns(rows: Sequence[Tensor]) -> list[Tensor | None]:
    """For each part the columns of lora_B that are its own, if the parts share none; else None."""
    used = torch.stack([part.ne(0).any(0) for part in rows])
    if bool((used.sum(0) != 1).any()):
        return [None] * len(rows)
    return [part.nonzero().flatten() for part in used]


def _stem(name: str) -> tuple[str, str]:
    stem, dot, last = name.rpartition(".")
    return stem + dot, last
