"""However the layers came to be, and under torch.compile: the hosts of accelerated layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora.layer import Linear

from lora_fused.integrations.peft import (
    accelerate,
    explain,
    register,
    restore,
)
from tests.peft_models import (
    GPT2_LAYERS,
    LLAMA_LAYERS,
    adapted,
    config_for,
    count,
    gpt2,
    llama,
    tokens,
)


def test_adapters_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # NOTE: transformers 5.24 asks for a peft that came out after it, and works with this one.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.15.0", raising=False)
    model = llama()
    model.add_adapter(config_for(model))
    stock = copy.deepcopy(model)
    assert len(accelerate(model, verbose=False).fused) == LLAMA_LAYERS
    torch.testing.assert_close(model(tokens()).logits, stock(tokens()).logits)
    model.save_pretrained(tmp_path)
    other = llama()
    other.load_adapter(tmp_path)
    assert len(accelerate(other, verbose=False).fused) == LLAMA_LAYERS
    other(tokens())
    assert explain(other).fused_calls == LLAMA_LAYERS
    model.disable_adapters()
    model(tokens())
    assert explain(model).stock_calls == {"the adapters are disabled": LLAMA_LAYERS}


def test_injected_adapters() -> None:
    model = inject_adapter_in_model(config_for(llama()), llama())
    accelerate(model, verbose=False)
    set_peft_model_state_dict(model, {})
    model(tokens())
    assert explain(model).fused_calls == LLAMA_LAYERS


def test_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16,
    ).eval()  # fmt: skip
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    inputs: dict[str, Any] = {
        "sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 5, 16), "return_dict": False,
    }  # fmt: skip
    (expected,) = model(**inputs)
    layers = len(accelerate(model, verbose=False).fused)
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-4, atol=1e-4)
    assert explain(model).fused_calls == layers > 0
    model.set_adapters(["default"], [0.25])
    scaled = model(**inputs)[0]
    assert not torch.allclose(scaled, expected)
    restore(model)
    torch.testing.assert_close(model(**inputs)[0], scaled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_register(build: Any, tmp_path: Path) -> None:
    model = build()
    config = register(config_for(model), match_torch_rng=True)
    fused = get_peft_model(copy.deepcopy(model), config)
    calls = LLAMA_LAYERS if build is llama else GPT2_LAYERS
    assert count(fused) == calls
    fused(tokens())
    assert explain(fused).fused_calls == calls
    fused.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        copy.deepcopy(model), tmp_path, config=register(LoraConfig.from_pretrained(tmp_path))
    )
    assert count(loaded) == calls
    torch.testing.assert_close(loaded(tokens()).logits, fused.eval()(tokens()).logits)
    restore(loaded)
    assert {type(m) for m in loaded.modules() if isinstance(m, Linear)} == {Linear}


class OtherLinear(nn.Linear):
    """As quantised layers are: a subclass of nn.Linear that means something else."""


def test_register_takes_exact_classes_only() -> None:
    model = nn.Sequential(nn.Linear(4, 4), OtherLinear(4, 4), nn.Conv1d(4, 4, 1))
    fused = get_peft_model(model, register(LoraConfig(target_modules=["0", "1", "2"])))
    kinds = [type(layer).__name__ for layer in fused.base_model.model]
    assert kinds == ["FusedLinear", "Linear", "Conv1d"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'verbose'"):
        register(LoraConfig(), verbose=False)
    with pytest.raises(ValueError, match="backend is 'gpu'"):
        register(LoraConfig(), backend="gpu")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_compile(build: Any, backend: str) -> None:
    torch._dynamo.reset()
    model = adapted(build())
    block = model.base_model.model.model.layers[0].mlp if build is llama else None
    block = block or model.base_model.model.transformer.h[0].mlp
    accelerate(block, verbose=False)
    operators: list[str] = []

    def spy(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(block, fullgraph=True, backend=spy)
    x = torch.randn(2, 5, 48)
    results = []
    for module in (block, compiled):
        block.zero_grad()
        inputs = x.clone().requires_grad_()
        y = module(inputs)
        y.square().sum().backward()
        gradients = [p.grad for p in block.parameters() if p.grad is not None]
        results.append([y.detach(), inputs.grad, *gradients])
    assert len(results[0]) == 2 + 2 * count(block)
    for eager, got in zip(*results, strict=True):
        torch.testing.assert_close(got, eager, rtol=1e-4, atol=1e-5)
    assert sum("lora_linear" in name for name in operators) == count(block)


def test_compile_with_dropout_and_another_length() -> None:
    torch._dynamo.reset()
    model = adapted(llama(), lora_dropout=0.5)
    block = model.base_model.model.model.layers[0].mlp
    accelerate(block, verbose=False)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (5, 9, 17):
            x = torch.randn(2, length, 48)
            assert not torch.equal(compiled(x), compiled(x))
