"""One new token per sequence: M from 1 to 16, forward only, against the frozen layer.

The frozen layer is also what a merged one costs: the same product with another weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.providers import FROZEN, NAIVE, OURS, PEFT, PREPACKED, SMART
from benchmarks.shapes import FORWARD, GPU_LAYERS, LAYERS, Case
from benchmarks.suites.item import Item, Request, Suite
from benchmarks.suites.layers import makers_of, present, shape_of

CONTENDERS = (FROZEN, NAIVE, SMART, PEFT, OURS, PREPACKED)
TOKENS = (1, 2, 4, 8, 16)
_QUICK_LAYERS = (
    "llama-3.2-1b.q", "llama-3.2-1b.kv", "gpt2.c_fc", "llama-3.1-8b.q", "llama-3.1-8b.gate",
)  # fmt: skip
_QUICK_TOKENS = {"bf16": (1, 4, 16), "fp32": (1, 16), "fp16": (1,)}
R = 16


def items(request: Request) -> Iterator[Item]:
    providers = present(CONTENDERS, request.device)
    for dtype in request.dtypes:
        for layer in LAYERS if request.device == "cpu" else GPU_LAYERS:
            if not request.full and layer.key not in _QUICK_LAYERS:
                continue
            for M in TOKENS if request.full else _QUICK_TOKENS[dtype]:
                case = Case(layer, dtype, M, R)
                yield Item(
                    name=layer.key,
                    shape=shape_of(case),
                    dtype=dtype,
                    passes=(FORWARD,),
                    base=FROZEN,
                    contenders=partial(makers_of, case, providers, (FORWARD,), request.device),
                )


SUITE = Suite("decode", "One new token per sequence: M ≤ 16, forward only", 60, items)
