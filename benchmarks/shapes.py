"""The cases made of layers, and how many FLOPs a case is worth."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.models import MODELS, PEERS
from benchmarks.models import Layer as Layer

FORWARD = "F"
FORWARD_BACKWARD = "F+B"
PASSES = (FORWARD, FORWARD_BACKWARD)


def _layers(*keys: str) -> tuple[Layer, ...]:
    known = {layer.key: layer for layer in (*MODELS, *PEERS)}
    return tuple(known[key] for key in keys)


LAYERS = _layers(
    *("gpt2.c_attn", "gpt2.c_fc", "roberta-large.query"),
    *("llama-3.2-1b.q", "llama-3.2-1b.kv", "llama-3.2-1b.gate", "llama-3.2-1b.down"),
    *("qwen2.5-7b.q", "qwen2.5-7b.kv", "square.4096"),
)
"""Of a run that names none. The others of models.py join by --layers."""
GPU_LAYERS = _layers(
    *("llama-3.1-8b.q", "llama-3.1-8b.kv", "llama-3.1-8b.gate", "llama-3.1-8b.down"),
    *("qwen2.5-7b.q", "gpt2.c_attn", "nemo.ragged"),
)
TOKENS = (1, 16, 128, 512, 2048)
RANKS = (8, 16, 64)
DTYPES = ("bf16", "fp32", "fp16")
DROPOUTS = (0.0, 0.05)


@dataclass(frozen=True)
class Case:
    """One layer at one size and dtype. All providers, and all dropouts, are timed side by side."""

    layer: Layer
    dtype: str
    M: int
    R: int
    dropouts: tuple[float, ...] = field(default=(0.0,))

    @property
    def label(self) -> str:
        return f"{self.layer.key} {self.dtype} M={self.M} r={self.R}"


# The quick set, in the order in which it runs: when the time is up the rest is named as skipped, so
# every class of M and dtype comes early once. Columns: layer, M, R, with dropout.
_QUICK: dict[str, tuple[tuple[str, int, int, bool], ...]] = {
    "bf16": (
        ("llama-3.2-1b.q", 512, 16, True),
        ("llama-3.2-1b.q", 128, 16, False),
        ("llama-3.2-1b.q", 16, 16, False),
        ("llama-3.2-1b.q", 1, 16, False),
        ("gpt2.c_fc", 512, 8, True),
        ("gpt2.c_attn", 128, 8, True),
        ("roberta-large.query", 16, 8, True),
        ("gpt2.c_attn", 1, 8, False),
        ("roberta-large.query", 2048, 16, False),
        ("qwen2.5-7b.kv", 128, 16, False),
        ("qwen2.5-7b.kv", 16, 8, False),
        ("qwen2.5-7b.q", 1, 8, False),
        ("llama-3.2-1b.kv", 512, 8, False),
        ("llama-3.2-1b.q", 2048, 8, True),
        ("llama-3.2-1b.gate", 128, 8, False),
        ("llama-3.2-1b.down", 16, 16, False),
        ("llama-3.2-1b.gate", 1, 16, False),
        ("roberta-large.query", 512, 64, False),
    ),
    "fp32": (
        ("llama-3.2-1b.q", 512, 16, True),
        ("llama-3.2-1b.q", 128, 16, False),
        ("llama-3.2-1b.q", 16, 16, False),
        ("llama-3.2-1b.q", 1, 16, False),
        ("gpt2.c_fc", 512, 8, True),
        ("gpt2.c_attn", 128, 8, True),
        ("roberta-large.query", 16, 8, False),
        ("gpt2.c_attn", 1, 8, False),
        ("qwen2.5-7b.kv", 128, 16, False),
        ("roberta-large.query", 2048, 16, False),
        ("llama-3.2-1b.kv", 512, 8, False),
        ("roberta-large.query", 512, 64, False),
    ),
    "fp16": (
        ("roberta-large.query", 16, 8, False),
        ("gpt2.c_attn", 128, 16, False),
    ),
}


def gpu_cases() -> list[Case]:
    """What a GPU report measures: training and decoding sizes, dropout on one of them.

    The most telling come first, for a run whose time is up leaves out the rest.
    """
    cases = []
    for M in (8192, 2048, 512, 16, 1):
        for layer in GPU_LAYERS:
            dropouts = DROPOUTS if (M, layer.name) in ((8192, "q"), (2048, "q")) else (0.0,)
            ranks = (16, 64) if layer.name in ("q", "kv") and M >= 2048 else (16,)
            for dtype in DTYPES if (M, layer.name) == (2048, "q") else ("bf16",):
                cases += [Case(layer, dtype, M, R, dropouts) for R in ranks]
    return cases


def quick_cases() -> list[Case]:
    """The representative subset, dtypes taking turns so that none is last in line."""
    layers = {layer.key: layer for layer in LAYERS}
    queues = {
        dtype: [
            Case(layers[key], dtype, M, R, DROPOUTS if dropout else (0.0,))
            for key, M, R, dropout in rows
        ]
        for dtype, rows in _QUICK.items()
    }
    turns = [
        queue[i : i + 1] for i in range(max(map(len, queues.values()))) for queue in queues.values()
    ]
    return [case for turn in turns for case in turn]


def product_cases(
    layers: Iterable[Layer] = LAYERS,
    dtypes: Iterable[str] = DTYPES,
    tokens: Sequence[int] | None = None,
    ranks: Sequence[int] | None = None,
    dropouts: tuple[float, ...] = DROPOUTS,
) -> list[Case]:
    """Every combination, small M first.

    tokens, ranks: None stands for those of the layer's own benchmark, else for TOKENS and RANKS.
    """
    cases = [
        Case(layer, dtype, M, R, dropouts)
        for dtype in dtypes
        for layer in layers
        for M in tokens or layer.tokens or TOKENS
        for R in ranks or layer.ranks or RANKS
    ]
    return sorted(cases, key=lambda case: case.M)


def parse_layer(text: str) -> list[Layer]:
    """'gpt2', 'vllm' (all of a model or of a peer's benchmark), 'gpt2.c_fc' (one layer) or
    '768x2304' (a made-up K x N)."""
    if size := re.fullmatch(r"0*([1-9]\d*)x0*([1-9]\d*)", text):
        return [Layer("custom", text, int(size[1]), int(size[2]))]
    found = [layer for layer in (*MODELS, *PEERS) if text in (layer.key, layer.model)]
    if not found:
        known = ", ".join(dict.fromkeys(layer.model for layer in (*MODELS, *PEERS)))
        raise ValueError(f"no layer is called {text!r}; known: {known}, or KxN such as 768x2304")
    return found


def flops(layer: Layer, M: int, R: int, pass_: str) -> int:
    """Useful FLOPs of a LoRA layer (R = 0: of the frozen layer).

    Forward x Wᵀ and the two rank-R products; backward dy W and their four gradients.
    """
    base = 2 * M * layer.K * layer.N
    rank = 2 * M * R * (layer.K + layer.N)
    return base + rank if pass_ == FORWARD else 2 * base + 3 * rank
