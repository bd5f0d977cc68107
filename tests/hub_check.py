"""Run by test_hub in a process of its own, because `kernels` changes PEFT's class for good.

`python -m tests.hub_check DIR`: PEFT models computed by the kernel in DIR.
"""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch
from kernels import (
    LocalLayerRepository,
    Mode,
    get_local_kernel,
    kernelize,
    replace_kernel_forward_from_hub,
    use_kernel_mapping,
)
from peft.tuners.lora.layer import Linear

import lora_fused
from tests.peft_models import (
    DRAWS,
    LLAMA_LAYERS,
    adapted,
    assert_close_together,
    draws_of,
    gpt2,
    llama,
    tokens,
)


def main(folder: Path) -> None:
    kernel = get_local_kernel(folder)
    assert kernel.__name__ != lora_fused.__name__ and "lora_linear" in kernel.__all__
    calls = count_calls(kernel)
    replace_kernel_forward_from_hub(Linear, "LoraLinear")
    layer = LocalLayerRepository(folder, layer_name="LoraLinear")
    with use_kernel_mapping({"LoraLinear": {"cpu": layer}}, inherit_mapping=False):
        check_training(calls)
        check_variants(calls)
        check_compiled(kernel)
    print("fused calls:", len(calls))


def count_calls(kernel: ModuleType) -> list[None]:
    """One entry per fused call from now on."""
    calls: list[None] = []
    compute = kernel.layers.fused_call

    def counting(*args: object) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            calls.append(None)
        return compute(*args)

    kernel.layers.fused_call = counting
    return calls


def check_training(calls: list[None]) -> None:
    for build, config in ((llama, {}), (llama, {"lora_bias": True}), (gpt2, {})):
        torch.manual_seed(0)
        model = adapted(build(), **config)
        truth, baseline = draws_of(copy.deepcopy(model).double()), draws_of(model)
        before = len(calls)
        assert_close_together(draws_of(kernelize(model, mode=Mode.TRAINING)), truth, baseline)
        assert len(calls) - before == DRAWS * (LLAMA_LAYERS if build is llama else 8)


def check_variants(calls: list[None]) -> None:
    """What is not plain LoRA runs on PEFT's forward, and says so once."""
    model = adapted(llama(), use_dora=True)
    expected, before = model(tokens()).logits, len(calls)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(kernelize(model, mode=Mode.TRAINING)(tokens()).logits, expected)
    assert len(calls) == before
    told = [w for w in caught if "PEFT's own forward: the adapter uses DoRA" in str(w.message)]
    assert len(told) == 1


def check_compiled(kernel: ModuleType) -> None:
    model = adapted(llama())
    block = kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE).base_model.model.model
    mlp, x, names = block.layers[0].mlp, torch.randn(2, 5, 48), []

    def spy(graph: torch.fx.GraphModule, inputs: object) -> object:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(mlp, fullgraph=True, backend=spy)
    torch.testing.assert_close(compiled(x), mlp(x))
    assert sum(kernel.__name__ in name and "lora_linear" in name for name in names) == 3


if __name__ == "__main__":
    main(Path(sys.argv[1]))
