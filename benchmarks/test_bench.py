"""The layers as pytest-benchmark sees them: `pytest benchmarks/test_bench.py --benchmark-enable`.

For those who keep their numbers in that tool. The harness itself (`python -m benchmarks`) times the
providers in turns, which is what makes their ratios hold on a busy machine.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.providers import PROVIDERS, Provider
from benchmarks.shapes import FORWARD, LAYERS, PASSES, Case
from benchmarks.tensors import make_tensors

CASES = [
    Case(layer, dtype, M, 16)
    for layer in LAYERS
    if layer.key in ("llama-3.2-1b.q", "gpt2.c_attn")
    for dtype in ("bf16", "fp32")
    for M in (1, 128)
]


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_layer(benchmark: Any, case: Case, provider: Provider, pass_: str) -> None:
    missing = provider.missing()
    if missing:
        pytest.skip(missing)
    torch.set_num_threads(1)
    built = provider.build(make_tensors(case), 0.0)
    benchmark.group = f"{case.label} {pass_}"
    benchmark(built.forward if pass_ == FORWARD else built.forward_backward)
