"""One block of a decoder, attention and norms included: forward, and the full training step."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.suites.item import Item, Request, Suite
from benchmarks.suites.training import Network, item_of


def _block(name: str, family: str, width: int, hidden: int, heads: int, kv_heads: int) -> Network:
    return Network(name, family, width, hidden, heads, kv_heads, 1, 8, head=False)


LLAMA_1B = _block("llama-3.2-1b", "llama", 2048, 8192, 32, 8)
GPT2 = _block("gpt2", "gpt2", 768, 3072, 12, 12)
SMOLLM = _block("smollm2-135m", "llama", 576, 1536, 9, 3)
LLAMA_8B = _block("llama-3.1-8b", "llama", 4096, 14336, 32, 8)

# In the order in which they run: block, M.
_QUICK = {
    "bf16": ((SMOLLM, 512), (GPT2, 512), (LLAMA_1B, 256)),
    "fp32": ((GPT2, 512),),
    "fp16": (),
}


def items(request: Request) -> Iterator[Item]:
    for dtype in request.dtypes:
        for block, M in _sizes(request, dtype):
            yield item_of(block, dtype, M, request.device)


def _sizes(request: Request, dtype: str) -> Iterator[tuple[Network, int]]:
    if request.device != "cpu":  # a GPU is busy only with more tokens
        yield from ((block, M) for block in (LLAMA_8B, LLAMA_1B) for M in (4096, 512))
    elif request.full:
        every = (LLAMA_1B, GPT2, SMOLLM, LLAMA_8B)
        yield from ((block, M) for M in (1, 128, 512, 2048) for block in every)
    else:
        yield from _QUICK[dtype]


SUITE = Suite(
    "block", "One block of a decoder: forward and training step, by PEFT", 120, items, eager=True
)  # fmt: skip
