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
    PeftModel,
)

import lora_fused
from lora_fused.integrations.peft import (
    accelerate,
    accelerated,
    explain,
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
