"""Small whole models, embeddings aside: forward, and the full training step with a loss."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.suites.item import Item, Request, Suite
from benchmarks.suites.training import Network, item_of

SMOLLM = Network("smollm2-135m", "llama", 576, 1536, 9, 3, 30, 49152, head=True)
GPT2 = Network("gpt2", "gpt2", 768, 3072, 12, 12, 12, 50257, head=True)
GPT2_MEDIUM = Network("gpt2-medium", "gpt2", 1024, 4096, 16, 16, 24, 50257, head=True)

_QUICK = {"bf16": ((SMOLLM, 128), (GPT2, 128)), "fp32": (), "fp16": ()}


def items(request: Request) -> Iterator[Item]:
    for dtype in request.dtypes:
        for model, M in _sizes(request, dtype):
            yield item_of(model, dtype, M, request.device)


def _sizes(request: Request, dtype: str) -> Iterator[tuple[Network, int]]:
    if request.device != "cpu":
        yield from ((model, 2048) for model in (SMOLLM, GPT2_MEDIUM) if dtype == "bf16")
    elif request.full:
        yield from ((model, M) for model in (SMOLLM, GPT2, GPT2_MEDIUM) for M in (128, 512))
    else:
        yield from _QUICK[dtype]


SUITE = Suite(
    "model", "Small models: forward and training step with a loss, by PEFT", 200, items, eager=True
)  # fmt: skip
