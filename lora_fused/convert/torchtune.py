"""torchtune's checkpoints: `<m>.lora_a.weight`, `<m>.lora_b.weight`; its names and row order."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from lora_fused.convert.adapter import Adapter, LayerAdapter
from lora_fused.convert.files import Source, pairs, read_tensors

_TO_HF = {
    "layers.{}.attn.q_proj": "model.layers.{}.self_attn.q_proj",
    "layers.{}.attn.k_proj": "model.layers.{}.self_attn.k_proj",
    "layers.{}.attn.v_proj": "model.layers.{}.self_attn.v_proj",
    "layers.{}.attn.output_proj": "model.layers.{}.self_attn.o_proj",
    "layers.{}.mlp.w1": "model.layers.{}.mlp.gate_proj",
    "layers.{}.mlp.w2": "model.layers.{}.mlp.down_proj",
    "layers.{}.mlp.w3": "model.layers.{}.mlp.up_proj",
    "output": "lm_head",
}
_FROM_HF = {hf: theirs for theirs, hf in _TO_HF.items()}


@dataclass(frozen=True)
class Rotary:
    """Attention whose q and k rows torchtune stores in another order than Hugging Face.

    torchtune rotates neighbouring elements of a head, Hugging Face its two halves, so the rows of
    q_proj and k_proj are permuted within each head (Llama, Mistral, Gemma; not Qwen2 and Phi-3,
    for which rotary=None). Column order, hence lora_A, is the same.
    """

    num_heads: int
    num_kv_heads: int

    def to_halves(self, name: str, rows: Tensor) -> Tensor:
        """Rows [out, …] of q_proj or k_proj in Hugging Face's order; others as they are."""
        return self._permuted(name, rows, pairs_inside=True)

    def to_neighbours(self, name: str, rows: Tensor) -> Tensor:
        """Rows [out, …] of q_proj or k_proj in torchtune's order; those of others as they are."""
        return self._permuted(name, rows, pairs_inside=False)

    def _permuted(self, name: str, rows: Tensor, pairs_inside: bool) -> Tensor:
        kind = name.rsplit(".", 1)[-1]
        if kind not in ("q_proj", "k_proj"):
            return rows
        heads = self.num_heads if kind == "q_proj" else self.num_kv_heads
        if rows.shape[0] % (2 * heads) != 0:
            raise ValueError(f"{name}: {rows.shape[0]} rows are not {heads} heads of even size.")
        half = rows.shape[0] // heads // 2
        shape = (heads, half, 2) if pairs_inside else (heads, 2, half)
        return rows.view(*shape, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def from_torchtune(
    source: Source, *, rotary: Rotary | None, lora_alpha: float | None = None
) -> Adapter:
    """A LoRA adapter of torchtune with Hugging Face's module names and row order.

    source: a live model, a state dict, or the adapter file that a recipe saved. rotary: the heads
    of the model, or None for a model whose rows torchtune does not permute (see Rotary).
    lora_alpha: torchtune stores none in the file; of a live model it is read. Modules whose names
    are not those of torchtune's decoder keep them.

    Raises ValueError if lora_alpha is missing or the checkpoint is not whole.
    """
    alphas = {}
    if isinstance(source, nn.Module):
        alphas = {n: float(m.alpha) for n, m in source.named_modules() if hasattr(m, "lora_a")}
    found, rest = pairs(read_tensors(source), ".lora_a.weight", ".lora_b.weight")
    layers = {}
    for name, (a, b) in found.items():
        alpha = alphas.get(name, lora_alpha)
        if alpha is None:
            raise ValueError("from_torchtune: lora_alpha is None; the file does not hold it.")
        magnitude, ours = rest.pop(f"{name}.magnitude", None), to_hf_name(name)
        if rotary is not None:
            b = rotary.to_halves(ours, b)
            magnitude = None if magnitude is None else rotary.to_halves(ours, magnitude)
        layers[ours] = LayerAdapter(a, b, float(alpha), magnitude=magnitude)
    return Adapter(layers)


def to_torchtune(adapter: Adapter, *, rotary: Rotary | None) -> dict[str, Tensor]:
    """The state dict that torchtune loads for these adapters. rotary: as for from_torchtune.

    rsLoRA becomes alpha · √r. Raises ValueError where torchtune cannot express it: different ranks
    or alphas, a lora_bias, embeddings.
    """
    adapter.one("rank", "torchtune")
    adapter.one("plain_alpha", "torchtune")
    tensors = {}
    for name, layer in adapter.layers.items():
        layer.refuse(name, "torchtune", "lora_bias", "embedding")
        b, magnitude, theirs = layer.lora_B, layer.magnitude, to_torchtune_name(name)
        if rotary is not None:
            b = rotary.to_neighbours(name, b)
            magnitude = None if magnitude is None else rotary.to_neighbours(name, magnitude)
        tensors[f"{theirs}.lora_a.weight"] = layer.lora_A
        tensors[f"{theirs}.lora_b.weight"] = b
        if magnitude is not None:
            tensors[f"{theirs}.magnitude"] = magnitude
    return tensors


def to_hf_name(name: str) -> str:
    """model.layers.0.self_attn.o_proj of layers.0.attn.output_proj; other names as they are."""
    return _translated(name, _TO_HF)


def to_torchtune_name(name: str) -> str:
    """layers.0.attn.output_proj of model.layers.0.self_attn.o_proj; other names as they are."""
    return _translated(name, _FROM_HF)


def _translated(name: str, names: dict[str, str]) -> str:
    number = re.search(r"(?<=layers\.)\d+(?=\.)", name)
    if number is None:
        return names.get(name, name)
    pattern = f"{name[: number.start()]}{{}}{name[number.end() :]}"
    return names[pattern].format(number[0]) if pattern in names else name
