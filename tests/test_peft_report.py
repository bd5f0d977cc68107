"""What is printed, counted and warned of."""

from __future__ import annotations

import importlib
import sys
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("peft")


from lora_fused.integrations.peft import accelerate, explain
from tests.peft_models import adapted, gpt2, layer_of, small, tokens


def test_disabled_merged_and_absent_are_quiet() -> None:
    model, x = small(), torch.randn(2, 12)
    accelerate(model, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.disable_adapter():
            model(x)
        model.merge_adapter()
        model(x)
    assert dict(explain(model).stock_calls) == {
        "the adapters are disabled": 1,
        "the adapter is merged into the base weight": 1,
    }


def test_a_fallback_is_announced_once() -> None:
    model, x = small(), torch.randn(2, 12)
    report = accelerate(model, verbose=False)
    assert report.fused
    layer_of(model).lora_B["default"].register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="runs on PEFT's own forward: lora_B has hooks"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    assert explain(model).stock_calls["lora_B has hooks"] == 2


def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(gpt2(), target_modules=["c_attn", "wte"])
    report = accelerate(model)
    assert capsys.readouterr().err == f"{report}\n"
    assert str(report).splitlines() == [
        "lora_fused: 2 of 3 adapter layers fused",
        "    not fused: 1 lora.Embedding: not exactly lora.Linear "
        "(base_model.model.transformer.wte)",
    ]
    model(tokens())
    assert "calls so far: 2 fused" in str(explain(model))


def test_a_model_without_adapters() -> None:
    report = accelerate(nn.Linear(2, 2), verbose=False)
    assert str(report) == "lora_fused: there are no adapter layers in this model"


def test_an_older_peft_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.__version__", "0.14.1")
    name = "lora_fused.integrations.peft"
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"works with peft 0\.15 or newer, found 0\.14\.1\."):
        importlib.import_module(name)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend is 'gpu', expected one of auto"):
        accelerate(small(), backend="gpu")
