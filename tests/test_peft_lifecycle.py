"""Accelerated PEFT models are saved, merged, copied, compiled and restored like any other."""

from __future__ import annotations

import copy
import io
import pickle
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

import lora_fused
from lora_fused.integrations.peft import (
    FusedLinear,
    accelerate,
    accelerated,
    explain,
    register,
    restore,
)
from tests.peft_models import (
    GPT2_LAYERS,
    LLAMA_LAYERS,
    adapted,
    config_for,
    gpt2,
    llama,
    outputs_of,
    tokens,
)


def facts_of(model: nn.Module) -> dict[str, Any]:
    """Everything about the modules of a model that acceleration must leave alone."""
    facts: dict[str, Any] = {}
    for name, module in model.named_modules():
        attributes = {key: value for key, value in module.__dict__.items() if key != "_lora_fused"}
        facts[name] = {key: id(value) for key, value in attributes.items()}
    facts["parameters"] = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    facts["state"] = list(model.state_dict())
    return facts


def count(model: nn.Module) -> int:
    return sum(type(module) is FusedLinear for module in model.modules())


@pytest.mark.parametrize("build", [llama, gpt2])
def test_nothing_but_the_class_changes(build: Any) -> None:
    model = adapted(build(), lora_dropout=0.1)
    before, classes = facts_of(model), [type(m) for m in model.modules()]
    accelerate(model, verbose=False)
    assert count(model) == (LLAMA_LAYERS if build is llama else GPT2_LAYERS)
    assert facts_of(model) == before
    restore(model)
    assert facts_of(model) == before
    assert [type(m) for m in model.modules()] == classes
    assert not any("_lora_fused" in m.__dict__ for m in model.modules())


def test_restored_is_bit_equal_to_stock() -> None:
    model = adapted(llama(), lora_dropout=0.3)
    before = outputs_of(model)
    accelerate(model, verbose=False)
    outputs_of(model)
    restore(model)
    for name, tensor in outputs_of(model).items():
        assert torch.equal(tensor, before[name])


def test_context_manager() -> None:
    model = adapted(llama())
    first = model.base_model.model.model.layers[0]
    accelerate(first, verbose=False, backend="torch")
    with accelerated(model, verbose=False, match_torch_rng=True) as report:
        assert len(report.fused) == count(model) == LLAMA_LAYERS
        assert first.mlp.up_proj._lora_fused.options.match_torch_rng
    assert count(model) == LLAMA_LAYERS // 2
    assert first.mlp.up_proj._lora_fused.options.backend == "torch"
    with pytest.raises(KeyError), accelerated(model, verbose=False):
        raise KeyError
    assert count(model) == LLAMA_LAYERS // 2


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


@pytest.mark.parametrize("config", [{}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}])
def test_saved_files_are_byte_equal(tmp_path: Path, config: dict[str, Any]) -> None:
    model = adapted(llama(), **config)
    model.save_pretrained(tmp_path / "stock")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerate(model, verbose=False)
    model.save_pretrained(tmp_path / "fused")
    assert files(tmp_path / "stock") == files(tmp_path / "fused")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert list(state) == list(model.state_dict())


def test_loaded_into_stock_and_back(tmp_path: Path) -> None:
    base = llama()
    model = adapted(copy.deepcopy(base))
    accelerate(model, verbose=False)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    fused = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    accelerate(fused, verbose=False)
    torch.testing.assert_close(fused(tokens()).logits, stock(tokens()).logits)
    assert explain(fused).fused_calls == LLAMA_LAYERS


def test_adapters_of_transformers(tmp_path: Path) -> None:
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


def test_again_after_another_adapter() -> None:
    model = adapted(llama(), target_modules=["q_proj"])
    assert len(accelerate(model, verbose=False).fused) == 2
    model(tokens())
    model.add_adapter("second", config_for(llama()))
    assert count(model) == 2
    assert "accelerate(model) has not been called" in str(explain(model))
    accelerate(model, verbose=False)
    assert count(model) == LLAMA_LAYERS and explain(model).fused_calls == 2


def test_merging() -> None:
    model = adapted(llama()).eval()
    stock = copy.deepcopy(model)
    accelerate(model, verbose=False)
    for each in (model, stock):
        each.merge_adapter()
    assert torch.equal(model(tokens()).logits, stock(tokens()).logits)
    for each in (model, stock):
        each.unmerge_adapter()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stock.state_dict()[name])
    model(tokens())
    assert explain(model).fused_calls == LLAMA_LAYERS
    with model.disable_adapter(), stock.disable_adapter():
        assert torch.equal(model(tokens()).logits, stock(tokens()).logits)
    merged, expected = model.merge_and_unload(), stock.merge_and_unload()
    assert torch.equal(merged(tokens()).logits, expected(tokens()).logits)
    assert count(merged) == 0


def test_adapter_management() -> None:
    model = adapted(llama()).eval()
    model.add_adapter("second", config_for(llama()))
    model.add_weighted_adapter(["default", "second"], [0.3, 0.7], "both", combination_type="cat")
    stock = copy.deepcopy(model)
    accelerate(model, verbose=False)
    for name in ("both", "second"):
        for each in (model, stock):
            each.set_adapter(name)
        torch.testing.assert_close(model(tokens()).logits, stock(tokens()).logits)
    for each in (model, stock):
        each.delete_adapter("both")
    torch.testing.assert_close(model(tokens()).logits, stock(tokens()).logits)
    assert explain(model).fused_calls == 3 * LLAMA_LAYERS


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied_by", [copy.deepcopy, by_pickle, by_torch])
def test_copies(copied_by: Any) -> None:
    model = adapted(llama())
    accelerate(model, verbose=False, backend="torch")
    model(tokens())
    twin = copied_by(model)
    assert count(twin) == LLAMA_LAYERS
    assert torch.equal(twin(tokens()).logits, model(tokens()).logits)
    restore(twin)
    assert count(twin) == 0 and count(model) == LLAMA_LAYERS
    assert explain(model).fused_calls == 2 * LLAMA_LAYERS


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


def test_explained_call_by_call() -> None:
    model = adapted(llama(), lora_dropout=0.1, rank_pattern={"q_proj": 6})
    accelerate(model, verbose=False)
    blocked = model.base_model.model.model.layers[1].mlp.up_proj
    blocked.lora_A["default"].register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="lora_A has hooks"):
        reports = lora_fused.explain(model, tokens()).layers
    assert len(reports) == LLAMA_LAYERS
    first, last = reports[0], next(r for r in reports if r.problem is None)
    assert (first.problem.M, first.problem.R, first.problem.dropout) == (21, 6, True)
    assert first.problem.needs == {"x", "lora_A", "lora_B"}
    assert "runs on  PEFT's own forward\n    why      lora_A has hooks" in str(last)
    report = lora_fused.explain(model.base_model.model.model.layers[0].mlp.up_proj)
    assert report.layers[0].problem.M == 512


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
